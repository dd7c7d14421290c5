"""Curricula as the stream sees them: the same text in shorter rows; easy sequences first; resumed anywhere, dealt to any ranks."""

import math
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch

from elite.config import DataConfig, FileOrder, Unit
from elite.curriculum import Pacing
from elite.data import IGNORE, Batch, TokenStore, TrainStream
from elite.data.course import Course, Ramp
from elite.data.difficulty import by_files, document_lengths
from elite.data.packing import Sequence, length, split
from elite.errors import DataError
from elite.plan.stages import ContextStage
from tests.data.test_batches import CONTEXT, rows, same

STEP = 4
"""Sequences of an optimizer step."""
STAGES = (ContextStage(CONTEXT // 4, 4, 0, 2), ContextStage(CONTEXT // 2, 2, 2, 3), ContextStage(CONTEXT, 1, 5, 100))
FILES = DataConfig(unit=Unit.file, order=FileOrder.shuffled)


def growing(
    store: TokenStore, rank: int = 0, world: int = 1, packed: bool = True, stages: tuple[ContextStage, ...] = STAGES
) -> TrainStream:
    micro_batch = 2 // world
    return TrainStream(store, FILES, CONTEXT, micro_batch, 5, packed, rank, world, Course(STEP, stages))


def flat(batches: list[Batch]) -> list[int]:
    return [token for batch in batches for token in batch.input_ids.flatten().tolist()]


@pytest.mark.parametrize("parts", [1, 2, 4, 8])
def test_split_by_hand_and_by_position(parts: int) -> None:
    sequence: Sequence = (((0, 3), (10, 9)), ((40, 2),), ((50, 9),))
    assert split((((0, 3), (10, 2)), ((40, 2),)), 8, 2) == [(((0, 3), (10, 1)),), (((11, 1),), ((40, 2),))]
    tokens = [(number, position) for number, piece in enumerate(sequence) for start, n in piece for position in range(start, start + n)]
    made = split(sequence, 32, parts)
    size = 32 // parts
    assert len(made) == parts
    for row, found in enumerate(made):
        wanted = tokens[row * size : (row + 1) * size]
        assert [position for piece in found for start, n in piece for position in range(start, start + n)] == [p for _, p in wanted]
        assert [length(piece) for piece in found] == list(Counter(number for number, _ in wanted).values())


@pytest.mark.parametrize("packed", [True, False])
def test_a_growing_context_deals_the_same_text_in_shorter_rows(store: TokenStore, packed: bool) -> None:
    course, plain = growing(store, packed=packed), growing(store, packed=packed, stages=())
    for step in range(8):
        window, whole = course.next_window(2), plain.next_window(2)
        stage = STAGES[0] if step < 2 else STAGES[1] if step < 5 else STAGES[2]
        assert all(batch.input_ids.shape == (2 * stage.parts, stage.context) for batch in window)
        # As many tokens, the same ones, in the same order.
        assert flat(window) == flat(whole)
        assert course.state() == plain.state()
        for batch, other in zip(window, whole, strict=True):
            shorter, longer = batch.labels.flatten(), other.labels.flatten()
            kept = shorter != IGNORE
            assert torch.equal(shorter[kept], longer[kept])
            lost = (longer != IGNORE) & ~kept
            assert set((torch.arange(len(longer))[lost] % stage.context).tolist()) <= {stage.context - 1}
            assert int(batch.position_ids.max()) < stage.context


@pytest.mark.parametrize("taken", range(1, 8))
def test_it_resumes_before_and_after_every_border(store: TokenStore, taken: int) -> None:
    whole = growing(store)
    expected = [whole.next_window(2) for _ in range(9)]
    first, second = growing(store), growing(store)
    for _ in range(taken):
        first.next_window(2)
    second.load_state(first.state())
    for step in range(taken, 9):
        assert all(same(one, other) for one, other in zip(second.next_window(2), expected[step], strict=True)), step
    assert second.state() == whole.state()


def test_a_border_may_lie_in_a_later_epoch(store: TokenStore) -> None:
    border = growing(store).sequences_per_epoch // STEP + 3
    stages = (ContextStage(CONTEXT // 2, 2, 0, border), ContextStage(CONTEXT, 1, border, 100))
    stream = growing(store, stages=stages)
    contexts = [stream.next_window(2)[0].input_ids.shape[1] for _ in range(border + 3)]
    assert contexts == [CONTEXT // 2] * border + [CONTEXT] * 3 and stream.state()["epoch"] == 1
    resumed = growing(store, stages=stages)
    resumed.load_state(stream.state())
    assert all(same(one, other) for one, other in zip(resumed.next_window(4), stream.next_window(4), strict=True))


def test_ranks_share_a_growing_context(store: TokenStore) -> None:
    alone, pair = growing(store), [growing(store, rank, 2) for rank in range(2)]
    for _ in range(7):
        parts = [rank.next_window(2) for rank in pair]
        dealt = [row for step in zip(*parts, strict=True) for row in rows(list(step))]
        assert dealt == rows(alone.next_window(2))
        assert all(rank.state() == alone.state() for rank in pair)


def ramp(store: TokenStore, pacing: Pacing = Pacing.root, full_step: float = 30, start: float = 0.2) -> Ramp:
    return Ramp(by_files(store, document_lengths(store, Unit.file)), start, pacing, full_step)


def easy_first(store: TokenStore, made: Ramp, rank: int = 0, world: int = 1) -> TrainStream:
    return TrainStream(store, FILES, CONTEXT, 2 // world, 5, False, rank, world, Course(STEP, (), made))


@pytest.mark.parametrize(
    ("pacing", "competence"),
    [(Pacing.linear, lambda t: 0.2 + 0.8 * t / 30), (Pacing.root, lambda t: math.sqrt(0.04 + 0.96 * t / 30))],
)
def test_only_open_sequences_are_dealt_and_each_once_a_round(
    store: TokenStore, pacing: Pacing, competence: Callable[[float], float]
) -> None:
    stream, made = easy_first(store, ramp(store, pacing)), ramp(store, pacing)
    # A file of several rows is as difficult in each; a rest of one token is no row.
    files = sorted(f.length for f in store.select("train") for first in range(0, f.length, CONTEXT) if f.length - first > 1)
    dealt: list[float] = []
    rounds: list[list[Sequence]] = [[]]
    for draw in range(40 * STEP):
        epoch = stream.state()["epoch"]
        sequence = stream._next()
        if stream.state()["epoch"] != epoch:
            rounds.append([])
        rounds[-1].append(sequence)
        share = min(1.0, competence(draw // STEP))
        assert made.difficulty(sequence) <= files[math.ceil(share * len(files)) - 1], draw
        dealt.append(made.difficulty(sequence))
    assert all(len(set(one)) == len(one) for one in rounds)
    assert np.mean(dealt[: 5 * STEP]) < np.mean(dealt[-5 * STEP :])
    assert any(len(one) == len(files) for one in rounds[:-1]), "once all are open a round is an epoch"


def test_an_easy_start_resumes_anywhere_and_ranks_agree(store: TokenStore) -> None:
    whole, made = easy_first(store, ramp(store)), ramp(store)
    states, expected = [], []
    for _ in range(45):
        states.append(whole.state())
        expected.append(whole.next_window(2))
    assert states[-1]["epoch"] > 2
    pair = [easy_first(store, made, rank, 2) for rank in range(2)]
    for step in (0, 1, 5, 11, 20, 33, 44):
        again = easy_first(store, made)
        again.load_state(states[step])
        assert all(same(one, other) for one, other in zip(again.next_window(2), expected[step], strict=True)), step
        for rank in pair:
            rank.load_state(states[step])
        parts = [rank.next_window(2) for rank in pair]
        assert [row for both in zip(*parts, strict=True) for row in rows(list(both))] == rows(expected[step])


@pytest.mark.parametrize("sequences", [1, 3, 10, 57])
@pytest.mark.parametrize("step", [1, 3, 8])
def test_rounds_are_as_long_as_drawing_makes_them(sequences: int, step: int) -> None:
    """Against drawing one by one, counting what waits."""
    made = Ramp(lambda sequence: float(length(sequence[0])), 0.1, Pacing.linear, 20)
    course, every = Course(step, (), made), [(((0, n + 1),),) for n in range(sequences)]
    begins, waiting, seen = [0], 0, 0
    for draw in range(60 * step):
        opened = made.opened(draw // step, sequences)
        if waiting + opened - seen == 0:
            begins.append(draw)
            waiting, seen = 0, 0
        waiting += opened - seen - 1
        seen = opened
    for epoch, begin in enumerate(begins):
        assert course.before(epoch, sequences) == begin
        order = course.order(every, begin, np.random.default_rng(0))
        assert epoch + 1 == len(begins) or len(order) == begins[epoch + 1] - begin


def test_difficulty_is_the_mean_over_tokens(store: TokenStore) -> None:
    files = store.select("train")
    values = [float(i) for i in range(len(files))]
    found = by_files(store, values)
    second, third = files[1], files[2]
    assert found((((second.start, 3),),)) == 1.0
    assert found((((second.start + second.length - 1, 1), (third.start, 3)),)) == pytest.approx((1 + 3 * 2) / 4)
    assert document_lengths(store, Unit.file) == [float(file.length) for file in files]
    whole = {repo: sum(file.length for file in files if file.repo == repo) for repo in {file.repo for file in files}}
    assert document_lengths(store, Unit.repository) == [float(whole[file.repo]) for file in files]


def test_where_all_is_alike_there_is_no_order(store: TokenStore) -> None:
    with pytest.raises(DataError, match="no order from easy to hard"):
        by_files(store, [1.0] * len(store.select("train")))
