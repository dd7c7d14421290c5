"""How the gradients of ranks become one, and who takes a step with them.

What training passes go through says it: a bare model has nobody to exchange with, DDP exchanges in a step's last backward, and what
divides gradients among ranks (elite/distributed/zero.py) in each.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from elite.distributed.ranks import Ranks
from elite.model import LoadedModel, TrainedCopy, copy_trained, export, load_trained, take_part
from elite.optimizations.functions.divided import clip_grad_norm_, state_parts, whole

Item = TypeVar("Item")
State = dict[str, Any]
"""Of an optimizer, as torch's own `state_dict` has it: of whole parameters, whoever holds which part of them."""


class GradientExchange:
    """What a step does that depends on where gradients, weights and the optimizer's state lie; this one is of a rank alone.

    All ranks call everything alike.
    """

    in_every_pass = False
    """Ranks wait for each other in every pass; otherwise in a step's last backward alone."""
    divides_weights = False
    """A rank has a part of the weights alone: passes need all ranks, those of validation too."""

    def dealt(self, items: Sequence[Item], ranks: Ranks) -> Iterator[tuple[Item, bool]]:
        """This rank's, one pass each, and whether it counts: where a pass takes all ranks, one that is done goes over another's again."""
        rest = -len(items) % ranks.world if self.divides_weights else 0
        for place in range(ranks.rank, len(items) + rest, ranks.world):
            yield items[place % len(items)], place < len(items)

    def adding(self) -> AbstractContextManager[Any]:
        """Within are the passes of a step but its last backward."""
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """The backward of one of those passes."""
        with in_this_thread():
            loss.backward()

    def last_backward(self, loss: Tensor) -> None:
        """After it gradients are those of the global batch, the mean of the ranks' own."""
        self.backward(loss)

    def unscale(self, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
        """Take back from whole gradients what the scaler multiplied losses by."""
        scaler.unscale_(optimizer)

    def clipped(self, parameters: Iterable[nn.Parameter], most: float) -> float:
        """L2 norm of the whole gradient, before it is scaled down to `most`."""
        return float(clip_grad_norm_(list(parameters), most))

    def update(self, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
        """The optimizer's step; gradients are gone after it."""
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    def drop(self, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
        """Let go of gradients without a step."""
        # Makes the scaler ready for the next ones; the scale stays.
        scaler.update(scaler.get_scale())
        optimizer.zero_grad(set_to_none=True)

    def optimizer_state(self, optimizer: torch.optim.Optimizer, keep: bool) -> State:
        """What a checkpoint keeps; empty where nothing is to be kept.

        Args:
            keep: this rank writes it.
        """
        # Parts of divided layers are gathered by all ranks.
        state: State = whole(optimizer.state_dict())
        return state if keep else {}

    def load_optimizer_state(self, optimizer: torch.optim.Optimizer, state: State) -> None:
        """Go on from what `optimizer_state` returned, possibly on other ranks or without them."""
        optimizer.load_state_dict(state_parts(state, optimizer))

    def copied(self, loaded: LoadedModel) -> TrainedCopy:
        """What is trained, whole; the other ranks take part in it (`take_part`)."""
        return copy_trained(loaded)

    def take_part(self, loaded: LoadedModel) -> None:
        """While another rank copies what is trained."""
        if loaded.divided:
            take_part(loaded)

    def result(self, loaded: LoadedModel) -> Callable[[Path], None]:
        """Writes the run's result in the library's own format; the other ranks take part."""
        return partial(export, loaded)

    def close(self) -> None:
        """After the last step: nothing is trained any more."""

    def load(self, loaded: LoadedModel, folder: Path) -> None:
        """Read what `copy` saved."""
        load_trained(loaded, folder)


class DataParallel(GradientExchange):
    """DDP: gradients are exchanged once, in the last backward. Until then it knows of none: a forward pass that it has prepared one for
    cannot be abandoned."""

    def __init__(self, model: DistributedDataParallel) -> None:
        self._model = model

    def adding(self) -> AbstractContextManager[Any]:
        return self._model.no_sync()

    def last_backward(self, loss: Tensor) -> None:
        # What it does itself at the end of a forward pass outside `no_sync`.
        self._model.reducer.prepare_for_backward([])
        self.backward(loss)


@contextmanager
def in_this_thread() -> Iterator[None]:
    """A backward within runs in the thread that asks for it. A GPU's own thread would have to wait for Python's lock at each of the many
    functions that are Python's, and one rank has one device to keep busy.

    What a failed one had still to do would wait in this thread's queue, and its tensors on the device, until the next backward clears it:
    a step that is done again would have less memory than the first.
    """
    with torch.autograd.set_multithreading_enabled(False):
        try:
            yield
        except BaseException:
            empty_queue()
            raise


def empty_queue() -> None:
    """Let go of what a failed backward of this thread had still to do."""
    with torch.autograd.set_multithreading_enabled(False):
        one = torch.zeros((), requires_grad=True)
        torch.autograd.grad(one + one, one)


def gradient_exchange(model: nn.Module) -> GradientExchange:
    """Of passes through `model`."""
    if isinstance(model, GradientExchange):
        return model
    return DataParallel(model) if isinstance(model, DistributedDataParallel) else GradientExchange()
