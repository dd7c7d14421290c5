"""The floor that a streamed step is held against."""

import pytest

from elite.bench.peers import _floor

RATES = {"diagonal_forward": 100.0, "diagonal_backward": 200.0, "prefix_forward": 400.0, "prefix_backward": 500.0, "matmul": 800.0}
"""TFLOP/s"""
# A layer of Qwen2.5-Coder-1.5B: two maps 1536 × 1536, two 1536 × 256, three 1536 × 8960: 46,792,704 weights; 28 layers. With its head of
# 1536 × 151,936, a token's maps cost 2 · (3 · 28 · 46,792,704 + 2 · 233,373,696) = 8,794,669,056 operations: 10.99333632 µs at 800 TFLOP/s.
TOKEN_S = 10.99333632e-6


@pytest.mark.parametrize(
    ("tokens", "attention_s"),
    [
        # Half of 8192² pairs, all on the diagonal: 28 · 1536 · 33,554,432 · (4/100 + 10/200) / 10¹².
        (8192, 0.12987981103104),
        # Two chunks: as many pairs on the diagonals as before them: 28 · 1536 · 268,435,456 · (0.04 + 0.05 + 0.01 + 0.02) / 10¹².
        (32768, 1.38538465099776),
    ],
)
def test_floor_by_hand(tokens: int, attention_s: float) -> None:
    assert _floor(RATES, tokens) == pytest.approx(tokens * TOKEN_S + attention_s, rel=1e-9)
