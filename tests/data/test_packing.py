"""Packing keeps every token, once, within the context."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elite.config import FileOrder, Unit
from elite.data import TokenStore, pack, pieces, utilisation
from elite.data.packing import cut, length

SPANS = st.lists(st.integers(1, 60), max_size=40).map(
    lambda lengths: [(int(start), size) for start, size in zip(np.cumsum([0, *lengths[:-1]]), lengths, strict=True)] if lengths else []
)


def tokens_of(spans: object) -> list[int]:
    return [token for start, size in spans for token in range(start, start + size)]  # type: ignore[attr-defined]


@settings(deadline=None, max_examples=60)
@given(spans=SPANS, limit=st.integers(1, 50))
def test_cut_keeps_order_and_fills_all_but_the_last(spans: list[tuple[int, int]], limit: int) -> None:
    found = cut(spans, limit)
    assert [token for piece in found for token in tokens_of(piece)] == tokens_of(spans)
    assert all(length(piece) == limit for piece in found[:-1]) and all(0 < length(piece) <= limit for piece in found)


@settings(deadline=None, max_examples=60)
@given(spans=SPANS, context=st.integers(60, 200))
def test_pack_neither_loses_nor_repeats(spans: list[tuple[int, int]], context: int) -> None:
    found = [(span,) for span in spans]
    sequences = pack(found, context)
    assert Counter(piece for sequence in sequences for piece in sequence) == Counter(found)
    assert all(0 < sum(map(length, sequence)) <= context for sequence in sequences)
    filled = sum(size for _, size in spans) / (context * len(sequences)) if spans else 0.0
    assert utilisation(sequences, context) == pytest.approx(filled)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10_000))
def test_many_small_pieces_fill_the_rows(seed: int) -> None:
    lengths = np.random.default_rng(seed).lognormal(4.5, 1.0, 1500).astype(int).clip(2, 1024)
    assert utilisation(pack([((0, int(size)),) for size in lengths], 1024), 1024) >= 0.98


def test_best_fit_takes_the_fullest_row_with_room() -> None:
    assert pack([((0, 5),), ((5, 7),), ((12, 3),), ((15, 5),)], 10) == [(((5, 7),), ((12, 3),)), (((0, 5),), ((15, 5),))]


def test_long_pieces_of_all_lengths_fill_the_rows() -> None:
    rng = np.random.default_rng(0)
    found = [((0, int(size)),) for size in rng.integers(2, 100_000, 20_000)]
    assert utilisation(pack(found, 100_000), 100_000) > 0.99


def test_repository_is_one_stream_and_never_mixes(store: TokenStore) -> None:
    rng = np.random.default_rng(0)
    repo_at = {token: file.repo for file in store.files for token in range(file.start, file.start + file.length)}
    found = pieces(store, Unit.repository, FileOrder.path, 256, rng)
    assert all(len({repo_at[token] for token in tokens_of(piece)}) == 1 for piece in found)
    expected = [token for file in store.select("train") for token in range(file.start, file.start + file.length)]
    assert [token for piece in found for token in tokens_of(piece)] == expected
    assert sum(length(piece) < 256 for piece in found) == 2, "one short piece a repository"


def test_file_unit_never_mixes_files(store: TokenStore) -> None:
    file_at = {token: file for file in store.files for token in range(file.start, file.start + file.length)}
    found = pieces(store, Unit.file, FileOrder.path, 64, np.random.default_rng(0))
    assert all(len({file_at[token] for token in tokens_of(piece)}) == 1 for piece in found)
    lost = store.count("train") - sum(map(length, found))
    assert lost == sum(file.length % 64 == 1 for file in store.select("train")), "only pieces of one token are left out"


def test_piece_of_one_token_is_left_out(store: TokenStore) -> None:
    size = store.select("train")[0].length
    found = pieces(store, Unit.file, FileOrder.path, size - 1, np.random.default_rng(0))
    assert found[0] == ((0, size - 1),) and found[1][0][0] == size and all(length(piece) > 1 for piece in found)


def test_shuffled_order_permutes_whole_files(store: TokenStore) -> None:
    def stream(order: FileOrder, seed: int) -> list[int]:
        found = pieces(store, Unit.repository, order, 1 << 20, np.random.default_rng(seed))
        return [token for piece in found for token in tokens_of(piece)]

    ordered, shuffled = stream(FileOrder.path, 0), stream(FileOrder.shuffled, 0)
    assert shuffled != ordered and sorted(shuffled) == ordered
    assert shuffled == stream(FileOrder.shuffled, 0) != stream(FileOrder.shuffled, 1)
    for file in store.select("train"):
        first = shuffled.index(file.start)
        assert shuffled[first : first + file.length] == list(range(file.start, file.start + file.length))
