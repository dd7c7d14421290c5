"""Python's garbage collector during training."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


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
