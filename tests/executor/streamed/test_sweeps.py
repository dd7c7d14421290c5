"""The order of a step, carried out with real rows and real copies, but with numbers in the place of hidden states.

A boundary's rows hold the number of their layer, gradients its negative. So whatever is read before it was written shows, also where
copies run ahead of the computation.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby, pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from elite.chunks import Chunk, cut
from elite.executor.streamed.attention import Phase
from elite.executor.streamed.rows import Allocator
from elite.executor.streamed.store import Boundary, Store
from elite.executor.streamed.sweeps import Sweep, backward_sweeps, forward_sweep
from elite.executor.streamed.transfers import Fields, Transfers
from elite.revolve import layer_forwards
from elite.streaming import BoundaryEncoding, Keep, Place, Streaming

CPU = torch.device("cpu")
SIZE = 4
DOCUMENTS = {
    "one chunk": [3],
    "one document": [11],
    "whole documents": [4, 3, 4, 2],
    "long first": [9, 4],
    "long last": [3, 4, 10],
    "mixed": [2, 9, 4, 4, 6],
    "all long": [5, 9],
}


class Dry:
    """A step without a model."""

    def __init__(self, layout: Streaming, layers: int, documents: Sequence[int], folder: Path | None = None) -> None:
        self.groups = cut(documents, SIZE)
        self.chunks = tuple(chunk for group in self.groups for chunk in group)
        self.layers = layers
        allocator = Allocator(CPU, folder)
        self.store = Store(layout, allocator, layers, sum(documents), 1, torch.float32)
        self.store.prepare()
        self.transfers = Transfers(CPU, SIZE, allocator.disk)
        self.done: list[Sweep] = []
        self.slots_used: set[int] = set()

    def number(self, layer: int, chunk: Chunk) -> Tensor:
        """What stands for a chunk's hidden states before `layer`."""
        return torch.full((chunk.length, 1), float(layer * 64 + chunk.index + 1))

    def run(self) -> None:
        """All sweeps of a step."""
        for chunk in self.chunks:
            self._write(self.store.sinks(0, trains=True), chunk, self.number(0, chunk))
        self._sweeps([forward_sweep(self.store, layer, self.groups, trains=True) for layer in range(self.layers)])
        for chunk, data in self.transfers.read(self.chunks, {"h": self.store.live.rows}):
            assert torch.equal(self.store.live.decode(data["h"]), self.number(self.layers, chunk))
            self.store.live.write(self.transfers, chunk, -self.number(self.layers, chunk))
        self._sweeps(
            [sweep for segment in reversed(range(self.store.segments)) for sweep in backward_sweeps(self.store, segment, self.groups)]
        )
        for chunk, data in self.transfers.read(self.chunks, {"g": self.store.live.rows}):
            assert torch.equal(self.store.live.decode(data["g"]), -self.number(0, chunk))

    def _sweeps(self, sweeps: list[Sweep]) -> None:
        for sweep, following in zip(sweeps, [*sweeps[1:], None], strict=True):
            then = None if following is None else (following.chunks, self._fields(following))
            for chunk, data in self.transfers.read(sweep.chunks, self._fields(sweep), then):
                hidden = sweep.source.decode(data["h"])
                assert torch.equal(hidden, self.number(sweep.layer, chunk)), f"{sweep.phase}, layer {sweep.layer}, chunk {chunk.index}"
                if sweep.phase is Phase.backward:
                    assert torch.equal(self.store.live.decode(data["g"]), -self.number(sweep.layer + 1, chunk))
                    self.store.live.write(self.transfers, chunk, -self.number(sweep.layer, chunk))
                elif sweep.phase is Phase.forward:
                    self._write(sweep.sinks, chunk, self.number(sweep.layer + 1, chunk))
            self.done.append(sweep)

    def _fields(self, sweep: Sweep) -> Fields:
        return {"h": sweep.source.rows, **({"g": self.store.live.rows} if sweep.phase is Phase.backward else {})}

    def _write(self, sinks: Sequence[Boundary], chunk: Chunk, value: Tensor) -> None:
        for sink in sinks:
            if sink.rows not in (self.store.live.rows, *([self.store.scratch.rows] if self.store.slots < self.layers else [])):
                self.slots_used.add(id(sink.rows))
            sink.write(self.transfers, chunk, value)

    def backward(self) -> list[tuple[int, Chunk]]:
        """Every layer and chunk that was passed back, in order."""
        return [(sweep.layer, chunk) for sweep in self.done if sweep.phase is Phase.backward for chunk in sweep.chunks]


def layouts() -> Iterator[tuple[Streaming, int]]:
    """Layouts and depths, shallow to deep."""
    base = Streaming(chunk=SIZE, boundaries=Place.host, keep=Keep.multilevel)
    for slots in range(1, 9):
        for layers in {1, 2, slots + 1, 3 * slots + 2, (7, 40)[slots > 2]}:
            yield replace(base, slots=slots), layers
    for layers in (1, 2, 5, 17, 40):
        yield replace(base, keep=Keep.sqrt), layers
        yield replace(base, keep=Keep.layers), layers


@pytest.mark.parametrize("documents", DOCUMENTS)
def test_every_boundary_is_there_when_it_is_read(documents: str) -> None:
    for layout, layers in layouts():
        dry = Dry(layout, layers, DOCUMENTS[documents])
        dry.run()
        assert len(dry.slots_used) <= dry.store.slots
        check_order(dry)


@pytest.mark.parametrize("place", [Place.device, Place.disk], ids=["device", "disk"])
@pytest.mark.parametrize("documents", DOCUMENTS)
def test_other_places(documents: str, place: Place, tmp_path: Path) -> None:
    dry = Dry(Streaming(chunk=SIZE, keep=Keep.multilevel, slots=2, boundaries=place), 6, DOCUMENTS[documents], tmp_path)
    dry.run()
    check_order(dry)


def test_all_depths() -> None:
    """Backward of each layer once, from the last to the first, at the cost that the plan reckons with."""
    for slots in range(1, 9):
        for layers in range(1, 41):
            dry = Dry(Streaming(chunk=SIZE, boundaries=Place.device, keep=Keep.multilevel, slots=slots), layers, [1])
            sweeps = [forward_sweep(dry.store, layer, dry.groups, trains=True) for layer in range(layers)]
            sweeps += [s for segment in reversed(range(dry.store.segments)) for s in backward_sweeps(dry.store, segment, dry.groups)]
            assert [s.layer for s in sweeps if s.phase is Phase.backward] == list(reversed(range(layers)))
            assert sum(s.phase is Phase.forward for s in sweeps) == layer_forwards(layers, dry.store.slots)


def check_order(dry: Dry) -> None:
    """Each layer and chunk once, layers from the last to the first, keys filled before they are needed, later chunks first."""
    visited = dry.backward()
    assert Counter(visited) == Counter((layer, chunk) for layer in range(dry.layers) for chunk in dry.chunks)
    assert [layer for layer, _ in groupby(layer for layer, _ in visited)] == list(reversed(range(dry.layers)))
    for before, sweep in pairwise(dry.done):
        if sweep.phase is Phase.backward and sweep.chunks[0].shares:
            assert [chunk.index for chunk in sweep.chunks] == sorted((chunk.index for chunk in sweep.chunks), reverse=True)
            assert (before.phase, before.layer, before.chunks) == (Phase.refill, sweep.layer, sweep.chunks[::-1])


def test_sqrt_recomputes_less_than_one_forward() -> None:
    for layers in range(1, 65):
        dry = Dry(Streaming(chunk=SIZE, boundaries=Place.device, keep=Keep.sqrt), layers, [1])
        dry.run()
        assert sum(sweep.phase is Phase.forward for sweep in dry.done) < 2 * layers


def test_encoded_boundaries_are_read_back_but_never_passed_on() -> None:
    """The first sweep goes on from exact values; what is kept is encoded."""
    layout = Streaming(chunk=SIZE, boundaries=Place.host, keep=Keep.multilevel, slots=2, encoding=BoundaryEncoding.int8)
    dry = Dry(layout, 6, [9, 4])
    sweeps = [forward_sweep(dry.store, layer, dry.groups, trains=True) for layer in range(6)]
    assert all(sweep.source.rows is dry.store.live.rows for sweep in sweeps)
    kept = [sweep.layer + 1 for sweep in sweeps if len(sweep.sinks) == 2]
    assert (0, *kept) == dry.store.kept
