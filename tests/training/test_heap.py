"""The collector passes over what was there before, and takes what came after."""

import gc
import sys
import weakref

import pytest
import torch

from elite.training.heap import let_go, settled
from tests.training.failing import Fails


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


class Late:
    """Garbage that, when it is found, makes more."""

    def __init__(self, held: object) -> None:
        self.own, self.held = self, held

    def __del__(self) -> None:
        again = Node()
        vars(again)["held"] = self.held


def test_all_garbage_goes_that_other_garbage_makes() -> None:
    # The collector clears weak references before it is done; it leaves counts alone.
    held = object()
    alone = sys.getrefcount(held)
    Late(held)
    gc.collect()
    assert sys.getrefcount(held) == alone + 1
    Late(held)
    let_go()
    assert sys.getrefcount(held) == alone


def test_what_a_failed_backward_had_still_to_do_goes() -> None:
    x, kept = torch.ones(3, requires_grad=True), torch.ones(3)
    alive = weakref.ref(kept)
    # Made last, it goes back first.
    loss = (x * kept + Fails.apply(x)).sum()
    with torch.autograd.set_multithreading_enabled(False), pytest.raises(torch.OutOfMemoryError):
        loss.backward()
    del kept, loss
    gc.collect()
    assert alive() is not None
    let_go()
    assert alive() is None
