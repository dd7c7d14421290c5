"""Memory that runs out in the midst of training: the same step again, in smaller passes, with the same result."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from elite import checkpoint
from elite.config import DataConfig
from elite.data.batches import Batch, TrainStream, random_batch
from elite.distributed.ranks import Ranks
from elite.executor.streamed.attach import attach
from elite.executor.streamed.executor import StreamedExecutor
from elite.optimizations.hooks import Hook
from elite.streaming import Keep, Place, Streaming
from elite.training.loop import Trainer
from elite.training.recovery import CHUNK_FLOOR, Recovery, split
from elite.training.step import accumulate, make_scaler
from tests.executor.streamed.exactness import uneven
from tests.training.rig import ALONE, CONTEXT, SEED, TRAINING, VOCAB, Record, corpus, every, fitted, rig, weights

OFTEN = every(replace(TRAINING, checkpoint_every=2), 3)


class Refusal(TorchDispatchMode):
    """Refuses one operation, as a full device refuses its result, and lets the next ones pass.

    Args:
        after: so many operations are carried out before it.
    """

    def __init__(self, after: int) -> None:
        super().__init__()
        self.left = after

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= 1
        if self.left == -1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.50 GiB.")
        return func(*args, **(kwargs or {}))


def refusing(call: Callable[..., Any], at: int, after: int) -> Callable[..., Any]:
    """`call`, in whose call number `at` (from 1) memory runs out after so many operations; the others go well."""
    calls = 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls != at:
            return call(*args, **kwargs)
        refusal = Refusal(after)
        with refusal:
            result = call(*args, **kwargs)
        assert refusal.left < 0, "there are not so many operations"
        return result

    return wrapped


class Refuses:
    """An executor in whose passes memory runs out.

    Args:
        fits: told rows, tokens and the phase of a pass.
        phase: in which it runs out, `forward`, `loss` (after the last operation of the forward) or `backward`.
    """

    def __init__(self, executor: Any, phase: str, fits: Callable[[Tensor], bool]) -> None:
        self._executor, self._phase, self._fits = executor, phase, fits
        self.model, self.label_smoothing = executor.model, 0.0
        self.shapes: list[tuple[int, ...]] = []

    def loss_sum(self, batch: Batch, keep: Tensor | None = None) -> Tensor:
        self.shapes.append(tuple(batch.input_ids.shape))
        fits = self._fits(batch.input_ids)
        with Refusal(60) if not fits and self._phase == "forward" else nullcontext():
            loss: Tensor = self._executor.loss_sum(batch, keep)
        if not fits and self._phase == "loss":
            raise torch.OutOfMemoryError("CUDA out of memory")
        if not fits and self._phase == "backward":
            # Where the backward has come down to the model's first layer, gradients of the others are in place.
            first = next(p for p in self.model.parameters() if p.requires_grad)
            handles: list[Any] = []
            handles.append(first.register_hook(lambda gradient: _refuse(handles)))
        return loss


def _refuse(handles: list[Any]) -> None:
    handles[0].remove()
    raise torch.OutOfMemoryError("CUDA out of memory")


def dealt(folder: Path, rows: int, **settings: Any) -> Trainer:
    """A trainer whose steps are four sequences, in micro-batches of so many."""
    trainer = rig(folder, training=OFTEN, steps=4, **settings)
    trainer.accumulation = 4 // rows
    trainer.stream = TrainStream(corpus(folder), DataConfig(), CONTEXT, rows, SEED, packed=False)
    return trainer


def same(one: Trainer, two: Trainer) -> bool:
    return all(torch.equal(a, b) for a, b in zip(weights(one), weights(two), strict=True))


@pytest.mark.parametrize("phase", ["forward", "loss", "backward"])
def test_smaller_micro_batches_give_the_run_that_had_them_from_the_start(
    phase: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Dropout: the random numbers of the step that failed are drawn again.
    small = dealt(tmp_path / "small", 1, dropout=0.1)
    expected = fitted(small)
    large = dealt(tmp_path / "large", 4, dropout=0.1)
    executor = large.executor = Refuses(large.executor, phase, lambda ids: len(ids) < 2)
    found = fitted(large)
    assert executor.shapes[:3] == [(4, CONTEXT), (2, CONTEXT), (1, CONTEXT)] and set(executor.shapes[3:]) == {(1, CONTEXT)}
    assert [line["loss"] for line in found.steps] == [line["loss"] for line in expected.steps]
    assert [line["grad_norm"] for line in found.steps] == [line["grad_norm"] for line in expected.steps]
    assert same(small, large)
    assert all((line["oom_recoveries"], line["micro_batch"]) == (2, 1) for line in found.steps)
    assert not any("oom_recoveries" in line for line in expected.steps)
    assert capsys.readouterr().out.count("out of memory; the same step is done again") == 2


def test_later_on_the_result_is_that_of_the_undisturbed_run(tmp_path: Path) -> None:
    undisturbed, trainer = dealt(tmp_path / "undisturbed", 2), dealt(tmp_path / "trainer", 2)
    expected = fitted(undisturbed)
    calls = 0

    def fits(ids: Tensor) -> bool:
        nonlocal calls
        calls += 1
        return calls != 6  # in step 3

    trainer.executor = Refuses(trainer.executor, "backward", fits)
    found = fitted(trainer)
    assert [line.get("micro_batch") for line in found.steps] == [None, None, 1, 1]
    assert [line["loss"] for line in found.steps] == pytest.approx([line["loss"] for line in expected.steps], abs=1e-5)
    for one, two in zip(weights(trainer), weights(undisturbed), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-5)


def test_at_the_floor_the_error_goes_on(tmp_path: Path) -> None:
    trainer = dealt(tmp_path, 4)
    executor = trainer.executor = Refuses(trainer.executor, "forward", lambda ids: False)
    with pytest.raises(torch.OutOfMemoryError):
        trainer.fit()
    assert [rows for rows, _ in executor.shapes] == [4, 2, 1] and trainer.recovery.count == 2


def test_a_run_that_continues_begins_as_small(tmp_path: Path) -> None:
    first = dealt(tmp_path, 4)
    first.steps = 2
    first.executor = Refuses(first.executor, "forward", lambda ids: len(ids) < 4)
    fitted(first)
    second = dealt(tmp_path, 4)
    executor = second.executor = Refuses(second.executor, "forward", lambda ids: len(ids) < 4)
    second.resume(checkpoint.require_latest(second.checkpoints))
    fitted(second)
    assert {rows for rows, _ in executor.shapes} == {2} and second.recovery.count == 1


@pytest.mark.parametrize("after", [0, 40])
def test_in_the_optimizer_the_run_goes_back_to_its_checkpoint(
    after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    undisturbed = dealt(tmp_path / "undisturbed", 2, dropout=0.1)
    expected = fitted(undisturbed)
    trainer = dealt(tmp_path / "trainer", 2, dropout=0.1)
    optimizer: Any = trainer.optimizer
    # Step 4; the checkpoint is of step 2. AdamW goes over parameters one group of operations after another.
    monkeypatch.setattr(optimizer, "step", refusing(optimizer.step, 4, after))
    found = fitted(trainer)
    assert [line["step"] for line in found.steps] == [1, 2, 3, 3, 4]
    assert [line["loss"] for line in found.steps[3:]] == [line["loss"] for line in expected.steps[2:]]
    assert same(trainer, undisturbed)
    assert "out of memory in step 4" in capsys.readouterr().out and found.steps[-1]["oom_recoveries"] == 1


def test_in_the_optimizer_for_ever_or_without_a_checkpoint_the_error_goes_on(tmp_path: Path) -> None:
    for name, first_bad, steps in (("for ever", 4, [1, 2, 3, 3]), ("without", 1, [])):
        trainer = dealt(tmp_path / name, 2)
        optimizer: Any = trainer.optimizer
        step, calls = optimizer.step, 0

        def refused(*args: Any, step: Any = step, first_bad: int = first_bad) -> Any:
            nonlocal calls
            calls += 1
            # After the rewind come step 3, which goes well, and step 4 again.
            if calls == first_bad or calls == first_bad + 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return step(*args)

        optimizer.step, record = refused, Record()
        trainer.observers = (record,)
        with pytest.raises(torch.OutOfMemoryError):
            trainer.fit()
        assert [line["step"] for line in record.steps] == steps


def test_validation_and_saving_are_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    undisturbed = dealt(tmp_path / "undisturbed", 2, dropout=0.1)
    expected = fitted(undisturbed)
    trainer = dealt(tmp_path / "trainer", 2, dropout=0.1)
    executor: Any = trainer.validator.executor
    executor.loss_sum = refusing(executor.loss_sum, 11, 60)
    monkeypatch.setattr(checkpoint, "snapshot", refusing(checkpoint.snapshot, 2, 3))
    found = fitted(trainer)
    assert trainer.recovery.count == 2 and trainer.loaded.model.training
    assert [line["val_loss"] for line in found.validations] == [line["val_loss"] for line in expected.validations]
    assert same(trainer, undisturbed) and checkpoint.latest(trainer.checkpoints) is not None


def test_what_is_not_memory_is_not_repeated(tmp_path: Path) -> None:
    trainer = dealt(tmp_path, 2)

    def broken(batch: Batch, keep: Tensor | None = None) -> Tensor:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    trainer.executor.loss_sum = broken  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="mat1"):
        trainer.fit()
    assert trainer.recovery.count == 0


LONG = 4 * CHUNK_FLOOR


class RefusesAt:
    """Makes a streamed layer run out of memory in its call number `at`, in chunks longer than `most`."""

    def __init__(self, layer: nn.Module, most: int, at: int) -> None:
        self.lengths: list[int] = []
        self._most, self._at, self._long = most, at, 0
        layer.register_forward_pre_hook(self._called)

    def _called(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        length = inputs[0].shape[1]
        self.lengths.append(length)
        self._long += length > self._most
        if length > self._most and self._long >= self._at:
            raise torch.OutOfMemoryError("CUDA out of memory")


LAYOUTS = {
    "layers": Streaming(chunk=4096, block=300),
    "attention": Streaming(chunk=LONG, block=300, keep=Keep.attention),
    "multilevel": Streaming(chunk=LONG, block=300, keep=Keep.multilevel, slots=1, boundaries=Place.disk),
}


@pytest.mark.parametrize(
    ("name", "at"),
    [("layers", 1), ("layers", 2), ("attention", 2), ("multilevel", 2)],
    ids=["forward", "backward", "backward with outputs kept", "recomputation"],
)
def test_a_streamed_step_goes_on_in_smaller_chunks(name: str, at: int, tmp_path: Path) -> None:
    layout = replace(LAYOUTS[name], folder=str(tmp_path))
    window = [random_batch(1, LONG, VOCAB, torch.Generator().manual_seed(i), tail=50) for i in range(2)]
    sums = []
    for disturbed in (False, True):
        model = uneven("llama")
        attached = attach(model, layout if disturbed else replace(layout, chunk=CHUNK_FLOOR))
        recovery = Recovery(list(model.parameters()), ALONE, attached.runner)
        seen = RefusesAt(attached.runner.layers[1], CHUNK_FLOOR, at) if disturbed else None
        scaler = make_scaler(ALONE.device, torch.float32)
        loss = (recovery.accumulate if disturbed else accumulate)(StreamedExecutor(model, torch.float32), window, scaler, ALONE)
        sums.append((loss, [parameter.grad for parameter in model.parameters()]))
        if seen is not None:
            assert recovery.chunk == CHUNK_FLOOR and recovery.count == 2
            assert max(seen.lengths) > CHUNK_FLOOR and seen.lengths[-1] <= CHUNK_FLOOR
        attached.undo()
    (loss, gradients), (again, found) = sums
    assert loss == again and all(
        one is not None and two is not None and torch.equal(one, two) for one, two in zip(gradients, found, strict=True)
    )


def test_a_streamed_pass_at_its_floor_gives_up_rows_and_then_the_error_goes_on() -> None:
    model = uneven("llama")
    attached = attach(model, Streaming(chunk=CHUNK_FLOOR))
    recovery = Recovery(list(model.parameters()), ALONE, attached.runner)
    executor = Refuses(StreamedExecutor(model, torch.float32), "loss", lambda ids: False)
    with pytest.raises(torch.OutOfMemoryError):
        recovery.accumulate(executor, [random_batch(3, 100, VOCAB)], make_scaler(ALONE.device, torch.float32), ALONE)
    # 300 tokens are more than a chunk holds, 100 are not.
    assert [rows for rows, _ in executor.shapes] == [3, 1] and recovery.chunk == CHUNK_FLOOR


def test_a_smaller_pass_is_counted_in_tokens() -> None:
    recovery = Recovery([], ALONE, pass_tokens=200)
    rows = [(recovery.rows(context, 8)) for context in (25, 50, 100, 300)]
    assert rows == [8, 4, 2, 1], "a curriculum's shorter rows may be more"
    batch = random_batch(5, 50, VOCAB, tail=8)
    parts = split(batch, 2)
    assert [part.documents for part in parts] == [batch.documents[:2], batch.documents[2:4], batch.documents[4:]]
    assert (
        torch.equal(torch.cat([part.labels for part in parts]), batch.labels) and sum(p.label_tokens for p in parts) == batch.label_tokens
    )


def test_going_back_to_an_earlier_checkpoint_does_not_make_it_larger_again() -> None:
    recovery = Recovery([], ALONE, pass_tokens=100, count=2)
    recovery.load_state({"count": 0, "pass_tokens": None, "chunk": None})
    assert (recovery.pass_tokens, recovery.count) == (100, 2)
    recovery.load_state({"count": 3, "pass_tokens": 50, "chunk": None})
    assert (recovery.pass_tokens, recovery.count) == (50, 3)


def test_what_a_failed_pass_held_is_given_back_before_the_next() -> None:
    model = uneven("llama")
    attached = attach(model, Streaming(chunk=LONG))
    recovery, executor = Recovery(list(model.parameters()), ALONE, attached.runner), StreamedExecutor(model, torch.float32)
    batch, held = random_batch(1, LONG, VOCAB), list[weakref.ref[Tensor]]()

    def action() -> str:
        if held:
            # At the second call nothing of the first is there, though its error held every tensor of it.
            assert all(reference() is None for reference in held) and attached.runner.host_bytes() == 0
            assert attached.runner.current is None and all(parameter.grad is None for parameter in model.parameters())
            return "done"
        loss = executor.loss_sum(batch)
        loss.backward()
        held.extend(weakref.ref(tensor) for tensor in (loss, attached.runner.store.live.rows.storage))
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert recovery.again(action, LONG) == "done" and recovery.chunk == LONG // 2


class KeepsBack(Hook):
    """Keeps memory back, until it is asked to yield."""

    name = "keeps_back"

    def __init__(self) -> None:
        self.keeps, self.within, self.entered = True, False, 0

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        self.within, self.entered = self.keeps, self.entered + 1
        yield
        self.within = False

    def yields(self) -> bool:
        kept, self.keeps, self.within = self.keeps, False, False
        return kept


@pytest.mark.parametrize("phase", ["forward", "loss", "backward"])
def test_what_a_hook_keeps_back_is_given_up_before_a_pass_becomes_smaller(phase: str) -> None:
    window, found = [random_batch(3, 40, VOCAB, torch.Generator().manual_seed(i), tail=9) for i in range(2)], []
    for disturbed in (False, True):
        model, hook = uneven("llama"), KeepsBack()
        whole = StreamedExecutor(model, torch.float32)
        executor = Refuses(whole, phase, lambda ids, hook=hook: not hook.within)  # type: ignore[misc]
        attached = attach(model, Streaming(chunk=LONG))
        recovery = Recovery(list(model.parameters()), ALONE, attached.runner, hooks=[hook] if disturbed else [])
        loss = recovery.accumulate(executor, window, make_scaler(ALONE.device, torch.float32), ALONE)
        found.append((loss, [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]))
        if disturbed:
            assert recovery.count == 1 and hook.entered == 2 and recovery.chunk == LONG and recovery.pass_tokens is None
            assert {shape[0] for shape in executor.shapes} == {3}
            recovery.accumulate(executor, window, make_scaler(ALONE.device, torch.float32), ALONE)
            assert recovery.count == 1 and hook.entered == 3
        attached.undo()
    assert found[0][0] == found[1][0] and len(found[0][1]) > 0
    assert all(torch.equal(one, two) for one, two in zip(found[0][1], found[1][1], strict=True))


def test_nothing_is_kept_back_where_other_processes_wait() -> None:
    model, hook = uneven("llama"), KeepsBack()
    several, window = Ranks(0, 2, ALONE.device), [random_batch(1, 40, VOCAB)]
    recovery = Recovery(list(model.parameters()), several, hooks=[hook])
    executor = Refuses(StreamedExecutor(model, torch.float32), "loss", lambda ids: False)
    with pytest.raises(torch.OutOfMemoryError):
        recovery.accumulate(executor, window, make_scaler(ALONE.device, torch.float32), ALONE)
    assert hook.entered == 0 and hook.keeps


def test_sizes_that_are_measured_stay() -> None:
    model = uneven("llama")
    attached = attach(model, Streaming(chunk=LONG))
    recovery = Recovery(list(model.parameters()), ALONE, attached.runner, shrinks=False)
    executor = Refuses(StreamedExecutor(model, torch.float32), "loss", lambda ids: False)
    with pytest.raises(torch.OutOfMemoryError):
        recovery.accumulate(executor, [random_batch(3, LONG, VOCAB)], make_scaler(ALONE.device, torch.float32), ALONE)
    assert recovery.count == 0 and recovery.chunk == LONG and [rows for rows, _ in executor.shapes] == [3]
    attached.undo()
