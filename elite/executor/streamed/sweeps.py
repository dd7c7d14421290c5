"""The order of a step: which layer passes over which chunks, what it reads and what it writes. Plain values, nothing is computed."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from elite.chunks import Chunk, Group
from elite.executor.streamed.attention import Phase
from elite.executor.streamed.store import Boundary, Store
from elite.revolve import best_split


@dataclass(frozen=True)
class Sweep:
    """One layer over some chunks."""

    phase: Phase
    layer: int
    chunks: tuple[Chunk, ...]
    source: Boundary
    """Its input."""
    sinks: tuple[Boundary, ...] = ()
    """Where its output goes, in the phases `forward` and `finish`."""
    keeps: bool = False
    """Whether attention outputs are written (`forward`, `finish`) or read (`backward`, `above`)."""

    def over(self, chunks: tuple[Chunk, ...]) -> "Sweep":
        """The same over other chunks."""
        return replace(self, chunks=chunks)

    @property
    def document(self) -> tuple[int, int]:
        """Names the layer and the last document whose keys and values this leaves behind, or needs."""
        return self.layer, max(chunk.start - chunk.offset for chunk in self.chunks)


def in_order(groups: Sequence[Group]) -> tuple[Chunk, ...]:
    """All chunks, first to last."""
    return tuple(chunk for group in groups for chunk in group)


def forward_sweep(store: Store, layer: int, groups: Sequence[Group], trains: bool) -> Sweep:
    """The first sweep of one layer."""
    sinks = store.sinks(layer + 1, trains)
    return Sweep(Phase.forward, layer, in_order(groups), store.source(layer, trains), sinks, trains and store.keeps_outputs)


def across_ranks(sweeps: Iterable[Sweep]) -> Iterator[Sweep]:
    """The same layers of a sequence that ranks share: they meet after each `project`, and after each `above`."""
    for sweep in sweeps:
        if sweep.phase is Phase.forward:
            yield replace(sweep, phase=Phase.project, sinks=(), keeps=False)
            yield replace(sweep, phase=Phase.finish)
        else:
            # What the forward pass has not kept is attended again.
            if not sweep.keeps:
                yield replace(sweep, phase=Phase.project)
            yield replace(sweep, phase=Phase.above)
            yield replace(sweep, phase=Phase.below, keeps=False)


def backward_sweeps(store: Store, segment: int, groups: Sequence[Group]) -> list[Sweep]:
    """The backward of the layers between the kept boundary number `segment` and the next one."""
    layers = store.segment(segment)
    return list(_reverse(store, layers.start, layers.stop, store.slot(segment), segment + 1, groups))


def _reverse(store: Store, first: int, last: int, source: Boundary, slot: int, groups: Sequence[Group]) -> Iterator[Sweep]:
    """Backward of layers `first` … `last` − 1 from the boundary before `first`; slots from `slot` on are free."""
    if last - first == 1:
        yield from _layer_backward(store, first, source, groups)
    elif slot == store.slots:
        for layer in reversed(range(first, last)):
            yield from _advance(first, layer, source, store.scratch, store.scratch, groups)
            yield from _layer_backward(store, layer, source if layer == first else store.scratch, groups)
    else:
        middle = first + best_split(last - first, store.slots - slot)[1]
        yield from _advance(first, middle, source, store.scratch, store.slot(slot), groups)
        yield from _reverse(store, middle, last, store.slot(slot), slot + 1, groups)
        yield from _reverse(store, first, middle, source, slot, groups)


def _advance(first: int, last: int, source: Boundary, scratch: Boundary, target: Boundary, groups: Sequence[Group]) -> Iterator[Sweep]:
    """Layers `first` … `last` − 1 forward again, from `source` to `target`."""
    for layer in range(first, last):
        yield Sweep(
            Phase.forward,
            layer,
            in_order(groups),
            source if layer == first else scratch,
            (target if layer == last - 1 else scratch,),
        )


def _layer_backward(store: Store, layer: int, source: Boundary, groups: Sequence[Group]) -> Iterator[Sweep]:
    # Groups in order: the sweep before may still be writing this layer's input, first chunk to last, when the first chunks are read ahead.
    for shares, run in groupby(groups, key=lambda group: group[0].shares):
        if not shares:
            # Whole documents need no other chunk's keys.
            yield Sweep(Phase.backward, layer, tuple(chunk for group in run for chunk in group), source, (), store.keeps_outputs)
            continue
        for group in run:
            if not store.keeps_keys:
                yield Sweep(Phase.refill, layer, group, source)
            yield Sweep(Phase.backward, layer, tuple(reversed(group)), source, (), store.keeps_outputs)
