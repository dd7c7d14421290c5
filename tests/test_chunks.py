"""How rows are cut: every token once, documents whole or on their own."""

from hypothesis import given
from hypothesis import strategies as st

from elite.chunks import ALIGNMENT, Chunk, cut, longest_chunk

LENGTHS = st.lists(st.integers(1, 2000), min_size=1, max_size=12)
SIZES = st.integers(1, 700)


def begins(documents: list[int]) -> list[int]:
    """First token of each document."""
    return [sum(documents[:i]) for i in range(len(documents))]


@given(LENGTHS, SIZES)
def test_chunks_cover_the_row_in_order(documents: list[int], size: int) -> None:
    chunks = [chunk for group in cut(documents, size) for chunk in group]
    assert [chunk.index for chunk in chunks] == list(range(len(chunks)))
    assert [chunk.start for chunk in chunks] == [0, *(chunk.stop for chunk in chunks[:-1])]
    assert chunks[-1].stop == sum(documents)
    assert all(0 < chunk.length <= size and sum(chunk.documents) == chunk.length for chunk in chunks)


@given(LENGTHS, SIZES)
def test_chunks_hold_whole_documents_or_parts_of_one(documents: list[int], size: int) -> None:
    spans = dict(zip(begins(documents), documents, strict=True))
    for group in cut(documents, size):
        if not group[0].shares:
            (chunk,) = group
            first = [chunk.start + sum(chunk.documents[:i]) for i in range(len(chunk.documents))]
            assert [spans[start] for start in first] == list(chunk.documents)
            assert chunk.offset == 0 and chunk.longest == max(chunk.documents)
            continue
        length = spans[group[0].start]
        assert length > size and sum(chunk.length for chunk in group) == length
        for chunk in group:
            assert chunk.shares and chunk.documents == (chunk.length,) and chunk.longest == length
            assert chunk.offset == chunk.start - group[0].start


@given(st.integers(1, 5000), SIZES)
def test_pieces_of_a_long_document(length: int, size: int) -> None:
    """As few as it takes, aligned but for the last, and none much smaller than it has to be."""
    pieces = [chunk.length for chunk in cut([length], size)[0]]
    assert len(pieces) == -(-length // size)
    assert len(set(pieces[:-1])) <= 1 and pieces[-1] <= pieces[0]
    assert pieces[0] == size or pieces[0] % ALIGNMENT == 0 or len(pieces) == 1
    assert pieces[0] - length / len(pieces) < ALIGNMENT


@given(LENGTHS, SIZES)
def test_no_two_neighbours_could_be_one(documents: list[int], size: int) -> None:
    """Short documents are collected as long as the next one fits."""
    groups = cut(documents, size)
    for one, two in zip(groups, groups[1:]):
        if not one[0].shares and not two[0].shares:
            assert one[0].length + two[0].documents[0] > size


def test_an_example() -> None:
    assert cut([3, 4, 9, 2], 8) == (
        (Chunk(0, 0, 7, 0, (3, 4), 4, False),),
        (Chunk(1, 7, 15, 0, (8,), 9, True), Chunk(2, 15, 16, 8, (1,), 9, True)),
        (Chunk(3, 16, 18, 0, (2,), 2, False),),
    )


@given(st.integers(1, 3000), st.integers(1, 5), SIZES)
def test_the_longest_chunk_is_known_beforehand(length: int, documents: int, size: int) -> None:
    chunks = [chunk for group in cut([length] * documents, size) for chunk in group]
    assert longest_chunk(length, documents, size) == (max(chunk.length for chunk in chunks), max(chunk.offset for chunk in chunks))
