"""A model's exact shape, read off the model itself built without memory: no weights and no network are needed."""

import json
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elite.config import ModelConfig
from elite.errors import ModelError
from elite.facts import LinearShape, ModelShape
from elite.model_folder import ANEW, LIMITS, check_code, check_config, check_size, read_config, readable
from elite.streamable import reason_against, sliding_window, windowed_layers

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "max_position_embeddings",
)
IN_EVERY_LAYER = "layers.*."
"""Before a module's name within a layer, in transformers' plans."""
SUPPORTED = "llama, qwen2, qwen3, mistral, phi …"
"""Examples of architectures whose decoder layers can be worked on."""


def hf_config(model: ModelConfig) -> "PretrainedConfig":
    """The configuration transformers builds the model from: the folder's `config.json` if there is one, else the stated geometry.

    Raises:
        ModelError: unknown `model_type`, a size that is not positive, or heads that do not divide.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    if (folder := own_folder(model)) is not None:
        return hf_config_from(folder, model.trust_remote_code)
    _check_geometry(model)
    _check_rope(model)
    check_code("model.extra", model.extra, trusted=False)
    geometry: dict[str, Any] = {name: getattr(model, name) for name in SIZES}
    if model.rope_parameters:
        geometry["rope_parameters"] = dict(model.rope_parameters)
    if model.model_type not in CONFIG_MAPPING:
        raise _unknown(model.model_type)
    with readable(f"model={model.name}: transformers refuses this geometry", "check model.extra and model.rope_parameters"):
        return AutoConfig.for_model(model.model_type, **geometry, tie_word_embeddings=model.tie_word_embeddings, **model.extra)


def own_folder(model: ModelConfig) -> Path | None:
    """The folder whose `config.json` takes the place of the stated geometry, if there is one."""
    folder = Path(model.path).expanduser() if model.path is not None else None
    return folder if folder is not None and (folder / "config.json").is_file() else None


def hf_config_from(folder: Path, trusted: bool = False) -> "PretrainedConfig":
    """The configuration in a model folder.

    Args:
        trusted: code that it names may run (`model.trust_remote_code`).

    Raises:
        ModelError: the folder holds none, a broken one, or one of an architecture that transformers does not know.
    """
    from transformers import AutoConfig

    check_config(folder, trusted)
    plain = read_config(folder / "config.json")
    if not isinstance(plain.get("model_type"), str):
        raise ModelError(f"{folder / 'config.json'} names no model_type", "give the folder that save_pretrained wrote")
    try:
        with readable(f"{folder / 'config.json'} describes no model", ANEW):
            found: PretrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trusted)
    except ModelError as error:
        if isinstance(error.__cause__, ValueError) and "does not recognize this architecture" in str(error.__cause__):
            raise _unknown(plain["model_type"]) from error.__cause__
        raise
    return found


def shape(model: ModelConfig) -> ModelShape:
    """Exact parameter counts and the linear maps of one decoder layer; about a second the first time, cached for the process.

    Raises:
        ModelError: as `hf_config`, or the architecture has no list of decoder layers to work on.
    """
    config = hf_config(model)
    # Of an architecture that lies in the folder itself JSON does not tell the class.
    code = own_folder(model) if model.trust_remote_code else None
    with readable(f"model={model.name}: transformers cannot build it", "check its geometry, or choose another model"):
        return _shape(_name(model), config.to_json_string(use_diff=False), code)


def _name(model: ModelConfig) -> str:
    """What people call it: a folder with a model of its own is not the preset whose place it takes."""
    own = own_folder(model)
    return own.resolve().name if own else model.name


@lru_cache(maxsize=32)
def _shape(name: str, config_json: str, code: Path | None = None) -> ModelShape:
    import torch
    from torch import nn
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**json.loads(config_json)) if code is None else hf_config_from(code, trusted=True)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=code is not None)
    except ValueError as error:
        raise ModelError(f"model_type={config.model_type} is no causal language model", f"model.model_type={SUPPORTED}") from error
    layers = getattr(model.get_decoder(), "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ModelError(
            f"model_type={config.model_type} keeps its decoder layers elsewhere than in get_decoder().layers",
            f"choose an architecture laid out as Llama is: {SUPPORTED}",
        )
    first = layers[0]
    modules = ((path, module) for path, module in first.named_modules() if isinstance(module, nn.Linear))
    linears = tuple(LinearShape(path, module.in_features, module.out_features, module.bias is not None) for path, module in modules)
    if not linears:
        raise ModelError(f"model_type={config.model_type} has no nn.Linear in its decoder layers", f"model.model_type={SUPPORTED}")
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    return ModelShape(
        name=name,
        model_type=config.model_type,
        num_hidden_layers=len(layers),
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_attention_heads=heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=head_dim,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_position_embeddings,
        layer_linears=linears,
        layer_params=sum(p.numel() for p in first.parameters()),
        total_params=sum(p.numel() for p in model.parameters()),
        sliding_window=sliding_window(config),
        residual_dropout=any(getattr(config, name, 0.0) > 0 for name in ("resid_pdrop", "residual_dropout")),
        windowed_layers=windowed_layers(config),
        rotary_dim=int(head_dim * rope.get("partial_rotary_factor", 1.0)) if rope else 0,
        unstreamable=reason_against(model) or "",
        tensor_plan=_tensor_plan(config),
    )


def _tensor_plan(config: Any) -> tuple[tuple[str, str], ...]:
    """What of the architecture's plan for tensor parallelism is about its layers."""
    plan: dict[str, str] = config.base_model_tp_plan or {}
    return tuple((name.removeprefix(IN_EVERY_LAYER), style) for name, style in plan.items() if name.startswith(IN_EVERY_LAYER))


def _check_geometry(model: ModelConfig) -> None:
    sizes = asdict(model)
    for name in SIZES:
        check_size(f"model.{name}", sizes[name], LIMITS[name])
    for whole, part in (("hidden_size", "num_attention_heads"), ("num_attention_heads", "num_key_value_heads")):
        # A model that states its own head_dim may have any number of heads.
        if sizes[whole] % sizes[part] and not (whole == "hidden_size" and "head_dim" in model.extra):
            raise ModelError(
                f"model.{whole}={sizes[whole]} is not a multiple of model.{part}={sizes[part]}",
                f"model.{part}={_nearest_divisor(sizes[whole], sizes[part])}",
            )


def _check_rope(model: ModelConfig) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    known = {"default", *ROPE_INIT_FUNCTIONS}
    if "rope_type" in model.rope_parameters and model.rope_parameters["rope_type"] not in known:
        raise ModelError(
            f"model.rope_parameters.rope_type={model.rope_parameters['rope_type']} is unknown", f"one of {', '.join(sorted(known))}"
        )


def _nearest_divisor(whole: int, wanted: int) -> int:
    return min((n for n in range(1, whole + 1) if whole % n == 0), key=lambda n: abs(n - wanted))


def _unknown(model_type: str) -> ModelError:
    return ModelError(f"model_type={model_type!r} is unknown to the installed transformers", f"model.model_type={SUPPORTED}")
