"""Which core a thread times its work on."""

import os

import pytest

from elite.bench import calm
from elite.bench.calm import CALM, CalmCores

pytestmark = pytest.mark.skipif(not hasattr(os, "sched_setaffinity") or len(os.sched_getaffinity(0)) < 2, reason="there is but one core")


def test_a_thread_moves_to_a_core_that_is_calm_and_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    everywhere = os.sched_getaffinity(0)
    first, second, *_ = sorted(everywhere)
    slow: dict[int, float] = {}
    monkeypatch.setattr(calm, "_loop_s", lambda: slow.get(min(os.sched_getaffinity(0)), 1.0))
    cores = CalmCores()
    with cores.chosen():
        cores.settle()
        assert os.sched_getaffinity(0) == {first}
        slow[first] = 2 * CALM
        cores.settle()
        assert os.sched_getaffinity(0) == {second}
        # It stays as long as it can.
        slow.clear()
        cores.settle()
        assert os.sched_getaffinity(0) == {second}
        # None is calm: the least busy.
        slow.update(dict.fromkeys(everywhere, 3 * CALM) | {first: 2 * CALM})
        cores.settle()
        assert os.sched_getaffinity(0) == {first}
    assert os.sched_getaffinity(0) == everywhere


def test_a_failure_lets_a_thread_go() -> None:
    everywhere, cores = os.sched_getaffinity(0), CalmCores()
    with pytest.raises(ValueError, match="of the step"), cores.chosen():
        cores.settle()
        raise ValueError("of the step")
    assert os.sched_getaffinity(0) == everywhere
