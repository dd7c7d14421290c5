"""Both validation losses score the same held-out tokens; the context is the same repository's training files, nearest last."""

import pytest

from elite.data import IGNORE, Batch, TokenFile, TokenStore, completion_example, validation_batches
from elite.data.packing import length
from elite.data.validation import _distance, context_spans, targets

TARGET = 64


def scored(batch: Batch) -> list[int]:
    return batch.labels[batch.labels != IGNORE].tolist()


def file_at(store: TokenStore, token: int) -> TokenFile:
    return next(file for file in store.files if file.start <= token < file.start + file.length)


@pytest.mark.parametrize("context", [TARGET, 100, 512, 1 << 16])
def test_both_variants_score_exactly_the_same_tokens(store: TokenStore, context: int) -> None:
    having, alone = (validation_batches(store, context, TARGET, 8, seed=1, with_context=value) for value in (True, False))
    assert len(having) == len(alone) == 8
    assert [scored(batch) for batch in having] == [scored(batch) for batch in alone]
    for batch, lone, target in zip(having, alone, targets(store, TARGET, 8, seed=1), strict=True):
        tokens = [int(token) for start, size in target.piece for token in store.tokens[start : start + size]]
        assert scored(batch) == tokens[1:] and lone.input_ids.tolist() == [tokens]
        assert batch.input_ids[0, -len(tokens) :].tolist() == tokens
        assert (batch.labels[0, : -len(tokens)] == IGNORE).all()
        for one in (batch, lone):
            size = one.input_ids.shape[1]
            assert one.documents == ((size,),) and size <= context
            assert one.position_ids[0].tolist() == list(range(size))


def test_room_is_filled_exactly_or_the_repository_exhausted(store: TokenStore) -> None:
    for target, batch in zip(targets(store, TARGET, 8, seed=0), validation_batches(store, 512, TARGET, 8, 0, True), strict=True):
        assert batch.input_ids.shape[1] == 512 and length(target.piece) <= TARGET
    for target, batch in zip(targets(store, TARGET, 8, seed=0), validation_batches(store, 1 << 16, TARGET, 8, 0, True), strict=True):
        everything = sum(file.length for file in store.select("train") if file.repo == target.repo)
        assert batch.input_ids.shape[1] == everything + length(target.piece)


@pytest.mark.parametrize("room", [1, 300, 1 << 16])
def test_context_is_training_text_of_the_same_repository_nearest_last(store: TokenStore, room: int) -> None:
    for target in targets(store, TARGET, 100, seed=0):
        spans = context_spans(store, target.repo, target.first_path, room)
        files = [file_at(store, start) for start, _ in spans]
        assert all(file.split == "train" and file.repo == target.repo for file in files)
        assert all((file.start, file.length) == span for file, span in zip(files[1:], spans[1:], strict=True))
        assert files[0].start + files[0].length == sum(spans[0]), "the earliest file is cut at its start"
        distances = [_distance(file.path, target.first_path) for file in files]
        assert distances == sorted(distances, reverse=True)
        left_out = [file for file in store.select("train") if file.repo == target.repo and file not in files]
        assert all(_distance(file.path, target.first_path) >= distances[0] for file in left_out)


def test_targets_cover_all_held_out_text_once(store: TokenStore) -> None:
    found = targets(store, TARGET, 10_000, seed=0)
    tokens = [token for target in found for start, size in target.piece for token in range(start, start + size)]
    held_out = [token for file in store.select("val") for token in range(file.start, file.start + file.length)]
    assert len(tokens) == len(set(tokens)) and set(tokens) <= set(held_out) and len(held_out) - len(tokens) <= 2
    for target in found:
        assert {file_at(store, start).repo for start, _ in target.piece} == {target.repo}
        assert file_at(store, target.piece[0][0]).path == target.first_path


def test_choice_is_spread_and_deterministic(store: TokenStore) -> None:
    everything = targets(store, TARGET, 10_000, seed=0)
    chosen = targets(store, TARGET, 4, seed=3)
    assert chosen == targets(store, TARGET, 4, seed=3) and len(chosen) == 4
    positions = [everything.index(target) for target in chosen]
    assert all(abs(b - a - len(everything) / 4) <= 1 for a, b in zip(positions, positions[1:], strict=False))
    assert any(targets(store, TARGET, 4, seed=seed) != chosen for seed in range(9))


@pytest.mark.parametrize(
    ("one", "other", "steps"),
    [("a.py", "b.py", 0), ("x/a.py", "x/b.py", 0), ("x/a.py", "b.py", 1), ("x/y/a.py", "x/z/b.py", 2), ("x/y/a.py", "z/b.py", 3)],
)
def test_distance(one: str, other: str, steps: int) -> None:
    assert _distance(one, other) == _distance(other, one) == steps


@pytest.mark.parametrize("context", [40, 300, 1 << 16])
def test_completion(store: TokenStore, context: int) -> None:
    example = completion_example(store, context, 16, seed=0)
    assert example is not None and example == completion_example(store, context, 16, seed=0)
    file = next(file for file in store.select("val") if file.path == example.path)
    tokens = store.tokens[file.start : file.start + file.length].tolist()
    cuts = range(8, len(tokens))
    split = next(at for at in cuts if tokens[at : at + 16] == example.reference and tokens[at - 8 : at] == example.prompt[-8:])
    assert len(example.reference) == 16 and split + 16 < len(tokens) and len(example.prompt) <= context - 16
    assert example.prompt[-1] in store.line_ends, "the cut is at a line start"
    assert abs(split - len(tokens) // 2) < len(tokens) / 4
    if context == 300:
        assert len(example.prompt) == context - 16 and example.prompt[-split:] == tokens[:split]


def test_no_completion_without_room_or_a_long_enough_file(store: TokenStore) -> None:
    assert completion_example(store, 16, 16, seed=0) is None
    assert completion_example(store, 1 << 16, 100_000, seed=0) is None
