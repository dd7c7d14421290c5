"""What a streamed step would take, measured without running all of it.

Everything is allocated as in the real step. Of each sweep, a few chunks at the beginning of the row and a few at its end are run for
real; a chunk's time is affine in the tokens before it, so the two ends give all chunks, and one layer gives all layers. Memory peaks
where the last chunk meets all keys, which is run.

The state that the chunks left out would have made (keys, kept outputs) is arbitrary here: times and memory do not depend on values.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from elite.chunks import Chunk
from elite.distributed.exchange import Exchange
from elite.executor.streamed import ends
from elite.executor.streamed.attention import Phase
from elite.executor.streamed.rounds import cut_rows
from elite.executor.streamed.runner import Runner
from elite.executor.streamed.step import GradientSum, Step, in_parts
from elite.executor.streamed.sweeps import Sweep, backward_sweeps, forward_sweep
from elite.revolve import layer_forwards
from elite.zigzag import share

CHUNKS = 3
"""Chunks that are run at each end."""


@dataclass(frozen=True)
class Estimate:
    """An extrapolated step. Seconds."""

    tokens: int
    chunks: int
    embed_s: float
    forward_s: float
    """The first sweep through all layers, and what is passed forward again between kept boundaries."""
    refill_s: float
    """Keys and values computed again; where ranks share the row, attention with them."""
    head_s: float
    backward_s: float
    """All layers' own recomputation and backward."""

    @property
    def step_s(self) -> float:
        """Forward and backward of one row."""
        return self.embed_s + self.forward_s + self.refill_s + self.head_s + self.backward_s


class Probe:
    """Runs and times parts of one step over a single document.

    Args:
        runner: of a model that `attach` made streamed.
        tokens: in the row.
        vocab: ids are drawn below it.
        sharing: ranks that hold parts of the row; this one's is tried.
    """

    def __init__(self, runner: Runner, tokens: int, vocab: int, sharing: Exchange | None = None) -> None:
        self._runner, self._cuda = runner, runner.device.type == "cuda"
        mine = tokens if sharing is None else share(tokens, sharing.rank, sharing.ranks)
        ids = torch.randint(vocab, (1, mine), device=runner.device)
        positions = torch.arange(mine, device=runner.device)[None]
        groups, shared = cut_rows(runner.layout, [[tokens]], mine, sharing)
        runner.find_trained()
        seed = 0 if runner.stem.training else None
        self._step = Step(ids, positions, ids[0].roll(-1), groups, trains=True, seed=seed, shared=shared)
        self._tokens = tokens

    def run(self) -> Estimate:
        """Allocate, run the ends, extrapolate."""
        runner, step, layers = self._runner, self._step, len(self._runner.layers)
        order = step.order
        embed = self._timed(lambda chunks: ends.embed(runner, step, chunks), order)
        ends.record_arguments(runner, step)
        forward = sum(map(self._sweep, in_parts(step, [forward_sweep(runner.store, 0, step.groups, trains=True)])))
        head = self._timed(lambda chunks: ends.head(runner, step, runner.outer_parameters, descend=True, chunks=chunks), order)
        step.upstream = torch.ones((), device=runner.device)
        runner.find_unread(step)
        last = in_parts(step, backward_sweeps(runner.store, len(runner.store.kept) - 1, step.groups))
        parts = {sweep.phase: sweep for sweep in last if sweep.layer == last[-1].layer}
        # Across ranks keys and values, and with them outputs, are computed again where those are not kept.
        again, descent = (Phase.refill, Phase.project), (Phase.backward, Phase.above, Phase.below)
        refill = sum(self._sweep(parts[phase]) for phase in again if phase in parts)
        backward = sum(self._sweep(parts[phase]) for phase in descent if phase in parts)
        return Estimate(
            tokens=self._tokens,
            chunks=len(order),
            embed_s=embed,
            forward_s=forward * layer_forwards(layers, runner.store.slots),
            refill_s=refill * layers,
            head_s=head,
            backward_s=backward * layers,
        )

    def _sweep(self, sweep: Sweep) -> float:
        """Seconds of one layer's whole sweep."""
        runner = self._runner
        totals = {sweep.layer: GradientSum(runner.layer_parameters[sweep.layer])}
        with torch.no_grad():
            return self._timed(lambda chunks: runner.run(self._step, [sweep.over(tuple(chunks))], None, totals), sweep.chunks)

    def _timed(self, run: Callable[[Sequence[Chunk]], object], chunks: Sequence[Chunk]) -> float:
        """Seconds that `run` takes over all `chunks`, from its time over a few at each end."""
        if len(chunks) <= 2 * CHUNKS:
            run(chunks)
            return self._seconds(run, chunks)
        ends = [self._per_chunk(run, part) for part in (chunks[:CHUNKS], chunks[-CHUNKS:])]
        (near, at_near), (far, at_far) = ends
        # More keys never take less time; where they seem to, they cost less than the clock tells apart.
        slope = max(0.0, far - near) / (at_far - at_near)
        return sum(near + slope * (chunk.offset - at_near) for chunk in chunks)

    def _per_chunk(self, run: Callable[[Sequence[Chunk]], object], chunks: Sequence[Chunk]) -> tuple[float, float]:
        """Seconds a chunk without what a run costs besides, and the mean of the tokens before those chunks."""
        run(chunks)
        whole = self._seconds(run, chunks)
        others = whole - self._seconds(run, chunks[:1])
        # A pause in the one alone must not make the others' time vanish.
        each = others / (len(chunks) - 1) if others > 0 else whole / len(chunks)
        return each, sum(chunk.offset for chunk in chunks[1:]) / (len(chunks) - 1)

    def _seconds(self, run: Callable[[Sequence[Chunk]], object], chunks: Sequence[Chunk]) -> float:
        self._synchronise()
        began = time.perf_counter()
        run(chunks)
        self._synchronise()
        return time.perf_counter() - began

    def _synchronise(self) -> None:
        if self._cuda:
            torch.cuda.synchronize(self._runner.device)
