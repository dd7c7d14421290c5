"""Make any supported transformers model compute its loss streamed, layer by layer and chunk by chunk, with exact gradients.

    attached = attach(model, Streaming(chunk=8192))
    loss = model(input_ids=ids, labels=ids).loss      # no logits; memory does not grow with depth
    loss.backward()                                    # hooks, DDP, accumulation and other people's training loops work
    attached.undo()

Without labels the model's own forward runs, so generation and everything else is as before.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from elite.attention import windowed
from elite.data.batches import IGNORE
from elite.distributed.exchange import Exchange
from elite.errors import ModelError
from elite.executor.streamed import choose
from elite.executor.streamed.functions import loss_sum
from elite.executor.streamed.rounds import cut_rows
from elite.executor.streamed.runner import KernelChoice, Runner
from elite.executor.streamed.step import Step
from elite.streamable import reason_against, sliding_window
from elite.streaming import Place, Streaming, check_layout

KERNEL_CACHE = Path("~/.cache/elite").expanduser()
"""Where measured kernel choices are kept."""


@dataclass(frozen=True)
class Attached:
    """A streamed model."""

    runner: Runner
    undo: Callable[[], None]
    """Makes the model what it was."""


def attach(model: Any, layout: Streaming, device: torch.device | None = None, choice: KernelChoice | None = None) -> Attached:
    """Stream `model`'s losses from now on.

    Args:
        model: a causal language model of transformers, possibly with peft adapters. Only its instance is changed.
        layout: see `Streaming`; its defaults suit most.
        device: where it computes; unset: where its embedding is. With streamed weights the model may lie in host memory: what is
            not streamed moves to `device`. Weights that ranks divide (elite/distributed/zero.py) stay divided.
        choice: names the attention kernel for a shape; unset: the fastest here, measured once a machine.

    Raises:
        ModelError: the model cannot be streamed; the message says why.
        PlanError: the layout contradicts itself, or the host has no room for streamed weights.
    """
    check_layout(layout)
    core: PreTrainedModel = model.get_base_model() if hasattr(model, "get_base_model") else model
    against = reason_against(core)
    if against is None and layout.keys_values is Place.host and (sliding_window(core.config) or windowed(core)):
        against = "keys and values in host memory do not go with its sliding window (executor.keys_values)"
    if against is not None:
        raise ModelError(f"{type(core).__name__} cannot be streamed: {against}", "executor=whole")
    where: torch.device = device or next(core.get_input_embeddings().parameters()).device
    # Measured in the chunks of the moment: where memory ran out they have become smaller.
    chosen = choice or (lambda shape: choose.fastest(shape, where, KERNEL_CACHE, runner.layout.chunk, runner.layout.block))
    runner = Runner(core, layout, where, chosen)
    _settle(core, runner, where)
    original = core.forward
    hidden = core.__dict__.get("forward")

    @wraps(original)  # trainers read its signature to see which columns of the data it takes
    def forward(input_ids: Tensor | None = None, **arguments: Any) -> Any:
        if arguments.get("labels") is None and arguments.get("shift_labels") is None:
            with runner.weights.on_demand():
                return original(input_ids=input_ids, **arguments)
        return CausalLMOutput(loss=_loss(runner, input_ids, **arguments), logits=None)

    core.forward = forward

    def undo() -> None:
        if hidden is None:
            del core.__dict__["forward"]
        else:
            core.forward = hidden
        runner.undo()

    return Attached(runner, undo)


def _settle(core: PreTrainedModel, runner: Runner, device: torch.device) -> None:
    """Move to `device` what is not brought to it layer by layer."""
    for parameter in core.parameters():
        if not runner.weights.holds(parameter) and parameter.device != device:
            parameter.data = parameter.data.to(device)
    for module in core.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.device != device:
                setattr(module, name, buffer.to(device))


def _loss(
    runner: Runner,
    input_ids: Tensor | None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    labels: Tensor | None = None,
    shift_labels: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
    documents: Sequence[Sequence[int]] | None = None,
    label_smoothing: float = 0.0,
    sharing: Exchange | None = None,
    **_unused: Any,  # callers hand on use_cache, return_dict and the like, which change nothing here
) -> Tensor:
    """The loss as transformers defines it: the mean over scored tokens, or their sum over `num_items_in_batch`.

    Args:
        input_ids: [B, S].
        attention_mask: [B, S] with zeros at padding; each run of equal values is attended on its own.
        position_ids: [B, S] or [1, S]; where they do not count on, another document begins, unless documents or a mask say.
        labels: [B, S], not shifted. shift_labels: [B, S], shifted already: the label of a position is the token after it.
        documents: for each row the lengths of its documents, which sum to S.
        sharing: ranks that hold parts of the same rows: S is this rank's part (elite/zigzag.py), `documents` are those of whole rows, and
            the loss is this rank's, to be summed over ranks.
    """
    if input_ids is None or input_ids.dim() != 2:
        raise ModelError("a streamed forward pass needs input_ids [batch, tokens]", "pass input_ids, not embeddings")
    rows, length = input_ids.shape
    if documents is None:
        documents = _documents(rows, length, attention_mask, position_ids)
    groups, shared = cut_rows(runner.layout, documents, length, sharing)
    if position_ids is None:
        position_ids = torch.arange(length, device=runner.device)[None]
    if shift_labels is None:
        assert labels is not None
        shift_labels = nn.functional.pad(labels, (0, 1), value=IGNORE)[:, 1:]
    runner.find_trained()
    trained = any(runner.layer_parameters) or bool(runner.outer_parameters)
    step = Step(
        ids=input_ids.to(runner.device).reshape(1, -1),
        positions=position_ids.to(runner.device).expand(rows, length).reshape(1, -1),
        labels=shift_labels.to(runner.device).flatten(),
        groups=groups,
        shared=shared,
        trains=torch.is_grad_enabled() and trained,
        label_smoothing=label_smoothing,
        # Drawn from torch's own generator, so that the run's seed decides it.
        seed=int(torch.randint(2**40, ())) if runner.stem.training else None,
    )
    if runner.journal is not None and step.trains:
        step.record = runner.journal.next_pass(step.fingerprint())
    total = loss_sum(runner, step)
    if num_items_in_batch is None:
        return total / (step.labels != IGNORE).sum()
    return total / num_items_in_batch


def _documents(rows: int, length: int, mask: Tensor | None, positions: Tensor | None) -> list[list[int]]:
    """Lengths of the documents in each row. Waits for the device once."""
    if mask is not None:
        if mask.dim() != 2:
            raise ModelError(f"attention_mask has {mask.dim()} dimensions", "a mask [batch, tokens], or documents=")
        begins = mask[:, 1:] != mask[:, :-1]
    elif positions is not None:
        begins = (positions[:, 1:] != positions[:, :-1] + 1).expand(rows, length - 1)
    else:
        return [[length]] * rows
    found = []
    for row in begins.cpu():
        cuts = [0, *(row.nonzero().flatten() + 1).tolist(), length]
        found.append([b - a for a, b in pairwise(cuts)])
    return found
