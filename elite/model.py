"""Load a causal language model, stretch its positions, apply the plan's optimizations in order, attach adapters."""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from elite import geometry, pretrained
from elite.attention import DOCUMENT_EAGER
from elite.config import AdapterMethod, RunConfig, Weights
from elite.errors import ModelError, PlanError
from elite.model_folder import ANEW, readable
from elite.optimizations.contract import Applied, Decision, Site, Stage
from elite.optimizations.functions.divided import divide_adapter, parts_of, whole
from elite.optimizations.gqa_conversion import GQAConversion, converted_maps
from elite.optimizations.memory_pool import growing
from elite.optimizations.tensor_parallel import TensorParallel
from elite.plan.traffic import active

log = logging.getLogger("elite.model")


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to train."""

    model: Any
    """With adapters attached (peft) or, in full fine-tuning, as loaded."""
    core: PreTrainedModel
    """The causal language model inside."""
    applied: dict[str, Applied]
    """What each optimization of the stages `geometry`, `model` and `executor` touched."""

    @cached_property
    def trainable(self) -> list[torch.nn.Parameter]:
        """Parameters that receive gradients."""
        return [p for p in self.model.parameters() if p.requires_grad]

    @property
    def adapted(self) -> bool:
        """Whether adapters are trained beside the model."""
        return self.model is not self.core

    @cached_property
    def divided(self) -> bool:
        """Whether each rank has a part of the layers' maps (optimizations.tensor_parallel)."""
        return TensorParallel.name in self.applied

    @property
    def trains_everything(self) -> bool:
        """Whether every parameter of the model is trained, and the model itself is the result."""
        return not self.adapted and all(p.requires_grad for p in self.core.parameters())


def apply_stage(stage: Stage, decisions: tuple[Decision, ...], target: Any) -> dict[str, Applied]:
    """Apply the active optimizations of one stage, in their declared order.

    Raises:
        PlanError: one found nothing to act on.
    """
    applied = {}
    for decision in decisions:
        if decision.active and decision.optimization.stage is stage:
            result = decision.optimization.apply(target)
            if result.count == 0:
                raise PlanError(
                    f"optimizations.{decision.name} found nothing to act on ({result.detail})",
                    f"optimizations.{decision.name}.enabled=false",
                )
            applied[decision.name] = result
    return applied


def stretch_positions(config: PreTrainedConfig, context: int) -> None:
    """Give `config` YaRN rotary embeddings if `context` exceeds the positions it was trained on (Peng et al. 2023, arXiv:2309.00071)."""
    trained = config.max_position_embeddings
    rope: dict[str, Any] = config.rope_parameters
    if context <= trained or rope.get("rope_type", "default") != "default":
        return
    config.rope_parameters = {**rope, "rope_type": "yarn", "factor": context / trained, "original_max_position_embeddings": trained}
    config.max_position_embeddings = context


def _base(config: RunConfig, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The model as it is, in `dtype` on `device`, with document-wise eager attention."""
    if config.model.weights is Weights.random:
        hf_config = geometry.hf_config(config.model)
        stretch_positions(hf_config, config.tier.context)
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(hf_config, dtype=dtype, attn_implementation=DOCUMENT_EAGER)
        return model
    folder = pretrained.locate(config.model, Path(config.output.cache).expanduser(), download=True)
    if folder is None:
        raise ModelError(f"model={config.model.name} names no hub id, folder or package", "model.path=FOLDER")
    loaded = geometry.hf_config_from(folder, config.model.trust_remote_code)
    stretch_positions(loaded, config.tier.context)
    with readable(f"{folder} holds no weights of the model in its config.json", ANEW):
        # With the loading info it returns a pair.
        made: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=loaded,
            dtype=dtype,
            attn_implementation=DOCUMENT_EAGER,
            trust_remote_code=config.model.trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
        )
    model, found = made
    # Those transformers would draw at random, and train on.
    if absent := sorted(found["missing_keys"]):
        problem = f"{folder} lacks {len(absent)} of the model's tensors: {', '.join(absent[:3])}{' …' if len(absent) > 3 else ''}"
        raise ModelError(problem, ANEW)
    return model


def load(
    config: RunConfig,
    decisions: tuple[Decision, ...],
    dtype: torch.dtype,
    device: torch.device,
    streamed_weights: bool = False,
    base: Path | None = None,
) -> LoadedModel:
    """Load, optimize and adapt the model.

    Args:
        dtype: of frozen weights; trained weights are fp32.
        device: where it trains.
        streamed_weights: the executor will bring frozen weights to the device layer by layer, so they stay where they are now: each layer
            goes to its place in host memory from there, and what stands around the layers to the device.
        base: folder for the model that adapters belong to, if it is not the one that was loaded; what is there already stays.
    """
    full, lora = (config.adapter.method is method for method in (AdapterMethod.full, AdapterMethod.lora))
    # Fine-tuning all weights keeps fp32 masters; autocast makes the products run in the compute dtype.
    divides = any(decision.active and decision.name == TensorParallel.name for decision in decisions)
    # A device has room for its part of a divided model alone.
    with _room_for(config, decisions, device):
        core = _base(config, torch.float32 if full else dtype, torch.device("cpu") if divides else device)
        core.config.use_cache = False
        applied = apply_stage(Stage.geometry, decisions, core)
        if GQAConversion.name in applied and lora and base is not None:
            _keep_base(core, base)
        applied |= apply_stage(Stage.model, decisions, core)
        if not streamed_weights or _quantised(core):
            # Weights reach the device only now, so quantised ones never exist there in full; random ones were made there.
            torch.nn.Module.to(core, device)
    model: Any = _with_adapters(core, config) if lora else core
    if config.adapter.method is AdapterMethod.converted:
        _train_converted(core, config)
    applied |= apply_stage(Stage.executor, decisions, core)
    model.train()
    return LoadedModel(model, core, applied)


def _room_for(config: RunConfig, decisions: tuple[Decision, ...], device: torch.device) -> AbstractContextManager[None]:
    """Random weights are made on the device whole and packed there: in blocks of fixed size a packed map in each would keep all of them."""
    packed = config.model.weights is Weights.random and active(decisions, Site.BASE_WEIGHTS)
    return growing() if packed and device.type == "cuda" and not active(decisions, Site.ALLOCATOR) else nullcontext()


def _quantised(core: PreTrainedModel) -> bool:
    """Whether weights are packed when they reach the device."""
    return bool(getattr(core, "is_loaded_in_4bit", False))


def _keep_base(core: PreTrainedModel, folder: Path) -> None:
    """Write a converted model, which adapters then name as their base."""
    if not folder.is_dir():
        core.save_pretrained(folder)
    core.name_or_path = str(folder)


def _train_converted(core: PreTrainedModel, config: RunConfig) -> None:
    """Freeze everything but what the conversion changed, which gets fp32 weights."""
    core.requires_grad_(False)
    names = converted_maps(config.optimizations.gqa_conversion, core.config.model_type)
    for layer in core.get_decoder().layers:
        for name, module in layer.self_attn.named_children():
            if name in names:
                module.float().requires_grad_(True)


def _with_adapters(core: PreTrainedModel, config: RunConfig) -> Any:
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer

    core.requires_grad_(False)
    options = LoraConfig(
        r=config.adapter.rank,
        lora_alpha=config.adapter.alpha,
        lora_dropout=config.adapter.dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(core, options)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            # Autocast converts the adapters' weights; casting the input up first would keep a second copy of every activation.
            module.cast_input_dtype_enabled = False
            divide_adapter(module)
    return model


@dataclass(frozen=True)
class TrainedCopy:
    """What is trained, copied to host memory: it can be written while training goes on."""

    save: Callable[[Path], None]
    """Writes it: an adapter (peft), a whole model (transformers), or some of a model's tensors under their names in it."""
    nbytes: int


Gathered = Callable[[torch.Tensor], AbstractContextManager[Any]]
"""Within what it returns, the parameter is whole: ranks may hold parts of it (elite/distributed/zero.py)."""


def as_it_is(tensor: torch.Tensor) -> AbstractContextManager[Any]:
    """Parameters are whole."""
    return nullcontext()


def copy_trained(loaded: LoadedModel, gathered: Gathered = as_it_is, keep: bool = True) -> TrainedCopy:
    """Copy what is trained; where tensors are one, such as tied embeddings, so are their copies.

    Where ranks divide layers, the others call `take_part` meanwhile.

    Args:
        gathered: makes parameters whole, one at a time.
        keep: false on a rank that only has a part in that.
    """
    everything = loaded.trains_everything
    state, copies = dict[str, torch.Tensor](), dict[int, torch.Tensor]()
    for name, tensor in _trained(loaded).items():
        if id(tensor) not in copies:
            with gathered(tensor):
                copies[id(tensor)] = _copied(tensor) if keep else torch.empty(0)
        state[name] = copies[id(tensor)]

    def save(folder: Path) -> None:
        if loaded.adapted:
            # `save_embedding_layers="auto"` would ask the hub about the base model's vocabulary.
            loaded.model.save_pretrained(folder, state_dict=state, save_embedding_layers=False)
        elif everything:
            loaded.core.save_pretrained(folder, state_dict=state)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            save_file(state, folder / "trained.safetensors")

    return TrainedCopy(save, sum(copy.nbytes for copy in copies.values()))


def take_part(loaded: LoadedModel) -> None:
    """What the other ranks do while one copies what is trained, or exports it."""
    for tensor in {id(tensor): tensor for tensor in _trained(loaded).values()}.values():
        whole(tensor)


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    """In host memory; a layer's part that ranks divide, whole."""
    found: torch.Tensor = whole(tensor)
    return found if found is not tensor else tensor.detach().to("cpu", copy=True).contiguous()


def _trained(loaded: LoadedModel) -> dict[str, torch.Tensor]:
    """What is trained, by name in the model: the parameters themselves, so that what is tied is one."""
    if loaded.trains_everything:
        return loaded.core.state_dict(keep_vars=True)
    return {name: parameter for name, parameter in loaded.model.named_parameters() if parameter.requires_grad}


def export(loaded: LoadedModel, folder: Path) -> None:
    """Write the run's result in the library's own format: an adapter (peft) or a whole model (transformers)."""
    if loaded.divided:
        copy_trained(loaded).save(folder)
    elif loaded.adapted:
        # `save_embedding_layers="auto"` would ask the hub about the base model's vocabulary.
        loaded.model.save_pretrained(folder, save_embedding_layers=False)
    else:
        loaded.core.save_pretrained(folder)


def load_trained(loaded: LoadedModel, folder: Path, gathered: Gathered | None = None) -> None:
    """Read what `copy_trained` saved into the model, on whatever device it is.

    Args:
        gathered: makes parameters whole, one at a time (adapters all at once); what is written to them within stays. Unset: they are.

    Raises:
        ModelError: the files belong to another model or rank.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    tensors = {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}
    if not loaded.adapted:
        unknown, absent = _read_into(loaded.core, tensors, gathered)
        trained = {name for name, p in loaded.core.named_parameters() if p.requires_grad}
        missing = absent & trained - set(loaded.core.all_tied_weights_keys)
    else:
        own = get_peft_model_state_dict(loaded.model, save_embedding_layers=False) if loaded.divided else {}
        with ExitStack() as stack:
            for parameter in loaded.trainable if gathered is not None else ():
                stack.enter_context(gathered(parameter))  # type: ignore[misc]
            result: Any = set_peft_model_state_dict(loaded.model, parts_of(tensors, own))
        unknown, missing = set(result.unexpected_keys), {name for name in result.missing_keys if "lora_" in name}
    if missing or unknown:
        raise ModelError(f"{folder} does not hold this model: {len(missing)} tensors missing, {len(unknown)} unknown", "resume=never")


def _read_into(core: PreTrainedModel, tensors: dict[str, torch.Tensor], gathered: Gathered | None) -> tuple[set[str], set[str]]:
    """Names among the tensors that the model does not have, and the other way round."""
    if gathered is None:
        result: Any = core.load_state_dict(parts_of(tensors, core.state_dict()), strict=False)
        return set(result.unexpected_keys), set(result.missing_keys)
    own: dict[str, torch.Tensor] = core.state_dict(keep_vars=True)
    for name in tensors.keys() & own.keys():
        with gathered(own[name]):
            core.load_state_dict({name: tensors[name]}, strict=False)
    return tensors.keys() - own.keys(), own.keys() - tensors.keys()
