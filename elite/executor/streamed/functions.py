"""A streamed pass as autograd sees it: an embedding, one Function per segment of layers, a head.

Boundaries never enter the graph: they wait in the store. What links the Functions is a *ticket*, a scalar that carries no value;
parameters are inputs, so their gradients, hooks and DDP's buckets come about as always, segment by segment. Where ranks divide them,
something stands for them (`Weights.inputs`).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from elite.executor.streamed import ends
from elite.executor.streamed.journal import EMBED, EMBED_BACKWARD, HEAD, backward_stage, forward_stage
from elite.executor.streamed.runner import Runner
from elite.executor.streamed.step import Step
from elite.optimizations.functions.hooks import hooks_aside

Gradients = tuple[Tensor | None, ...]


class _Embed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, runner: Runner, step: Step, *_inputs: Tensor) -> Tensor:
        if step.record is not None and (state := step.record.store) is not None:
            runner.take_up(step, state)
        with runner.weights.before_layers():
            _done_once(runner, step, EMBED, lambda: ends.embed(runner, step))
            step.trains_embedding = ends.trains_embedding(runner, step)
        ctx.pass_ = (runner, step)
        ticket = torch.zeros((), device=runner.device)
        if not step.trains_embedding:
            # Only the norm or the head is trained: the backward need not come down to here.
            ctx.mark_non_differentiable(ticket)
        return ticket

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _ticket: Tensor) -> Gradients:
        runner, step = _current(ctx)
        with hooks_aside(runner.early_parameters):
            return None, None, *_once(runner, step, EMBED_BACKWARD, lambda: ends.embed_backward(runner, step))


class _Segment(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ticket: Tensor, runner: Runner, step: Step, segment: int, *_inputs: Tensor) -> Tensor:
        layers = runner.store.segment(segment)
        _done_once(runner, step, forward_stage(segment), lambda: runner.forward(step, layers))
        ctx.pass_, ctx.segment = (runner, step), segment
        return ticket.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, ticket: Tensor) -> Gradients:
        runner, step = _current(ctx)
        with hooks_aside([p for layer in runner.store.segment(ctx.segment) for p in runner.layer_parameters[layer]]):
            found = _once(runner, step, backward_stage(ctx.segment), lambda: runner.backward(step, ctx.segment))
            return ticket, None, None, None, *found


class _Head(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ticket: Tensor, runner: Runner, step: Step, *_inputs: Tensor) -> Tensor:
        parameters = runner.outer_parameters
        with hooks_aside(parameters):
            loss, *ctx.gradients = _once(runner, step, HEAD, lambda: _joined(*ends.head(runner, step, parameters, ctx.needs_input_grad[0])))
        ctx.pass_ = (runner, step)
        assert loss is not None
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Gradients:
        runner, step = _current(ctx)
        if step.upstream is not None:
            raise RuntimeError("a streamed pass has one backward: gradients take the place of what a second one would need")
        step.upstream = upstream
        # Handed on, not kept: the head's is as large as the head.
        gradients, ctx.gradients = ctx.gradients, None
        scaled = [None if gradient is None else gradient.mul_(upstream) for gradient in gradients]
        return torch.zeros_like(upstream), None, None, *ends.head_backward(runner, step, scaled)


def _current(ctx: Any) -> tuple[Runner, Step]:
    runner, step = ctx.pass_
    if runner.current is not step:
        raise RuntimeError("another streamed forward pass has taken this one's place: call backward before the next forward")
    return runner, step


def _once(runner: Runner, step: Step, stage: str, work: Callable[[], list[Tensor | None]]) -> list[Tensor | None]:
    """What a stage results in: kept, if the step was cut off after it; else worked out, and kept if it may be cut off."""
    record = step.record
    if record is None:
        return work()
    known = record.known(stage)
    if known is not None:
        return known
    result = work()
    record.keep(stage, result, runner.store.state())
    return result


def _done_once(runner: Runner, step: Step, stage: str, work: Callable[[], None]) -> None:
    """The same for a stage that only writes rows."""

    def without_result() -> list[Tensor | None]:
        work()
        return []

    _once(runner, step, stage, without_result)


def _joined(loss: Tensor, gradients: list[Tensor | None]) -> list[Tensor | None]:
    return [loss, *gradients]


def loss_sum(runner: Runner, step: Step) -> Tensor:
    """Sum of the token losses in nats, an fp32 scalar with a gradient for everything that is trained."""
    ticket = _Embed.apply(runner, step, *runner.weights.inputs(runner.early_parameters))
    for segment in range(runner.store.segments):
        layers = runner.store.segment(segment)
        ticket = _Segment.apply(ticket, runner, step, segment, *runner.inputs(layers))
    loss: Tensor = _Head.apply(ticket, runner, step, *runner.weights.inputs(runner.outer_parameters))
    return loss
