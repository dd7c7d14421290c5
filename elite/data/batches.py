"""Sequences → tensors, and the endless stream of training micro-batches: dealt to ranks, resumable to the sequence."""

from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from elite.config import DataConfig
from elite.data.course import Course
from elite.data.packing import Sequence, length, pack, pieces, split, utilisation
from elite.data.tokens import TokenStore
from elite.errors import DataError
from elite.zigzag import held

IGNORE = -100
"""Label of a position that has nothing to predict (torch's default `ignore_index`)."""


@dataclass(frozen=True, eq=False)
class Batch:
    """B rows of S tokens, or of the n of them that one of several ranks holds (elite/zigzag.py)."""

    input_ids: Tensor
    """[B, S], int64."""
    labels: Tensor
    """[B, S], int64, already shifted: `labels[b, t]` is the token to predict *at* t; IGNORE at a document's last token and on padding."""
    position_ids: Tensor
    """[B, S], int64, from 0 in every document."""
    documents: tuple[tuple[int, ...], ...]
    """Lengths of each row's documents; they sum to S. Padding is one closing document of its own."""
    ranks: int = 1
    """That share the rows. Above 1 the tensors are [B, n], this rank's part of them; documents are those of whole rows."""

    @property
    def context(self) -> int:
        """S, also where ranks share it."""
        return sum(self.documents[0])

    @property
    def slots(self) -> int:
        """Token slots of whole rows, padding included: B·S."""
        return len(self.documents) * self.context

    @property
    def label_tokens(self) -> int:
        """Positions that are scored."""
        return int((self.labels != IGNORE).sum())

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on `device`."""
        tensors = self.input_ids.to(device), self.labels.to(device), self.position_ids.to(device)
        return Batch(*tensors, self.documents, self.ranks)

    def shared(self, rank: int, ranks: int) -> "Batch":
        """What one of so many ranks holds of these rows. Labels are shifted already, and so right at the borders."""
        if ranks == 1:
            return self
        pieces = held(self.context, rank, ranks)
        input_ids, labels, position_ids = (
            torch.cat([t[:, piece.start : piece.stop] for piece in pieces], 1) for t in (self.input_ids, self.labels, self.position_ids)
        )
        return replace(self, input_ids=input_ids, labels=labels, position_ids=position_ids, ranks=ranks)


def collate(store: TokenStore, sequences: Seq[Sequence], context: int, pad_id: int) -> Batch:
    """One row of `context` tokens a sequence, padded at its end with `pad_id`. No sequence may be longer than `context`."""
    shape = (len(sequences), context)
    input_ids = np.full(shape, pad_id, dtype=np.int64)
    labels = np.full(shape, IGNORE, dtype=np.int64)
    position_ids = np.zeros(shape, dtype=np.int64)
    documents = []
    for row, sequence in enumerate(sequences):
        lengths = [length(piece) for piece in sequence]
        start = 0
        for piece, size in zip(sequence, lengths, strict=True):
            tokens = np.concatenate([store.tokens[first : first + count] for first, count in piece])
            input_ids[row, start : start + size] = tokens
            labels[row, start : start + size - 1] = tokens[1:]
            position_ids[row, start : start + size] = np.arange(size)
            start += size
        if start < context:
            position_ids[row, start:] = np.arange(context - start)
            lengths.append(context - start)
        documents.append(tuple(lengths))
    return Batch(torch.from_numpy(input_ids), torch.from_numpy(labels), torch.from_numpy(position_ids), tuple(documents))


def random_batch(sequences: int, context: int, vocab: int, generator: torch.Generator | None = None, tail: int = 0) -> Batch:
    """Rows of random tokens, one document each; every position but a document's last is scored.

    Args:
        vocab: ids are drawn below it.
        generator: torch's own if unset.
        tail: so many tokens at the end of the last row are a document of their own, as in packed rows.
    """
    ids = torch.randint(vocab, (sequences, context), generator=generator)
    labels, positions = ids.roll(-1, 1), torch.arange(context).repeat(sequences, 1)
    labels[:, -1] = IGNORE
    if not tail:
        return Batch(ids, labels, positions, ((context,),) * sequences)
    labels[-1, -tail - 1] = IGNORE
    positions[-1, -tail:] = torch.arange(tail)
    return Batch(ids, labels, positions, ((context,),) * (sequences - 1) + ((context - tail, tail),))


class TrainStream:
    """Micro-batches without end. Epoch e visits every sequence once, in an order drawn from (seed, e), over all ranks together.

    A curriculum may deal a sequence as several shorter rows, or leave difficult sequences to later epochs (elite/data/course.py). The
    position is that of the whole job, not of a rank: a micro-step takes `world · micro_batch` sequences, rank r the r-th part of
    them. So a run may resume on another number of ranks, and the state is two numbers.

    Args:
        context: tokens in every row.
        micro_batch: rows in a batch.
        packed: several documents may share a row; otherwise every piece has its own, padded.
        course: where a curriculum leads; unset: everything, at the whole context.
        sharing: neighbouring ranks that hold parts of the same rows.

    Raises:
        DataError: fewer than `context` tokens to train on.
    """

    def __init__(
        self,
        store: TokenStore,
        data_cfg: DataConfig,
        context: int,
        micro_batch: int,
        seed: int,
        packed: bool,
        rank: int = 0,
        world: int = 1,
        course: Course | None = None,
        sharing: int = 1,
    ) -> None:
        tokens = store.count("train")
        if tokens < context:
            raise DataError(
                f"{tokens:,} tokens of training text are too little text for one sequence of {context:,} tokens",
                f"choose a lower tier or tier.context={_power_of_two_below(tokens)}, or add files",
            )
        self._store, self._cfg, self._context, self._seed, self._packed = store, data_cfg, context, seed, packed
        self._micro_batch, self._rank, self._world = micro_batch, rank // sharing, world // sharing
        self._part = rank % sharing, sharing
        self._course = course or Course(micro_batch * self._world)
        self._enter(epoch=0, index=0)

    @property
    def sequences_per_epoch(self) -> int:
        """Sequences in the epoch, over all ranks; the same in each, unless a curriculum leaves some to later ones."""
        return len(self._order)

    @property
    def utilisation(self) -> float:
        """Share of the tokens in the epoch's sequences that are text rather than padding, 0 to 1."""
        return utilisation(self._order, self._context)

    def next_window(self, n: int) -> list[Batch]:
        """The next `n` micro-batches of this rank; the stream moves on by `n · micro_batch · world` sequences."""
        window = []
        for _ in range(n):
            parts = self._course.parts(self._before + self._index)
            step = [self._next() for _ in range(self._micro_batch * self._world)]
            mine = step[self._rank * self._micro_batch : (self._rank + 1) * self._micro_batch]
            rows = [row for sequence in mine for row in split(sequence, self._context, parts)]
            window.append(collate(self._store, rows, self._context // parts, self._store.end_token).shared(*self._part))
        return window

    def state(self) -> dict[str, int]:
        """Where the stream stands: `index` sequences of epoch `epoch` have been dealt. Equal on all ranks."""
        return {"epoch": self._epoch, "index": self._index}

    def load_state(self, state: dict[str, int]) -> None:
        """Continue where `state` was taken.

        Raises:
            DataError: the epoch has fewer sequences than that: the state belongs to another corpus or context.
        """
        index = state["index"]
        self._enter(state["epoch"], index)
        if index > len(self._order):
            problem = f"the data position to resume from is sequence {index}, but an epoch has {len(self._order)}"
            raise DataError(problem, "resume with the corpus and context of that run, or resume=never")

    def _next(self) -> Sequence:
        if self._index == len(self._order):
            self._enter(self._epoch + 1, 0)
        sequence = self._order[self._index]
        self._index += 1
        return sequence

    def _enter(self, epoch: int, index: int) -> None:
        """Stand at `index` of `epoch`, whose sequences follow from the seed alone."""
        rng = np.random.default_rng((self._seed, epoch))
        found = pieces(self._store, self._cfg.unit, self._cfg.order, self._context, rng)
        sequences = pack(found, self._context) if self._packed else [(piece,) for piece in found]
        self._before = self._course.before(epoch, len(sequences))
        self._order = self._course.order(sequences, self._before, rng)
        self._epoch, self._index = epoch, index


def _power_of_two_below(tokens: int) -> int:
    """The largest power of two that is not above `tokens`."""
    return 1 << max(tokens.bit_length() - 1, 0)
