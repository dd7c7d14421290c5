"""ZeRO by DeepSpeed's engine: gradients and the optimizer's state, or the weights too, are divided among ranks.

The engine takes the run's own optimizer and keeps flat parts of fp32 weights in it; the loop, schedules and hooks are the run's. What a
checkpoint holds is gathered to whole parameters, in the form that torch's optimizers have: one writer keeps checkpoints atomic, and any
number of ranks goes on from them, with ZeRO or without. Rank 0's host memory holds that copy while it is written.
"""

import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from elite.distributed.gradients import GradientExchange, State, in_this_thread
from elite.distributed.ranks import Ranks
from elite.facts import Facts
from elite.model import LoadedModel, TrainedCopy, copy_trained, load_trained
from elite.optimizations.contract import Decision
from elite.optimizations.zero_2 import active_zero
from elite.optimizations.zero_3 import divides_weights
from elite.streaming import Streaming

PARTS = "parts"
"""Under this name a checkpoint keeps state that is not a value for each weight: the optimizer's own, by rank."""
REFUSED = -1.0
"""A norm that the engine takes for an overflow: it lets go of gradients then."""


class Sharded(nn.Module, GradientExchange):
    """A model behind DeepSpeed's engine.

    Args:
        loaded: where weights are to be divided, they are already (`divide`).
        optimizer: of what is trained; from here on of this rank's part.
        settings: DeepSpeed's configuration.
        gathers: a module's divided weights are gathered whenever it is called; else by whoever calls it.
    """

    in_every_pass = True

    def __init__(
        self, loaded: LoadedModel, optimizer: torch.optim.Optimizer, settings: dict[str, Any], ranks: Ranks, gathers: bool = True
    ) -> None:
        super().__init__()
        deepspeed = _deepspeed(ranks)
        self.divides_weights = _divides_weights(settings)
        self._groups = [list(group["params"]) for group in optimizer.param_groups]
        self._ranks = ranks
        self._own_group = not dist.is_initialized()
        if self._own_group:
            # The engine asks for one of a single process, too.
            backend = "nccl" if ranks.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        # Everything is where it is to be: frozen weights may wait in host memory.
        with _staying(loaded.model):
            made = deepspeed.initialize(model=loaded.model, optimizer=optimizer, config=settings, dist_init_required=False)
        self._engine: Any = made[0]
        self._optimizer: Any = self._engine.optimizer
        if self.divides_weights and not gathers:
            self._optimizer.parameter_offload.destroy()
        # The run's own scales losses.
        self._optimizer.torch_autocast_gradscaler = None
        self._scale = 1.0
        """Of the losses whose gradients are there."""
        self._stand_in = torch.optim.SGD([nn.Parameter(torch.zeros((), device=ranks.device))])
        """By its gradient, the norm of all, a scaler learns whether one of fp16 has overflowed."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._engine(*args, **kwargs)

    def adding(self) -> AbstractContextManager[Any]:
        self._engine.set_gradient_accumulation_boundary(False)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        with in_this_thread():
            self._engine.backward(loss, scale_wrt_gas=False)

    def last_backward(self, loss: Tensor) -> None:
        self._engine.set_gradient_accumulation_boundary(True)
        self.backward(loss)

    def unscale(self, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
        # The engine does it in its step, as it scales gradients down.
        self._scale = scaler.get_scale()

    def clipped(self, parameters: Iterable[nn.Parameter], most: float) -> float:
        self._optimizer.clip_grad = most
        if self.divides_weights:
            norms = torch.stack([norm.float() for norm in self._optimizer._get_norm_groups()])
            # One that is not finite comes as -1.
            self._norm = torch.linalg.vector_norm(norms) if bool((norms >= 0).all()) else torch.full_like(norms[0], math.inf)
        else:
            self._norm = self._optimizer.scaled_global_norm()
        return float(self._norm) / self._scale

    def update(self, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
        self._stand_in.param_groups[0]["params"][0].grad = self._norm.to(self._ranks.device, torch.float32, copy=True)
        scaler.unscale_(self._stand_in)
        self._step(self._norm if math.isfinite(float(self._norm)) else torch.full_like(self._norm, REFUSED))
        scaler.update()

    def drop(self, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
        self._step(torch.full_like(self._norm, REFUSED))
        # As without ZeRO: the scale stays.
        scaler.update(scaler.get_scale())

    def optimizer_state(self, optimizer: torch.optim.Optimizer, keep: bool) -> State:
        from deepspeed.utils import safe_get_full_optimizer_state

        known: dict[str, Any] = next(iter(optimizer.state.values()), {})
        if not all(_is_plain(value) for value in known.values()):
            # Blocks of 8 bits, which begin and end with parts: as they are.
            with self._parts_in(optimizer):
                own = tree_map_only(Tensor, Tensor.cpu, optimizer.state_dict())
            parts = self._ranks.gather(own)
            return {PARTS: parts} if keep else {}
        self._find_state()
        state: dict[int, Any] = {}
        for place, parameter in enumerate(p for group in self._groups for p in group):
            # All ranks gather, one parameter at a time; numbers such as the count of steps are the same for all.
            found = {
                name: safe_get_full_optimizer_state(parameter, name) if _is_divided(value) else value.clone()
                for name, value in known.items()
            }
            if keep and found:
                state[place] = {name: value.cpu() for name, value in found.items()}
        return {"state": state, "param_groups": self._plain_groups(optimizer)} if keep else {}

    def load_optimizer_state(self, optimizer: torch.optim.Optimizer, state: State) -> None:
        if PARTS in state:
            with self._parts_in(optimizer):
                optimizer.load_state_dict(state[PARTS][self._ranks.rank])
            return
        for group, saved in zip(optimizer.param_groups, state["param_groups"], strict=True):
            group.update({name: value for name, value in saved.items() if name != "params"})
        first = next(iter(state["state"].values()), None)
        if first is None:
            # Adam with moments of zero has not begun.
            for part in optimizer.state.values():
                for value in part.values():
                    value.zero_()
            return
        for flat in self._flat_parts():
            part = optimizer.state[flat]
            for name, value in first.items():
                if not _is_divided(value):
                    part[name] = value.clone()
                elif name not in part:
                    part[name] = torch.zeros_like(flat, requires_grad=False)
        self._find_state()
        for place, parameter in enumerate(p for group in self._groups for p in group):
            for name, value in state["state"][place].items():
                if _is_divided(value):
                    self._set_state(parameter, value, name)

    def copied(self, loaded: LoadedModel) -> TrainedCopy:
        self._engine.empty_partition_cache()
        return copy_trained(loaded, _gathered)

    def take_part(self, loaded: LoadedModel) -> None:
        if self.divides_weights:
            self._engine.empty_partition_cache()
            copy_trained(loaded, _gathered, keep=False)

    def result(self, loaded: LoadedModel) -> Callable[[Path], None]:
        return self.copied(loaded).save if self.divides_weights else super().result(loaded)

    def load(self, loaded: LoadedModel, folder: Path) -> None:
        self._engine.empty_partition_cache()
        load_trained(loaded, folder, partial(_gathered, written=True) if self.divides_weights else None)
        self._optimizer.refresh_fp32_params()

    def close(self) -> None:
        self._engine.destroy()
        if self._own_group:
            dist.destroy_process_group()

    def _step(self, norm: Tensor) -> None:
        # At other times it would scale losses by it.
        self._optimizer.loss_scale = self._scale
        with _answering(self._optimizer, norm, "_get_norm_groups" if self.divides_weights else "scaled_global_norm"):
            self._engine.step()
        self._optimizer.loss_scale = 1.0

    def _plain_groups(self, optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
        """As `state_dict` has them: parameters by their places."""
        plain, first = [], 0
        for group, members in zip(optimizer.param_groups, self._groups, strict=True):
            plain.append(
                {name: value for name, value in group.items() if name != "params"} | {"params": list(range(first, first + len(members)))}
            )
            first += len(members)
        return plain

    def _flat_parts(self) -> list[Tensor]:
        """This rank's parts of fp32 weights, which the optimizer keeps its state by."""
        of = self._optimizer
        parts: list[Tensor] = of.fp32_partitioned_groups_flat if self.divides_weights else of.single_partition_of_fp32_groups
        return parts

    @contextmanager
    def _parts_in(self, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        """Within, the optimizer's groups hold this rank's parts: with weights divided they do so in its steps alone."""
        before = [group["params"] for group in optimizer.param_groups]
        if self.divides_weights:
            for part, flat in enumerate(self._flat_parts()):
                group = optimizer.param_groups[self._optimizer.sub_group_to_group_id[part]]
                group["params"] = [*group["params"], flat]
        try:
            yield
        finally:
            for group, params in zip(optimizer.param_groups, before, strict=True):
                group["params"] = params

    def _find_state(self) -> None:
        """Have the engine look for the optimizer's state: it does once, when that of the first group exists."""
        if not self.divides_weights:
            self._optimizer._hp_optimizer_states_linked = False
            self._optimizer._lazy_init_hp_params_optimizer_state()

    def _set_state(self, parameter: nn.Parameter, value: Tensor, name: str) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if not self.divides_weights:
            safe_set_full_optimizer_state(parameter, value, name)
            return
        # The last rank's part is filled up with zeros.
        size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
        whole = nn.functional.pad(value.flatten(), (0, size * self._ranks.world - value.numel()))
        safe_set_local_optimizer_state(parameter, whole.narrow(0, size * self._ranks.rank, size), name)


def wrapping(
    loaded: LoadedModel,
    layout: Streaming | None,
    decisions: Iterable[Decision],
    facts: Facts,
    dtype: torch.dtype,
    optimizer: torch.optim.Optimizer,
    ranks: Ranks,
) -> Callable[[LoadedModel], nn.Module] | None:
    """What puts a model behind the engine, where these decisions divide gradients among ranks, or weights, which is done at once; None
    where nothing does.

    Args:
        layout: of the streamed executor; None is the whole one.
        dtype: of matrix products.
    """
    zero = active_zero(decisions)
    if zero is None:
        return None
    settings = zero.settings(facts, str(dtype).removeprefix("torch."))
    # What streams weights is to find them so.
    divide(loaded, settings, ranks)
    return lambda loaded: Sharded(loaded, optimizer, settings, ranks, gathers=layout is None)


def loading_device(decisions: Iterable[Decision], ranks: Ranks) -> torch.device:
    """Where a model is loaded: what ranks divide is divided out of host memory, so that no device need hold it whole."""
    return torch.device("cpu") if divides_weights(decisions) else ranks.device


def divide(loaded: LoadedModel, settings: dict[str, Any], ranks: Ranks) -> None:
    """Where these settings of DeepSpeed are stage 3's, leave each rank with its part of every weight, of frozen ones too.

    One weight after another: the model may lie in host memory, and a device never holds it whole.
    """
    if _divides_weights(settings):
        _deepspeed(ranks).zero.Init(module=loaded.model, config_dict_or_path=while_dividing(settings, loaded))
        _bring(loaded.model, ranks.device)


def while_dividing(settings: dict[str, Any], loaded: LoadedModel) -> dict[str, Any]:
    """Settings for the division of weights: parts that are trained go on into pinned buffers of the engine's, and if they were pinned
    before, torch would keep that memory locked for good."""
    zero = settings["zero_optimization"]
    if "offload_param" not in zero or not loaded.trains_everything:
        return settings
    return settings | {"zero_optimization": zero | {"offload_param": zero["offload_param"] | {"pin_memory": False}}}


def _divides_weights(settings: dict[str, Any]) -> bool:
    return bool(settings["zero_optimization"]["stage"] == 3)


def _deepspeed(ranks: Ranks) -> Any:
    """The library, told which process this is."""
    # Under srun and in a single process nobody has said; it asks for no more than this.
    os.environ.setdefault("LOCAL_RANK", str(ranks.device.index or 0))
    os.environ.setdefault("DS_ACCELERATOR", ranks.device.type)
    import deepspeed
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # Nothing is compiled, nor tried, which runs compilers in each rank: an exchange through shared memory would take a minute and more;
    # gloo does it. The optimizer's step in host memory is torch's own.
    deepspeed.ops.__compatible_ops__ = {}
    return deepspeed


def _bring(model: nn.Module, device: torch.device) -> None:
    """Move what is not divided: buffers, and the scales of four-bit weights."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    for parameter in model.parameters():
        scales = getattr(parameter, "quant_state", None)
        if scales is not None:
            scales.to(device)


def _is_divided(value: Tensor) -> bool:
    """Whether it is a value for each weight, not a number."""
    return value.ndim > 0


def _is_plain(value: Any) -> bool:
    """Whether it is a number, or a value in fp32 for each weight."""
    return isinstance(value, Tensor) and value.dtype is torch.float32


@contextmanager
def _staying(model: Any) -> Iterator[None]:
    """Within, the model is not moved."""
    model.to = lambda *_: model
    try:
        yield
    finally:
        del model.to


@contextmanager
def _answering(optimizer: Any, norm: Tensor, name: str) -> Iterator[None]:
    """Within, the engine's optimizer takes this for the gradient's norm: it has been worked out, and judged."""
    setattr(optimizer, name, (lambda: [norm]) if name == "_get_norm_groups" else lambda: norm)
    try:
        yield
    finally:
        delattr(optimizer, name)


def _gathered(tensor: Tensor, written: bool = False) -> AbstractContextManager[Any]:
    """Within, a parameter is whole on all ranks.

    Args:
        written: all write the same to it.
    """
    import deepspeed

    if not hasattr(tensor, "ds_id"):
        return nullcontext()
    return deepspeed.zero.GatheredParameters([tensor], modifier_rank=0 if written else None)
