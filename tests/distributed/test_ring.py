"""Attention over a sequence that ranks share: output, gradients and traffic against one rank's, in fp64 by the textbook."""

from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from elite.distributed.ranks import Ranks
from elite.distributed.ring import Documents, Ring
from elite.errors import ModelError
from elite.executor.streamed.kernels import KERNELS
from elite.optimizations.contract import Passes
from elite.optimizations.ring_attention import RingAttention, Variant
from elite.zigzag import Dealing, held, runs, seen, share, visible
from tests.distributed.forked import together
from tests.executor.streamed.dense import dense, random, relative
from tests.optimizations.test_all import FACTS


@dataclass(frozen=True)
class Case:
    """One call of attention."""

    documents: Documents
    heads: int = 4
    kv_heads: int = 2
    dim: int = 8
    dtype: torch.dtype = torch.float32

    @property
    def length(self) -> int:
        return sum(self.documents[0])

    def tensors(self) -> list[Tensor]:
        """do, q [B, S, H, D] and k, v [B, S, K, D]."""
        size = (self.heads, self.kv_heads, self.dim, torch.float64)
        rows = [random(self.length, self.length + row, *size) for row in range(len(self.documents))]
        return [torch.stack([t[: self.length] for t in of_rows]).to(self.dtype) for of_rows in zip(*rows, strict=True)]


CASES = {
    "even": Case(((48,),)),
    "odd": Case(((53,),)),
    "fewer tokens than pieces": Case(((5,),)),
    "each head its own keys": Case(((32,),), kv_heads=4),
    "one key head": Case(((37,),), kv_heads=1, dtype=torch.float64),
    "packed": Case(((7, 1, 30, 15),)),
    "packed rows": Case(((20, 33), (53,), (3, 3, 3, 44))),
    "fp64": Case(((24, 29),), dtype=torch.float64),
}
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def expected(case: Case) -> list[Tensor]:
    """o, dq [B, S, H, D], dk and dv [B, S, K, D], document by document."""
    do, q, k, v = case.tensors()
    rows = []
    for row, documents in enumerate(case.documents):
        parts = zip(*(t[row].split(documents) for t in (do, q, k, v)), strict=True)
        found = [dense(a, b, c, d, True, None, case.dim**-0.5) for a, b, c, d in parts]
        rows.append([torch.cat([part[i] for part in found]) for i in (0, 2, 3, 4)])
    return [torch.stack(of_rows) for of_rows in zip(*rows, strict=True)]


def ring_of(ranks: Ranks, variant: Variant) -> Ring:
    return Ring(ranks, lambda shape: KERNELS["math"], variant)


def attended(ranks: Ranks, folder: Path) -> dict[tuple[str, str], tuple[list[Tensor], int, int]]:
    """This rank's shares of output and gradients, and the bytes that it sent forward and in all."""
    found = {}
    for name, case in CASES.items():
        pieces = held(case.length, ranks.rank, ranks.world)
        do, *qkv = (torch.cat([t[:, p.start : p.stop] for p in pieces], 1) for t in case.tensors())
        for variant in Variant:
            ring = ring_of(ranks, variant)
            q, k, v = leaves = [t.transpose(1, 2).contiguous().requires_grad_() for t in qkv]
            out = ring.attend(q, k, v, case.documents, None, 0.0, None)
            forward = ring.sent_bytes
            gradients = torch.autograd.grad(out, leaves, do.transpose(1, 2))
            found[name, variant.value] = [t.detach().transpose(1, 2) for t in (out, *gradients)], forward, ring.sent_bytes
    ranks.barrier()
    return found


def whole(parts: list[Tensor], length: int) -> Tensor:
    """The row [B, S, …] from what each rank holds of it."""
    out = parts[0].new_full((len(parts[0]), length, *parts[0].shape[2:]), torch.nan)
    for rank, part in enumerate(parts):
        pieces = held(length, rank, len(parts))
        for piece, values in zip(pieces, part.split([len(p) for p in pieces], 1), strict=True):
            out[:, piece.start : piece.stop] = values
    return out


def traffic(case: Case, rank: int, ranks: int, variant: Variant) -> tuple[int, int]:
    """Bytes that a rank sends forward and in all, by the module's docstring; in a ring it hands on blocks of several lengths."""
    own = [share(case.length, (rank - step) % ranks, ranks) for step in range(ranks)]
    longest = max(own)
    value, wide = case.dtype.itemsize, max(4, case.dtype.itemsize)
    a_token = 2 * len(case.documents) * case.kv_heads * case.dim
    if variant is Variant.all_gather:
        forward = (ranks - 1) * longest * a_token * value
        return forward, 2 * forward + (ranks - 1) * longest * a_token * wide
    forward = sum(own[:-1]) * a_token * value
    return forward, 2 * forward + sum(own) * a_token * wide


@pytest.mark.parametrize("count", [2, 4])
def test_it_is_attention_and_sends_what_it_says(count: int, tmp_path: Path) -> None:
    of_ranks = together(tmp_path, count, attended)
    for name, variant in product(CASES, Variant):
        case = CASES[name]
        found = [found[name, variant.value] for found in of_ranks]
        for part, right in enumerate(expected(case)):
            made = whole([tensors[part] for tensors, _, _ in found], case.length)
            error = relative(made, right)
            assert error <= TOLERANCE[case.dtype], f"{('o', 'dq', 'dk', 'dv')[part]} of {name}, {variant.value}: {error}"
        for rank, (_, forward, total) in enumerate(found):
            assert (forward, total) == traffic(case, rank, count, variant), (name, variant, rank)
            if name in ("even", "each head its own keys"):
                assert total == planned(case, count, variant), (name, variant, rank)


def planned(case: Case, ranks: int, variant: Variant) -> float:
    """What a plan says that a rank hands over in one pass of one layer."""
    shape = replace(FACTS.model, num_hidden_layers=1, num_key_value_heads=case.kv_heads, head_dim=case.dim)
    facts = replace(FACTS, model=shape, context=case.length, micro_batch=len(case.documents), sharing=ranks)
    found = RingAttention(RingAttention.Config(variant=variant)).exchange(Passes(1, 1.0, case.dtype.itemsize), facts)
    return found.handed_bytes


def test_the_dealing_covers_each_token_once() -> None:
    for length, ranks in ((48, 2), (53, 4), (5, 4), (64, 8)):
        pieces = [held(length, rank, ranks) for rank in range(ranks)]
        assert sorted(token for two in pieces for piece in two for token in piece) == list(range(length))
        shares = [share(length, rank, ranks) for rank in range(ranks)]
        assert sum(shares) == length and max(shares) - min(shares) <= 2
        assert all(abs(len(early) - len(late)) <= 1 for early, late in pieces)


def test_the_work_is_balanced_and_what_is_unseen_is_left_out() -> None:
    def work(documents: tuple[int, ...], ranks: int) -> list[int]:
        """Pairs of query and key that each rank computes."""
        every = [runs(documents, rank, ranks) for rank in range(ranks)]
        seen = [[pair for theirs in every for pair in visible(mine, theirs)] for mine in every]
        return [sum(q.length * (q.length + 1) // 2 if q.first == k.first else q.length * k.length for q, k in pairs) for pairs in seen]

    assert work((64,), 4) == [520] * 4, "all alike: 64 · 65 / 2 / 4"
    documents = (8,) * 8
    assert sum(work(documents, 4)) == sum(size * (size + 1) // 2 for size in documents)
    assert sum(work((7, 1, 30, 15), 4)) == sum(size * (size + 1) // 2 for size in (7, 1, 30, 15))


def placed(dealing: Dealing, rank: int) -> list[tuple[int, int, int]]:
    """Row, document and token in the row of each token that a rank holds."""
    found = []
    for row, documents in enumerate(dealing.documents):
        of_token = [index for index, size in enumerate(documents) for _ in range(size)]
        found += [(row, of_token[token], token) for piece in held(sum(documents), rank, dealing.ranks) for token in piece]
    return found


@pytest.mark.parametrize(
    ("dealing", "chunk"), [(Dealing(((53,),), 4, 3), 5), (Dealing(((7, 1, 30, 15), (20, 33)), 2, 4), 9), (Dealing(((3,) * 11,), 3, 1), 40)]
)
def test_each_query_sees_each_key_before_it_once(dealing: Dealing, chunk: int) -> None:
    for rank in range(dealing.ranks):
        mine, pairs = placed(dealing, rank), list[tuple[Any, Any]]()
        assert len(mine) == dealing.tokens(rank)
        for owner, lap in product(range(dealing.ranks), range(dealing.laps)):
            block = [token for part in dealing.parts(owner, lap) for token in placed(dealing, owner)[part]]
            assert len(block) == dealing.sizes(lap)[owner]
            for start in range(0, len(mine), chunk):
                queries = mine[start : start + chunk]
                for part in seen(dealing, rank, start, start + len(queries), owner, lap):
                    q, k = queries[part.queries], block[part.keys]
                    before = len(k) - len(q)
                    assert not part.causal or q == k[before:], "what comes last are the queries themselves"
                    pairs += [(a, b) for i, a in enumerate(q) for b in (k[: before + i + 1] if part.causal else k)]
        tokens = [token for other in range(dealing.ranks) for token in placed(dealing, other)]
        right = [(a, b) for a in mine for b in tokens if a[:2] == b[:2] and b[2] <= a[2]]
        assert sorted(pairs) == sorted(right), rank


def test_each_step_of_each_lap_is_the_same_work_for_all() -> None:
    dealing = Dealing(((128,),), 4, 4)
    for lap, step in product(range(dealing.laps), range(dealing.ranks)):
        work = []
        for rank in range(dealing.ranks):
            found = seen(dealing, rank, 0, dealing.tokens(rank), (rank - step) % dealing.ranks, lap)
            pairs = [(q.queries.stop - q.queries.start, q.keys.stop - q.keys.start, q.causal) for q in found]
            work.append(sum(n * m - causal * n * (n - 1) // 2 for n, m, causal in pairs))
        assert len(set(work)) == 1, (lap, step, work)


@pytest.mark.parametrize(("dropout", "window", "said"), [(0.1, None, "dropped out"), (0.0, 5, "a window of 5 tokens")])
def test_what_it_cannot_do_is_refused(dropout: float, window: int | None, said: str) -> None:
    ring = ring_of(Ranks(0, 2, torch.device("cpu")), Variant.ring)
    nothing: Any = torch.zeros(1, 2, 4, 8)
    with pytest.raises(ModelError, match=said):
        ring.attend(nothing, nothing, nothing, ((8,),), None, dropout, window)
