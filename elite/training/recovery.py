"""Running out of memory and going on: the same step again, on the same data, in smaller passes.

What:   a step whose gradients are not whole yet has changed nothing. It gives back all that it holds, takes back what it drew from the
        random generators, and begins anew: first with what a hook has kept back (elite/training/ahead.py), then in smaller chunks
        (streamed executor), then with fewer rows in a pass. The loss is
        normalised over the label tokens of the whole window, so gradients are the same sums in another order.
        The smaller size stays for the rest of the run, also for a run that continues it.
Floor:  chunks of `CHUNK_FLOOR` tokens, one row in a pass. There the error goes on, and the run ends with planned against actual.
After:  once the optimizer is at work, parameters may be half updated, and a step may not be repeated: the run goes back to its last
        checkpoint, once for each step (`rewinds`). Validation and saving change nothing and are done again, once where nothing is smaller.
Ranks:  all must agree, or one would wait for gradients that never come. They do before the last backward of a step, in which gradients
        are exchanged; a rank that runs out of memory in that one, or after it, ends the run as it ends without this.

With dropout, masks are drawn anew for other sizes: the result is that of a run that had this size from the start.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import nn

from elite import checkpoint
from elite.chunks import ALIGNMENT
from elite.console import console
from elite.data.batches import Batch
from elite.distributed.gradients import gradient_exchange
from elite.distributed.ranks import Ranks
from elite.distributed.watchdog import Beat, no_beat
from elite.executor.contract import Executor
from elite.executor.streamed.runner import Runner
from elite.optimizations.hooks import Hook
from elite.training.heap import let_go
from elite.training.shortage import MemoryShortage, is_out_of_memory
from elite.training.step import begin, finish

CHUNK_FLOOR = 256
"""Query tokens. Smaller chunks save next to nothing, and matrix products of fewer rows leave a device idle."""

Result = TypeVar("Result")


@dataclass
class Recovery:
    """What a run does about memory that runs out.

    Args:
        parameters: all that is trained.
        runner: of the streamed executor; None under the whole one.
        beat: told what begins.
        hooks: what acts around steps; some of it keeps memory back.
        shrinks: False: sizes stay, for they are what is measured.
    """

    parameters: Sequence[nn.Parameter]
    ranks: Ranks
    runner: Runner | None = None
    beat: Beat = no_beat
    hooks: Sequence[Hook] = ()
    shrinks: bool = True
    count: int = 0
    """Times that memory ran out and the run went on."""
    pass_tokens: int | None = None
    """Most tokens in one pass, so that a curriculum's shorter rows may be more; None: micro-batches as they are dealt."""
    _rewound: set[int] = field(default_factory=set)
    _at_floor: bool = False

    def accumulate(
        self,
        executor: Executor,
        window: Sequence[Batch],
        scaler: torch.amp.GradScaler,
        ranks: Ranks,
        before: Callable[[], None] | None = None,
    ) -> float:
        """As `elite.training.step.accumulate`, in passes that fit.

        Args:
            before: done before each attempt.

        Raises:
            torch.OutOfMemoryError: or the like in a library's own words; nothing is smaller.
            MemoryShortage: it is so on another rank.
        """
        drawn = checkpoint.random_state()
        # Ranks that share a row, or divide layers or gradients, wait within a pass, where none can ask.
        waits = window[0].ranks > 1 or ranks.world < self.ranks.world or gradient_exchange(executor.model).in_every_pass
        while True:
            pending, refused, yielded = None, False, False
            if before is not None:
                before()
            try:
                with self._keeping_back(waits):
                    pending = begin(executor, self.parts(window), scaler, ranks, self.beat)
                    if ranks.world == 1:
                        return finish(pending, executor, scaler, ranks)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or waits:
                    raise
                refused, yielded = True, self._yielded()
                self._at_floor = not yielded and self._smaller(window[0]) is None
                if self._at_floor:
                    # The others are about to ask.
                    ranks.max(1.0)
                    raise
            # Asked by all ranks, also by one that knows the answer.
            anywhere = ranks.max(float(refused)) > 0
            if pending is not None and not anywhere:
                return finish(pending, executor, scaler, ranks)
            pending = None
            if yielded:
                self._free()
                self._say("out of memory within what the plan takes; the same step is done again with all that the device has")
            else:
                self._shrink(window[0])
            checkpoint.set_random_state(drawn)

    def again(self, action: Callable[[], Result], tokens: int = 0) -> Result:
        """Do something that changes nothing of the run; where memory runs out, once more, in ever smaller chunks as long as there are any.

        Args:
            tokens: of its longest pass; 0: it has none.
        """
        last = False
        while True:
            try:
                return action()
            except (RuntimeError, MemoryError) as error:
                if last or self.ranks.world > 1 or not is_out_of_memory(error):
                    raise
            chunk = self._smaller_chunk(tokens)
            last = chunk is None
            self._free(chunk)
            self._say(f"out of memory; done again{'' if last else f' in chunks of {chunk:,} tokens'}")

    def rewinds(self, error: BaseException, step: int) -> bool:
        """Whether this error, in the given step, is memory that ran out where going back to the last checkpoint may help."""
        possible = self.ranks.world == 1 and not self._at_floor and step not in self._rewound and is_out_of_memory(error)
        if possible:
            self._rewound.add(step)
        return possible

    def rewind(self, step: int, to: str) -> None:
        """Make room for going back to a checkpoint. Whoever calls must have let go of the error: its frames hold the step's tensors.

        Args:
            to: the checkpoint's name.
        """
        self._free()
        self._say(f"out of memory in step {step}, when its gradients were whole already; back to {to}")

    def parts(self, window: Sequence[Batch]) -> list[Batch]:
        """A window in passes of at most `pass_tokens`, one row at least."""
        return [part for batch in window for part in split(batch, self.rows(batch.input_ids.shape[1], len(batch.input_ids)))]

    @property
    def chunk(self) -> int | None:
        """Query tokens at once under the streamed executor, at present."""
        return self.runner.layout.chunk if self.runner is not None else None

    def rows(self, context: int, dealt: int) -> int:
        """Rows of `context` tokens in one pass at present, where `dealt` make a micro-batch."""
        return dealt if self.pass_tokens is None else max(1, min(dealt, self.pass_tokens // context))

    def metrics(self, batch: Batch) -> dict[str, float]:
        """What the line of a step whose micro-batches are like this one says besides, once something has happened."""
        if not self.count:
            return {}
        rows, context = batch.input_ids.shape
        found: dict[str, float] = {"oom_recoveries": self.count, "micro_batch": self.rows(context, rows)}
        return found if self.chunk is None else found | {"chunk": self.chunk}

    def summary(self, context: int, dealt: int) -> dict[str, int | None]:
        """What a run's summary says: how often memory ran out, and the sizes that the run has come to."""
        return {"oom_recoveries": self.count, "micro_batch": self.rows(context, dealt), "chunk": self.chunk}

    def state(self) -> dict[str, int | None]:
        """What a checkpoint keeps."""
        return {"count": self.count, "pass_tokens": self.pass_tokens, "chunk": self.chunk}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on at least as small as the run was, also where it goes back to a checkpoint from before it became so."""
        self.count = max(self.count, state["count"])
        sizes = [size for size in (self.pass_tokens, state["pass_tokens"]) if size is not None]
        self.pass_tokens = min(sizes) if sizes else None
        if self.runner is not None and state["chunk"] is not None and state["chunk"] < self.runner.layout.chunk:
            self.runner.release(replace(self.runner.layout, chunk=state["chunk"]))

    @contextmanager
    def _keeping_back(self, waits: bool) -> Iterator[None]:
        """Within, hooks may keep memory back: where one process alone can do again what fails for it."""
        with ExitStack() as stack:
            for hook in self.hooks if self.ranks.world == 1 and not waits else ():
                stack.enter_context(hook.accumulating())
            yield

    def _yielded(self) -> bool:
        """Whether any of them gives up what it has kept back."""
        return self.ranks.world == 1 and sum(hook.yields() for hook in self.hooks) > 0

    def _smaller_chunk(self, tokens: int) -> int | None:
        """Half of what a pass over so many tokens takes at once; None at the floor."""
        at_once = min(self.runner.layout.chunk, tokens) if self.runner is not None else 0
        return max(CHUNK_FLOOR, at_once // 2 // ALIGNMENT * ALIGNMENT) if at_once > CHUNK_FLOOR else None

    def _smaller(self, batch: Batch) -> tuple[int | None, int | None] | None:
        """Chunk and tokens of a pass, of which one is smaller than now; None at the floor."""
        if not self.shrinks:
            return None
        dealt, context = batch.input_ids.shape
        rows = self.rows(context, dealt)
        chunk = self._smaller_chunk(rows * context)
        if chunk is not None:
            return chunk, self.pass_tokens
        return (None, rows // 2 * context) if rows > 1 else None

    def _shrink(self, batch: Batch) -> None:
        smaller = self._smaller(batch)
        if smaller is None:
            raise MemoryShortage("another rank ran out of memory in this step, and nothing is smaller", "as that rank says")
        chunk, self.pass_tokens = smaller
        self._free(chunk)
        rows, context = batch.input_ids.shape
        of = (
            f"{self.rows(context, rows)} of {rows} rows"
            if self.chunk is None
            else f"chunks of {self.chunk:,} tokens, {self.rows(context, rows)} rows"
        )
        self._say(f"out of memory; the same step is done again with {of} in a pass, and so are those after it")

    def _free(self, chunk: int | None = None) -> None:
        """Give back everything that belongs to a step; a streamed model goes on in chunks of this many tokens."""
        for parameter in self.parameters:
            parameter.grad = None
        let_go()
        if self.ranks.device.type == "cuda":
            # What is still being copied must not be handed to others.
            torch.cuda.synchronize(self.ranks.device)
        if self.runner is not None:
            self.runner.release(self.runner.layout if chunk is None else replace(self.runner.layout, chunk=chunk))
        if self.ranks.device.type == "cuda":
            torch.cuda.empty_cache()

    def _say(self, words: str) -> None:
        self.count += 1
        if self.ranks.is_main:
            console.print(words, markup=False)


def split(batch: Batch, rows: int) -> list[Batch]:
    """A batch in parts of at most so many rows."""
    cuts = [slice(first, first + rows) for first in range(0, len(batch.input_ids), rows)]
    return [Batch(batch.input_ids[cut], batch.labels[cut], batch.position_ids[cut], batch.documents[cut], batch.ranks) for cut in cuts]
