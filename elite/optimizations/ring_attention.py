"""How ranks that share a sequence exchange keys and values."""

from enum import Enum


class Variant(Enum):
    """How keys and values of other ranks come."""

    ring = "ring"
    """From neighbour to neighbour, one block at a time, while the block before is at work."""
    all_gather = "all_gather"
    """All at once, before anything is attended."""
