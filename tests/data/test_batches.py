"""Tensors that never cross a document, and a stream that ranks share and that resumes where it stopped."""

import pytest
import torch

from elite.config import DataConfig, FileOrder, Unit
from elite.data import IGNORE, Batch, TokenStore, TrainStream, collate
from elite.data.batches import random_batch
from elite.data.packing import length
from elite.errors import DataError

CONTEXT = 128


def stream(store: TokenStore, rank: int = 0, world: int = 1, micro_batch: int = 1, **data: object) -> TrainStream:
    cfg = DataConfig(unit=Unit.file, order=FileOrder.shuffled) if not data else DataConfig(**data)  # type: ignore[arg-type]
    return TrainStream(store, cfg, CONTEXT, micro_batch, seed=5, packed=True, rank=rank, world=world)


def same(one: Batch, other: Batch) -> bool:
    tensors = ((one.input_ids, other.input_ids), (one.labels, other.labels), (one.position_ids, other.position_ids))
    return one.documents == other.documents and all(torch.equal(a, b) for a, b in tensors)


def rows(batches: list[Batch]) -> list[tuple[int, ...]]:
    return [tuple(row.tolist()) for batch in batches for row in batch.input_ids]


def test_collate_by_hand(store: TokenStore) -> None:
    token = store.tokens.tolist()
    batch = collate(store, [(((0, 2), (5, 1)), ((9, 2),)), (((20, 7),),)], 7, pad_id=0)
    assert batch.input_ids.tolist() == [[token[0], token[1], token[5], token[9], token[10], 0, 0], token[20:27]]
    assert batch.labels.tolist() == [[token[1], token[5], IGNORE, token[10], IGNORE, IGNORE, IGNORE], [*token[21:27], IGNORE]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 0, 1], [0, 1, 2, 3, 4, 5, 6]]
    assert batch.documents == ((3, 2, 2), (7,)) and batch.label_tokens == 9
    assert batch.input_ids.dtype == batch.labels.dtype == batch.position_ids.dtype == torch.int64
    assert same(batch.to("cpu"), batch)


@pytest.mark.parametrize("unit", Unit)
@pytest.mark.parametrize("packed", [True, False])
def test_labels_and_positions_stay_within_documents(store: TokenStore, unit: Unit, packed: bool) -> None:
    training = TrainStream(store, DataConfig(unit=unit), CONTEXT, 2, seed=0, packed=packed)
    for batch in training.next_window(30):
        assert batch.input_ids.shape == batch.labels.shape == batch.position_ids.shape == (2, CONTEXT)
        for row, lengths in enumerate(batch.documents):
            assert sum(lengths) == CONTEXT and (packed or len(lengths) <= 2)
            start = 0
            for number, size in enumerate(lengths):
                labels, ids = (tensor[row, start : start + size].tolist() for tensor in (batch.labels, batch.input_ids))
                assert batch.position_ids[row, start : start + size].tolist() == list(range(size))
                padding = number == len(lengths) - 1 and set(labels) == {IGNORE}
                assert padding or labels == [*ids[1:], IGNORE]
                assert not padding or set(ids) == {store.end_token}
                if unit is Unit.file and not padding:
                    assert store.end_token not in ids[:-1]
                start += size


@pytest.mark.parametrize("unit", Unit)
@pytest.mark.parametrize("order", FileOrder)
def test_every_epoch_visits_everything_once_in_its_own_order(store: TokenStore, unit: Unit, order: FileOrder) -> None:
    training = stream(store, unit=unit, order=order)
    epochs = [training.next_window(training.sequences_per_epoch) for _ in range(3)]
    scored = {sum(batch.label_tokens for batch in epoch) for epoch in epochs}
    assert len(scored) == 1 and training.state() == {"epoch": 2, "index": training.sequences_per_epoch}
    assert rows(epochs[0]) != rows(epochs[1]) != rows(epochs[2])
    if order is FileOrder.path:
        assert sorted(rows(epochs[0])) == sorted(rows(epochs[1])) == sorted(rows(epochs[2]))
    pieces = [length(piece) for sequence in training._order for piece in sequence]
    assert scored == {sum(pieces) - len(pieces)}
    assert training.utilisation == pytest.approx(sum(pieces) / CONTEXT / training.sequences_per_epoch)


@pytest.mark.parametrize("steps", [1, 7])
def test_resume_in_the_middle_of_a_later_epoch(store: TokenStore, steps: int) -> None:
    training = stream(store)
    training.next_window(2 * training.sequences_per_epoch + steps)
    state = training.state()
    assert state == {"epoch": 2, "index": steps}
    expected = training.next_window(2 * training.sequences_per_epoch)
    resumed = stream(store)
    resumed.next_window(3)
    resumed.load_state(state)
    assert resumed.state() == state
    assert all(same(one, other) for one, other in zip(expected, resumed.next_window(len(expected)), strict=True))


def test_window_size_does_not_matter(store: TokenStore) -> None:
    one, many = stream(store), stream(store)
    total = one.sequences_per_epoch + 6
    assert rows(one.next_window(total)) == [row for _ in range(total) for row in rows(many.next_window(1))]
    assert one.state() == many.state()


@pytest.mark.parametrize(("world", "micro_batch"), [(2, 1), (2, 2), (3, 1)])
def test_ranks_share_the_stream(store: TokenStore, world: int, micro_batch: int) -> None:
    alone = stream(store)
    ranks = [stream(store, rank=rank, world=world, micro_batch=micro_batch) for rank in range(world)]
    steps = alone.sequences_per_epoch // (world * micro_batch) + 2
    windows = [rank.next_window(steps) for rank in ranks]
    dealt = [row for step in zip(*windows, strict=True) for batch in step for row in rows([batch])]
    assert dealt == rows(alone.next_window(steps * world * micro_batch))
    assert all(rank.state() == alone.state() for rank in ranks) and alone.state()["epoch"] == 1


def test_resume_on_another_number_of_ranks(store: TokenStore) -> None:
    one, two = stream(store), [stream(store, rank=rank, world=2) for rank in range(2)]
    one.next_window(5)
    for rank in two:
        rank.load_state(one.state())
    parts = [rank.next_window(3) for rank in two]
    assert [row for step in zip(*parts, strict=True) for row in rows(list(step))] == rows(one.next_window(6))


def test_too_little_text(store: TokenStore) -> None:
    tokens = store.count("train")
    TrainStream(store, DataConfig(), tokens, 1, seed=0, packed=True)
    with pytest.raises(DataError) as caught:
        TrainStream(store, DataConfig(), tokens + 1, 1, seed=0, packed=True)
    message = str(caught.value)
    assert "too little text for one sequence" in message and "tier.context=" in message and len(message.splitlines()) <= 3
    suggested = int(message.split("tier.context=")[1].split(",")[0])
    assert tokens / 2 < suggested <= tokens


def test_state_of_another_corpus(store: TokenStore) -> None:
    with pytest.raises(DataError, match="resume=never"):
        stream(store).load_state({"epoch": 0, "index": 10_000})


@pytest.mark.parametrize("tail", [0, 8])
def test_random_rows_are_like_real_ones(tail: int) -> None:
    batch = random_batch(3, 64, 97, torch.Generator().manual_seed(0), tail)
    assert [sum(row) for row in batch.documents] == [64] * 3 and sum(map(len, batch.documents)) == 3 + bool(tail)
    for row, lengths in enumerate(batch.documents):
        start = 0
        for size in lengths:
            assert batch.position_ids[row, start : start + size].tolist() == list(range(size))
            assert torch.equal(batch.labels[row, start : start + size - 1], batch.input_ids[row, start + 1 : start + size])
            assert batch.labels[row, start + size - 1] == IGNORE
            start += size
    assert batch.label_tokens == 3 * 64 - sum(map(len, batch.documents)) and int(batch.input_ids.max()) < 97
