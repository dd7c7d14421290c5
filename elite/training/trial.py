"""A forward and backward pass on random tokens that leaves no trace: what it takes, before a run depends on it."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from elite import checkpoint
from elite.data.batches import random_batch
from elite.distributed.exchange import Exchange
from elite.distributed.gradients import in_this_thread
from elite.executor.contract import Executor
from elite.training.heap import let_go
from elite.training.live_bytes import LiveBytes
from elite.training.shortage import is_out_of_memory

TAIL = 8
"""Tokens of a second document, at the end of the last row: attention works row by row and copies as soon as one row has two."""


@dataclass(frozen=True)
class Subject:
    """What is tried."""

    executor: Executor
    """Around the bare model: under DDP a rank that runs out of memory would leave the others waiting."""
    compute_dtype: torch.dtype
    """Of matrix products; float32 runs without autocast."""
    trainable: Sequence[nn.Parameter]
    vocab: int
    """Ids are drawn below it."""
    context: int
    """Of whole rows, also where ranks share them: one alone is tried with its part."""
    device: torch.device
    limit_bytes: float
    """More tensors at once than this do not fit."""
    held_bytes: float
    """What a later step holds besides, set aside during the trial: the optimizer's state, DDP's copy of the gradients."""
    sharing: Exchange | None = None
    """Ranks that share each sequence: none is waited for. Unset: this one has its own."""


@dataclass(frozen=True)
class Trial:
    """What one pass took. Bytes of tensors, on the device; reserved is the allocator's hold on it, 0 on a CPU."""

    sequences: int
    resident_bytes: float
    """Before the pass: weights, and what is set aside."""
    peak_bytes: float
    """With the resident ones; where memory ran out, what there was just before."""
    reserved_bytes: float
    seconds: float
    out_of_memory: bool

    def fits(self, limit_bytes: float) -> bool:
        """Whether it went well and stayed under the limit."""
        return not self.out_of_memory and self.peak_bytes <= limit_bytes


def one_pass(subject: Subject, sequences: int) -> Callable[[], None]:
    """A forward and backward pass over `sequences` rows of random tokens."""
    # Its own generator: what is drawn from torch's would be missing later.
    generator = torch.Generator().manual_seed(sequences)
    batch = random_batch(sequences, subject.context, subject.vocab, generator, tail=TAIL)
    if subject.sharing is not None:
        batch = batch.shared(subject.sharing.rank, subject.sharing.ranks)

    def run() -> None:
        loss = subject.executor.loss_sum(batch.to(subject.device)) / batch.label_tokens
        with in_this_thread():
            loss.backward()

    return run


def attempt(subject: Subject, sequences: int, run: Callable[[], object], gradients: bool) -> Trial:
    """Run and measure; running out of memory is a result.

    Random states, gradients and peak statistics are afterwards as before, and what was cached is given back.

    Args:
        sequences: that `run` carries.
        gradients: whether they exist before the pass, as from the second micro-batch of a step on.
    """
    with _settled(subject.device), _untouched(subject):
        return (_on_gpu if subject.device.type == "cuda" else _on_cpu)(subject, sequences, run, gradients)


def rehearse(subject: Subject, sequences: int) -> float:
    """Carry a pass over random tokens through, as a step's first; its seconds. Random states and gradients are afterwards as before."""
    run = one_pass(subject, sequences)
    with _untouched(subject):
        began = time.perf_counter()
        for parameter in subject.trainable:
            parameter.grad = None
        run()
        if subject.device.type == "cuda":
            torch.cuda.synchronize(subject.device)
        return time.perf_counter() - began


@contextmanager
def _untouched(subject: Subject) -> Iterator[None]:
    before = checkpoint.random_state()
    gradients = [parameter.grad for parameter in subject.trainable]
    try:
        with nullcontext() if subject.sharing is None else subject.sharing.rehearsing():
            yield
    finally:
        for parameter, gradient in zip(subject.trainable, gradients, strict=True):
            parameter.grad = gradient
        checkpoint.set_random_state(before)


@contextmanager
def _settled(device: torch.device) -> Iterator[None]:
    try:
        yield
    finally:
        _settle(device)


def _settle(device: torch.device) -> None:
    """Give back everything that nothing refers to."""
    let_go()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _finishes(run: Callable[[], object], subject: Subject, gradients: bool) -> bool:
    """Whether it ends before memory does."""
    try:
        for parameter in subject.trainable:
            parameter.grad = torch.zeros_like(parameter) if gradients else None
        run()
        if subject.device.type == "cuda":
            torch.cuda.synchronize(subject.device)
    except (RuntimeError, MemoryError) as error:
        # Nothing of it is kept: its frames hold the tensors of the failed pass.
        if not is_out_of_memory(error):
            raise
        return False
    return True


def _on_gpu(subject: Subject, sequences: int, run: Callable[[], object], gradients: bool) -> Trial:
    device = subject.device
    _settle(device)
    held, resident = None, torch.cuda.memory_allocated(device) + subject.held_bytes
    began = time.perf_counter()
    try:
        held = torch.empty(int(subject.held_bytes), dtype=torch.uint8, device=device)
        done = _finishes(run, subject, gradients)
    except torch.OutOfMemoryError:
        done = False
    seconds = time.perf_counter() - began
    peak, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    del held
    return Trial(sequences, resident, peak, reserved, seconds, not done)


def _on_cpu(subject: Subject, sequences: int, run: Callable[[], object], gradients: bool) -> Trial:
    """The bytes of all tensors alive at once; beyond the limit an operation is refused as on a full device, so the machine never is."""
    model = subject.executor.model
    there = {t.untyped_storage()._cdata: t for t in [*model.parameters(), *model.buffers()]}
    resident = sum(t.untyped_storage().nbytes() for t in there.values()) + subject.held_bytes
    live = LiveBytes(subject.limit_bytes - resident)
    live.ignore(there.values())
    began = time.perf_counter()
    with live:
        done = _finishes(run, subject, gradients)
    return Trial(sequences, resident, resident + live.peak, 0.0, time.perf_counter() - began, not done)
