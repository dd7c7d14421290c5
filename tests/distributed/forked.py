"""Several ranks as forks of the test's process: torch is imported once, and gloo meets in a file."""

import faulthandler
import os
import signal
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from elite.distributed.ranks import Ranks

Work = Callable[[Ranks, Path], Any]
"""What a rank does in a folder that it shares with the others; returns tensors and plain values."""
LONGEST_SECONDS = 300
"""A fork that stands still ends by then and says where: a lock that another thread held at the fork is never let go in it."""


def together(folder: Path, world: int, work: Work, environment: Callable[[int], dict[str, str]] | None = None) -> list[Any]:
    """What each of `world` ranks finds, by rank.

    Args:
        environment: of a rank, as a launcher sets it; the work itself joins the others. Unset: they have met before it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    children = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            _child(folder, rank, world, work, environment)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    said = "\n".join(path.read_text() for path in sorted(folder.glob("failed_*.txt")))
    assert not any(codes), f"{codes}\n{said}"
    return [torch.load(folder / f"found_{rank}.pt") for rank in range(world)]


def assert_one_ranks(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], *words: object) -> None:
    """Gradients by parameter are those of one rank, to 1e-5 each."""
    assert found.keys() == expected.keys(), words
    # A key's bias has no gradient but rounding: softmax does not see it.
    most = max(gradient.norm().item() for gradient in expected.values())
    for name, gradient in expected.items():
        error = (found[name] - gradient).norm().item()
        assert error <= max(1e-5 * gradient.norm().item(), 1e-7 * most), (*words, name, error)


def _child(folder: Path, rank: int, world: int, work: Work, environment: Callable[[int], dict[str, str]] | None) -> None:
    code, stacks = 1, (folder / f"failed_{rank}.txt").open("w")
    # By a signal, which needs no lock of the parent's threads; chained to what it does by default, which is to end the process.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    faulthandler.register(signal.SIGALRM, file=stacks, chain=True)
    signal.alarm(LONGEST_SECONDS)
    try:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        torch.set_num_threads(1)
        if environment is None:
            dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
        else:
            os.environ.update(environment(rank))
        torch.save(work(Ranks(rank, world, torch.device("cpu")), folder), folder / f"found_{rank}.pt")
        code = 0
    except BaseException:
        stacks.write(traceback.format_exc())
        stacks.flush()
    finally:
        # Nothing of the test's process, which is the parent's, runs on.
        os._exit(code)
