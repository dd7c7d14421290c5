"""Steps of small models as a run takes them, and the bytes that are alive in them."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import AutoModelForCausalLM

from elite import geometry, losses
from elite.attention import DOCUMENT_EAGER
from elite.config import ModelConfig
from elite.facts import Facts
from elite.model import apply_stage
from elite.optimizations import decide
from elite.optimizations.contract import Decision, Estimate, Stage, Step
from elite.plan.memory import folded, moments
from tests.plan.helpers import device, switches
from tests.plan.live_bytes import LiveBytes

LAYERS = 3
TILE = 64
TILED = ("tiled_mlp", "fused_loss")
KERNELS = ("fused_kernels",)


@dataclass(frozen=True)
class Case:
    """One small run."""

    kind: str
    on: tuple[str, ...] = ()
    """Optimizations."""
    cuda: bool = False
    """Autocast as CUDA has it, kernels of Triton, the loss in place; planned as for a GPU."""
    full: bool = False
    width: int = 128
    mlp: float = 3
    """Width of the MLP, over the model's."""
    tokens: int = 512
    rank: int = 8
    vocab: int = 32
    dropout: float = 0.0
    """Of what joins the residual stream."""
    layers: int = LAYERS

    def __str__(self) -> str:
        adapter = "full" if self.full else f"r{self.rank}"
        sizes = f"{self.tokens}x{self.width}x{self.mlp}x{self.vocab}"
        also = {"cuda": self.cuda, "dropout": self.dropout, f"{self.layers} layers": self.layers != LAYERS}
        return "-".join([self.kind, adapter, sizes, *self.on, *(word for word, said in also.items() if said)])

    @property
    def documents(self) -> tuple[int, ...]:
        """Lengths of those that share a sequence."""
        return (self.tokens // 4, self.tokens - self.tokens // 4) if "sequence_packing" in self.on else (self.tokens,)

    @property
    def half(self) -> bool:
        """Whether autocast is on."""
        return "mixed_precision" in self.on


def small(kind: str, width: int, vocab: int = 128, mlp: float = 3, dropout: float = 0.0, layers: int = LAYERS) -> ModelConfig:
    """A model of `width`, four heads; two key/value heads where the architecture has fewer of them."""
    rope = {"rope_type": "default", "rope_theta": 1e4} | ({"partial_rotary_factor": 0.5} if kind == "phi" else {})
    return ModelConfig(
        name=kind,
        model_type=kind,
        hidden_size=width,
        intermediate_size=int(mlp * width),
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4 if kind == "phi" else 2,
        vocab_size=vocab,
        max_position_embeddings=1024,
        rope_parameters=rope,
        extra={"resid_pdrop": dropout} if dropout else {},
    )


def adapted(core: Any, rank: int, half: bool) -> Any:
    """The model with adapters, as `elite.model` makes it: frozen weights in bf16, adapters in fp32 without a cast of their input."""
    core.requires_grad_(False)
    model: Any = get_peft_model(core, LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM"))
    for parameter in model.parameters():
        if half and not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.cast_input_dtype_enabled = False
    return model


def facts_of(case: Case) -> Facts:
    shape = geometry.shape(small(case.kind, case.width, case.vocab, case.mlp, case.dropout, case.layers))
    machine = replace(device("h100" if case.cuda else "cpu"), supports_bf16=True)
    trained = shape.total_params if case.full else shape.lora_params(case.rank)
    return Facts(shape, machine, case.tokens, 1, trained, "full" if case.full else "lora")


def decisions_of(case: Case, facts: Facts) -> tuple[Decision, ...]:
    options = switches(*case.on)
    changes: dict[str, Any] = {name: replace(getattr(options, name), tile=TILE) for name in case.on if name in TILED}
    return decide(replace(options, **changes), facts)


def built(case: Case, decisions: tuple[Decision, ...]) -> Any:
    """The model, with its optimizations applied."""
    torch.manual_seed(0)
    config = geometry.hf_config(small(case.kind, case.width, case.vocab, case.mlp, case.dropout, case.layers))
    core: Any = AutoModelForCausalLM.from_config(config, attn_implementation=DOCUMENT_EAGER)
    core.config.use_cache = False
    apply_stage(Stage.model, decisions, core)
    model = core if case.full else adapted(core, case.rank, case.half)
    apply_stage(Stage.executor, decisions, core)
    return model.train()


def loss(model: Any, ids: Tensor, half: bool, fused: bool, documents: tuple[int, ...] = ()) -> Tensor:
    """As the whole executor forms it."""
    given = {"input_ids": ids, "use_cache": False, "documents": (documents or (ids.shape[1],),)}
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        if fused:
            summed: Tensor = model(labels_to_sum=ids, **given)
            return summed
        logits = model(**given).logits
    return F.cross_entropy(logits.float().flatten(0, 1), ids.flatten(), reduction="sum")


def tensors(model: Any) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def measured_peak(case: Case, model: Any) -> int:
    """Bytes alive at once in a forward and backward pass, beyond weights, the optimizer's state and the batch. No gradient is there
    before."""
    ids, fused = torch.randint(0, case.vocab, (1, case.tokens)), "fused_loss" in case.on
    with as_on_cuda() if case.cuda else ExitStack():
        # What is found out on a few tokens, and operands that are made once a step.
        loss(model, ids[:, :16], case.half, fused).backward()
        model.zero_grad(set_to_none=True)
        live = LiveBytes()
        live.ignore([*tensors(model), ids])
        with live, _kernels_that_compute_nothing() if set(KERNELS) & set(case.on) else ExitStack():
            loss(model, ids, case.half, fused, case.documents).backward()
    return live.peak


class _RunningInPlace:
    """Kernels of a frozen head, which allocate the losses alone."""

    @staticmethod
    def absorb(*_: Any) -> None:
        pass

    add_rows = absorb

    @staticmethod
    def finish(state: Tensor, labels: Tensor, *_: Any) -> Tensor:
        return state.new_empty(len(labels))


@contextmanager
def as_on_cuda() -> Iterator[None]:
    """CUDA's autocast takes layer norms and powers to fp32, and its loss is a kernel that works in place."""

    def widened(function: Callable[..., Any]) -> Callable[..., Any]:
        def wide(value: Any) -> Any:
            return value.float() if isinstance(value, Tensor) and value.dtype is torch.bfloat16 else value

        def call(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_autocast_enabled("cpu"):
                return function(*args, **kwargs)
            return function(*map(wide, args), **{name: wide(value) for name, value in kwargs.items()})

        return call

    def in_place(logits: Tensor, labels: Tensor, *_: Any) -> Tensor:
        return logits.new_empty(len(labels), dtype=torch.float32)

    with ExitStack() as stack:
        stack.enter_context(patch.object(F, "layer_norm", widened(F.layer_norm)))
        stack.enter_context(patch.object(torch, "pow", widened(torch.pow)))
        stack.enter_context(patch.object(losses, "_cross_entropy", lambda _logits: in_place))
        stack.enter_context(patch.object(losses, "_running", lambda _part: _RunningInPlace))
        yield


@contextmanager
def _kernels_that_compute_nothing() -> Iterator[None]:
    """Who launches a kernel has allocated for it, whatever it then computes; interpreted, that takes minutes."""
    from triton.runtime.interpreter import GridExecutor

    with patch.object(GridExecutor, "__call__", lambda *_args, **_kwargs: None):
        yield


def passing(case: Case, facts: Facts, decisions: tuple[Decision, ...]) -> Estimate:
    """The predicted peak of what `measured_peak` measures."""
    step = folded(facts, decisions)
    # Positions, which the model numbers itself here. The kernel's own fp32 sums are no tensors on a CPU.
    standing = Estimate(gradients=step.standing.gradients, batch=8 * case.tokens)
    form = replace(step.form, attention=_without_kernel(step)) if case.cuda else step.form
    bare = replace(step, standing=standing, form=form)
    # The last moment is the update's.
    return max(list(moments(bare, facts))[:-1], key=lambda moment: moment.total)


def _without_kernel(step: Step) -> Any:
    return lambda sizes, copied: replace(step.form.attention(sizes, copied), work=0.0)
