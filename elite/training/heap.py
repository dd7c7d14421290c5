"""Python's garbage collector during training."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

from elite.distributed.gradients import empty_queue

MOST_PASSES = 5
"""Of the collector."""


def let_go() -> None:
    """Free everything that a pass has left, one that failed too. Whoever calls must have let go of its error, whose frames hold tensors.

    One collection is not enough: a generator that is garbage runs what it has yet to run and lives until the next, and what a failed
    backward had still to do is no garbage to Python.
    """
    for _ in range(MOST_PASSES):
        # First, for what it lets go of may be garbage.
        empty_queue()
        if not gc.collect():
            return


@contextmanager
def settled() -> Iterator[None]:
    """Within, the collector passes over what exists already.

    Models are millions of objects that stay; a full collection that visits them takes as long as a short step. Garbage that arises within
    is collected as ever.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
