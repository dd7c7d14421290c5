"""The two ends of a streamed pass: what stands before the layers, and the loss after them, chunk by chunk."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from elite.chunks import Chunk
from elite.executor.streamed.runner import Runner
from elite.executor.streamed.step import GradientSum, Step


def embed(runner: Runner, step: Step, chunks: Sequence[Chunk] | None = None) -> None:
    """Write the first boundary, of all chunks unless told which."""
    with torch.no_grad(), runner.as_in(step):
        for chunk in step.order if chunks is None else chunks:
            runner.draws.seed(step, 0, chunk)
            with step.autocast():
                hidden = runner.stem.embed(step.part(chunk))
            if runner.current is not step:
                runner.begin(step, hidden.shape[-1], hidden.dtype)
            runner.write(runner.store.sinks(0, step.trains), chunk, hidden[0])


def trains_embedding(runner: Runner, step: Step) -> bool:
    """Whether anything before the layers is trained."""
    return bool(runner.early_parameters) and runner.stem.trains_embedding(step.part(step.order[0]))


def record_arguments(runner: Runner, step: Step) -> None:
    """Have what the decoder hands to its layers at hand for all chunks, as far as it is kept."""
    with runner.as_in(step), step.autocast():
        for chunk in step.order:
            runner.stem.calls(step.part(chunk))


def embed_backward(runner: Runner, step: Step) -> list[Tensor | None]:
    """Gradients of what stands before the layers."""
    parameters = runner.early_parameters
    total = GradientSum(parameters)
    with runner.as_in(step), runner.weights.before_layers():
        upstream = runner.store.gradient(0)
        for chunk, data in runner.transfers.read(step.order, {"g": upstream.rows}):
            runner.draws.seed(step, 0, chunk)
            with torch.enable_grad(), step.autocast():
                hidden = runner.stem.embed(step.part(chunk))[0]
            total.add(torch.autograd.grad(hidden, parameters, upstream.decode(data["g"]), allow_unused=True))
        return runner.weights.take(parameters, total.result())


def head(
    runner: Runner, step: Step, parameters: Sequence[nn.Parameter], descend: bool, chunks: Sequence[Chunk] | None = None
) -> tuple[Tensor, list[Tensor | None]]:
    """Sum of the token losses (fp32 scalar), and its gradients; that of the last boundary goes to its place if `descend`."""
    live, descent = runner.store.live, runner.store.gradient(len(runner.layers))
    loss, total = torch.zeros((), device=runner.device), GradientSum(parameters)
    with runner.as_in(step), runner.weights.after_layers():
        for chunk, data in runner.transfers.read(step.order if chunks is None else chunks, {"h": live.rows}):
            hidden = live.decode(data["h"]).detach().requires_grad_(descend)
            if not step.scored[chunk.index]:
                gradient = torch.zeros_like(hidden)
            else:
                with torch.set_grad_enabled(step.trains), step.autocast():
                    part = runner.stem.loss(step.part(chunk), hidden, step.labels[chunk.start : chunk.stop], step.label_smoothing)
                loss += part.detach()
                if not step.trains:
                    continue
                found = torch.autograd.grad(part, [*([hidden] if descend else []), *parameters], allow_unused=True)
                total.add(found[1:] if descend else found)
                gradient = found[0]
                # The head's is as large as the head, and the next chunk's would be made beside it.
                del found, part
            if descend:
                descent.write(runner.transfers, chunk, gradient)
            del gradient
    return loss, total.result()


def head_backward(runner: Runner, step: Step, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    """What autograd hands on of the gradients that the head has made."""
    if not gradients:
        return []
    with runner.weights.after_layers():
        return runner.weights.take(runner.outer_parameters, gradients, runner.early_parameters if step.trains_embedding else ())
