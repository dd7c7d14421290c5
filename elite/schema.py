"""The configuration as the schema that Hydra composes into, and as YAML."""

from collections.abc import Iterator
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import yaml
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from elite.config import RunConfig
from elite.errors import ConfigError

MAX_BYTES = 1 << 20
"""Of a run's configuration, which is some thousand."""
MAX_DEPTH = 20
CLOSING = ("output", "cache")
"""What stands at its end: a file that was cut off lacks it, and would otherwise pass with defaults for what is gone."""
SHOW = "python train.py --cfg job shows every field"
ANEW = "resume=never starts another run; or put config.yaml back from a copy"


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
        raise ConfigError(str(error).splitlines()[0], SHOW) from error
    except FrozenInstanceError as error:
        # What `+name=` adds to a group, which has no such field.
        raise ConfigError(f"{str(error).removeprefix('cannot assign to field ')} is not a field", SHOW) from error
    assert isinstance(config, RunConfig)
    return config


def to_yaml(config: RunConfig) -> str:
    """The configuration as YAML, every field present."""
    return OmegaConf.to_yaml(OmegaConf.structured(config), resolve=True)


def from_yaml(path: Path) -> RunConfig:
    """Read what `to_yaml` wrote, and nothing more: a run folder is data.

    Values alone come back. Interpolations, which could read the environment or call a resolver, were resolved before it was written; keys
    beside the fields, `_target_` among them, and YAML's own means of growing (aliases) are none that a run writes.

    Raises:
        ConfigError: it cannot be read, or holds something else.
    """
    try:
        merged = OmegaConf.merge(schema(), OmegaConf.create(_plain(path)))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {str(error).splitlines()[0]}", ANEW) from error
    assert isinstance(merged, DictConfig)
    return build(merged)


def _plain(path: Path) -> dict[str, Any]:
    """A YAML mapping of plain values.

    Raises:
        ConfigError: it is none.
    """
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise ConfigError(f"{path}: {size:,} bytes are no configuration", ANEW)
        text = path.read_text()
        _check_events(text, path)
        found = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
        named = next(_forbidden(found, ""), None)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}", ANEW) from None
    except (ValueError, TypeError, AttributeError, RecursionError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path} is damaged: {' '.join(str(error).split())}", ANEW) from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path} is damaged: it holds no fields", ANEW)
    closing = found.get(CLOSING[0])
    if not isinstance(closing, dict) or CLOSING[1] not in closing:
        raise ConfigError(f"{path} is cut off: {'.'.join(CLOSING)} is missing", ANEW)
    if named:
        raise ConfigError(f"{path}: {named}, and a run folder holds values alone", ANEW)
    return {str(name): value for name, value in found.items()}


def _check_events(text: str, path: Path) -> None:
    """Refuse what grows when it is read, before it is read.

    Raises:
        ConfigError: it uses aliases or is deeply nested.
    """
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent) or depth > MAX_DEPTH:
            raise ConfigError(f"{path}: it uses YAML aliases or is deeply nested, and no run writes so", ANEW)


def _forbidden(node: Any, name: str) -> Iterator[str]:
    """What is more than a value, with its place."""
    if isinstance(node, dict):
        for key, value in node.items():
            inner = f"{name}.{key}" if name else str(key)
            if str(key).startswith("_") and str(key).endswith("_"):
                yield f"{inner} names something to be called"
            yield from _forbidden(value, inner)
    elif isinstance(node, list):
        for position, value in enumerate(node):
            yield from _forbidden(value, f"{name}[{position}]")
    elif isinstance(node, str) and "${" in node:
        yield f"{name}={node} is an interpolation"
    elif node == MISSING:
        yield f"{name} is left open"
