"""The configuration as the schema that Hydra composes into, and as YAML."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from elite.config import RunConfig
from elite.errors import ConfigError


def schema() -> DictConfig:
    """The typed root that YAML and overrides merge into.

    Frozen dataclasses arrive read-only in OmegaConf; the flag is lifted for composing and holds again on the built objects.
    """
    root = OmegaConf.structured(RunConfig)
    _thaw(root)
    return root


def _thaw(node: Any) -> None:
    if isinstance(node, DictConfig):
        OmegaConf.set_readonly(node, None)
        for key in node:
            _thaw(node._get_node(key))


def build(composed: DictConfig) -> RunConfig:
    """The frozen configuration of a composed one, interpolations resolved.

    Raises:
        ConfigError: a value is missing or of the wrong type.
    """
    try:
        config = OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:
        raise ConfigError(str(error).splitlines()[0], "python train.py --cfg job shows every field") from error
    assert isinstance(config, RunConfig)
    return config


def to_yaml(config: RunConfig) -> str:
    """The configuration as YAML, every field present."""
    return OmegaConf.to_yaml(OmegaConf.structured(config), resolve=True)


def from_yaml(path: Path) -> RunConfig:
    """Read what `to_yaml` wrote."""
    merged = OmegaConf.merge(schema(), OmegaConf.load(path))
    assert isinstance(merged, DictConfig)
    return build(merged)
