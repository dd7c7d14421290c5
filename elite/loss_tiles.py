"""How many logits a loss forms at once: of a tile of tokens, and of some words at a time where the head is frozen (elite/losses.py)."""

from math import ceil

TILE_BYTES = 1024**3
"""fp32 logits of a trained head at once, at most: each tile reads and writes the head's gradient."""
SUM_BYTES = 17 * 1024**2
"""fp32 sums of a frozen head's rows at once, at most: as many as an H100's 132 multiprocessors form in one go, in tiles of 128 by 256."""
MOST_TOKENS = 8192
MOST_WORDS = 8192
"""In a tile of a frozen head; a program of the kernel holds the logits of as many words. Much fewer, and products spend their time on
reading and writing the sums."""
MOST_LOGITS = 2**25
"""In a tile of a frozen head."""
ALIGNMENT = 128
"""Tiles of more tokens than this are a multiple of it, as matrix kernels like."""


def tile_tokens(values: int, most_bytes: int = TILE_BYTES) -> int:
    """Tokens of so many fp32 values, logits or sums, that fit into so many bytes; at least one."""
    tokens = max(1, most_bytes // (4 * values))
    return tokens if tokens < ALIGNMENT else tokens - tokens % ALIGNMENT


def frozen_tile(tokens: int, width: int, vocab: int, most_tokens: int = 0) -> tuple[int, int]:
    """Tokens and words of a tile of a frozen head: equal tiles of tokens, whose sums fit `SUM_BYTES`.

    Args:
        tokens: all of them.
        width: values of a token's sums; 1 where no gradient is wanted.
        most_tokens: of a tile; 0: as many as fit.
    """
    most = most_tokens or min(MOST_TOKENS, tile_tokens(width, SUM_BYTES))
    even = ceil(tokens / max(1, ceil(tokens / most)))
    rows = max(1, min(most, even if even < ALIGNMENT else ceil(even / ALIGNMENT) * ALIGNMENT))
    return rows, max(1, min(MOST_WORDS, vocab, MOST_LOGITS // rows))
