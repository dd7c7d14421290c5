"""Ranks as forks of the test's process: a group of them costs milliseconds, not another import of torch each."""

import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from elite.distributed.ranks import Ranks


def forked(count: int, folder: Path, work: Callable[[Ranks], Any]) -> list[Any]:
    """What `work` returns on each of so many ranks of a gloo group."""
    folder.mkdir(parents=True, exist_ok=True)
    children = []
    for rank in range(count):
        children.append(os.fork())
        if children[-1] == 0:
            _child(rank, count, folder, work)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    said = [(folder / f"{rank}.txt").read_text() for rank in range(count) if (folder / f"{rank}.txt").exists()]
    assert codes == [0] * count, "\n".join(said)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(count)]


def _child(rank: int, count: int, folder: Path, work: Callable[[Ranks], Any]) -> None:
    code = 1
    try:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=count)
        torch.save(work(Ranks(rank, count, torch.device("cpu"))), folder / f"{rank}.pt")
        torch.distributed.barrier()
        code = 0
    except BaseException:
        (folder / f"{rank}.txt").write_text(traceback.format_exc())
    finally:
        os._exit(code)
