"""The collector passes over what was there before, and takes what came after."""

import gc
import weakref

from elite.training.heap import settled


class Node:
    """May refer to itself."""

    def __init__(self) -> None:
        self.own = self


def test_only_new_garbage_is_collected() -> None:
    before = Node()
    old = weakref.ref(before)
    with settled():
        assert not any(thing is before for thing in gc.get_objects())
        del before
        new = weakref.ref(Node())
        gc.collect()
        assert new() is None and old() is not None
    gc.collect()
    assert old() is None and gc.get_freeze_count() == 0
