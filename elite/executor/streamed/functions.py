"""A streamed pass as autograd sees it: an embedding, one Function per segment of layers, a head.

Boundaries never enter the graph: they wait in the store. What links the Functions is a *ticket*, a scalar that carries no value;
parameters are inputs, so their gradients, hooks and DDP's buckets come about as always, segment by segment.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from elite.executor.streamed.runner import Runner, Step
from elite.optimizations.functions.hooks import hooks_aside

Gradients = tuple[Tensor | None, ...]


class _Embed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, runner: Runner, step: Step, *parameters: nn.Parameter) -> Tensor:
        runner.embed(step)
        ctx.pass_, ctx.parameters = (runner, step), parameters
        ticket = torch.zeros((), device=runner.device)
        if parameters and not runner.stem.trains_embedding(step.part(step.order[0])):
            # Only the norm or the head is trained: the backward need not come down to here.
            ctx.mark_non_differentiable(ticket)
        return ticket

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _ticket: Tensor) -> Gradients:
        runner, step = _current(ctx)
        with hooks_aside(ctx.parameters):
            return None, None, *runner.embed_backward(step, ctx.parameters)


class _Segment(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ticket: Tensor, runner: Runner, step: Step, segment: int, *parameters: nn.Parameter) -> Tensor:
        runner.forward(step, runner.store.segment(segment))
        ctx.pass_, ctx.segment, ctx.parameters = (runner, step), segment, parameters
        return ticket.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, ticket: Tensor) -> Gradients:
        runner, step = _current(ctx)
        with hooks_aside(ctx.parameters):
            return ticket, None, None, None, *runner.backward(step, ctx.segment, ctx.parameters)


class _Head(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ticket: Tensor, runner: Runner, step: Step, *parameters: nn.Parameter) -> Tensor:
        with hooks_aside(parameters):
            loss, ctx.gradients = runner.head(step, parameters, descend=ctx.needs_input_grad[0])
        ctx.pass_ = (runner, step)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Gradients:
        _, step = _current(ctx)
        if step.upstream is not None:
            raise RuntimeError("a streamed pass has one backward: gradients take the place of what a second one would need")
        step.upstream = upstream
        # Handed on, not kept: the head's is as large as the head.
        gradients, ctx.gradients = ctx.gradients, None
        return torch.zeros_like(upstream), None, None, *(None if g is None else g.mul_(upstream) for g in gradients)


def _current(ctx: Any) -> tuple[Runner, Step]:
    runner, step = ctx.pass_
    if runner.current is not step:
        raise RuntimeError("another streamed forward pass has taken this one's place: call backward before the next forward")
    return runner, step


def loss_sum(runner: Runner, step: Step) -> Tensor:
    """Sum of the token losses in nats, an fp32 scalar with a gradient for everything that is trained."""
    ticket = _Embed.apply(runner, step, *runner.outer_parameters)
    for segment in range(runner.store.segments):
        layers = runner.store.segment(segment)
        ticket = _Segment.apply(ticket, runner, step, segment, *(p for layer in layers for p in runner.layer_parameters[layer]))
    loss: Tensor = _Head.apply(ticket, runner, step, *runner.outer_parameters)
    return loss
