"""Every way of several GPUs through NCCL, on two GPUs of this machine: losses and gradient norms of a tiny model are one GPU's.

All begin at once, each in processes of its own, so that one that fails or stands still takes none of the others along.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.on_gpus import ALONE, WAYS, save_model

pytestmark = pytest.mark.gpu
LONGEST_SECONDS = 120
"""From the beginning of all."""
LAST_LINES = 4
"""Of what a failed one said."""
LOSS, NORM = 5e-3, 3e-2
"""What roundings of bf16 in another order may change of a loss, in nats, and of a norm, as a share of it."""


@dataclass
class Started:
    """Ranks at work, and where they write."""

    process: subprocess.Popen[bytes]
    file: Path
    log: Path

    @classmethod
    def ranks(cls, name: str, count: int, model: Path, folder: Path) -> "Started":
        """Of one way."""
        file, log = folder / f"{name}.json", folder / f"{name}.log"
        launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}")
        environment = os.environ | {"NCCL_NVLS_ENABLE": "0", "OMP_NUM_THREADS": "1"}
        with log.open("wb") as said:
            command = (*launcher, "-m", "tests.distributed.on_gpus", name, str(model), str(file))
            process = subprocess.Popen(command, stdout=said, stderr=said, env=environment, start_new_session=True)
        return cls(process, file, log)

    def found(self, until: float) -> dict[str, Any]:
        """What they found, by then."""
        try:
            self.process.wait(max(1.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.end()
            pytest.fail(f"stood still:\n{self._said()}")
        assert self.process.returncode == 0, self._said()
        found: dict[str, Any] = json.loads(self.file.read_text())
        return found

    def end(self) -> None:
        """With all its children."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def _said(self) -> str:
        lines = [line for line in self.log.read_text().splitlines() if "Error" in line and "ChildFailedError" not in line]
        return "\n".join(lines[:LAST_LINES] or self.log.read_text().splitlines()[-LAST_LINES:])


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[dict[str, Started], float]]:
    """All of them, and when the last must be done."""
    if torch.cuda.device_count() < 2:
        pytest.skip("two GPUs")
    folder, model = tmp_path_factory.mktemp("gpus"), tmp_path_factory.mktemp("model")
    save_model(model)
    counts = dict.fromkeys(ALONE, 1) | dict.fromkeys(WAYS, 2)
    made = {name: Started.ranks(name, count, model, folder) for name, count in counts.items()}
    yield made, time.monotonic() + LONGEST_SECONDS
    for one in made.values():
        one.end()


@pytest.mark.parametrize("name", WAYS)
def test_two_gpus_are_one(name: str, started: tuple[dict[str, Started], float]) -> None:
    (all_of_them, until), way = started, WAYS[name]
    found, alone = all_of_them[name].found(until), all_of_them[way.alone].found(until)
    switches = {override.split(".")[1] for override in way.overrides if override.endswith(".enabled=true")}
    assert switches <= set(found["active"])
    print(f"{name}: losses {found['losses']}, alone {alone['losses']}; norms {found['norms']}, alone {alone['norms']}")
    assert found["losses"][: way.exact_steps] == pytest.approx(alone["losses"][: way.exact_steps], abs=LOSS)
    assert found["norms"][: way.exact_steps] == pytest.approx(alone["norms"][: way.exact_steps], rel=NORM)
    assert found["losses"] == pytest.approx(alone["losses"], abs=0.1) and alone["losses"][-1] < alone["losses"][0]
