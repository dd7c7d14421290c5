"""What several GPUs of one machine bring, against one of them: `python -m elite.bench.ranks FILE [--ranks 2] [--only NAME …]`.

Each case is taken by one rank alone and by all, in processes of their own, on random weights and tokens, LoRA of rank 8 on every linear
map. Under `ring` all ranks carry one sequence together; under `ddp` each has its own. Steps after the first count. The bytes of keys and
values are what lies on one device for them: their rows, and those that are on their way between ranks.

Multicast over NVLink stays off: it needs rights that containers often lack, and rings do not use it.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elite.bench.assemble import Assembled, assembled, described, write
from elite.compose import from_overrides
from elite.config import RunConfig
from elite.console import console
from elite.executor.streamed.executor import StreamedExecutor
from elite.plan.batch import with_context
from elite.plan.words import gib
from elite.runfolder import environment

STEPS = 3
"""The first warms up."""
LONG_STEP_S = 20.0
"""After a first step as long as this, one more must do."""
COMMON = ("model.weights=random", "adapter.rank=8", "training.max_steps=1", "training.preflight=false")
RING = (*COMMON, "executor=streamed", "optimizations.ring_attention.enabled=true")
DDP = (*COMMON, "executor=whole", "optimizations=standard")
KEYS_VALUES = frozenset(f"{where}_{kind}" for where in ("keys_values", "shared") for kind in ("k", "v", "dk", "dv"))
"""Rows of the streamed executor."""
QUIET = {"NCCL_NVLS_ENABLE": "0", "OMP_NUM_THREADS": "4"}


@dataclass(frozen=True)
class Case:
    """One comparison."""

    model: str
    tokens: int
    """Of a sequence."""
    overrides: tuple[str, ...]


CASES = {
    "ddp_qwen_8k": Case("qwen25_coder_1_5b", 2**13, DDP),
    "ring_qwen_128k": Case("qwen25_coder_1_5b", 2**17, RING),
    "ring_phi2_128k": Case("phi2", 2**17, RING),
    "ring_qwen_256k": Case("qwen25_coder_1_5b", 2**18, RING),
    "ring_phi2_256k": Case("phi2", 2**18, RING),
}


def compare(names: list[str], ranks: int, tokens: int | None, further: tuple[str, ...]) -> dict[str, Any]:
    """These cases by one rank and by all; what the file gets.

    Args:
        tokens: of a sequence, instead of each case's own.
        further: overrides of every case.
    """
    runs = []
    for name in names:
        for count in (1, ranks):
            run = {"case": name, **_apart(name, count, tokens or CASES[name].tokens, further)}
            runs.append(run)
            step = run["steps"][-1]
            peak = gib(step.get("allocated_peak_bytes", 0))
            console.print(f"{name:16} {count} ranks {step['step_s']:8.2f} s {step['tokens_per_s']:9,.0f} tokens/s {peak}")
    return {"environment": environment(), "ranks": ranks, "runs": runs}


def _apart(name: str, count: int, tokens: int, further: tuple[str, ...]) -> dict[str, Any]:
    """What so many ranks find, in processes of their own.

    Raises:
        CalledProcessError: one of them failed; it has said why.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.json"
        launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", "-m", "elite.bench.ranks")
        asked = (str(file), "--member", name, "--tokens", str(tokens), "--with", *further)
        subprocess.run((*launcher, *asked), check=True, env=os.environ | QUIET)
        found: dict[str, Any] = json.loads(file.read_text())
        return found


def member(case: Case, tokens: int, further: tuple[str, ...], count: int, file: Path) -> None:
    """One rank's part of a case; the first writes what all found."""
    config = from_overrides(f"model={case.model}", *case.overrides, f"hardware.gpus={count}", *further).config
    with assembled(_scaled(config, tokens, count)) as made:
        steps = [_step(made)]
        while len(steps) < (2 if steps[0]["step_s"] > LONG_STEP_S else STEPS):
            steps.append(_step(made))
        if made.ranks.is_main:
            write(file, {**described(made), "ranks": made.ranks.world, "sharing": made.sharing, "steps": steps})
        # None leaves while another still needs it.
        made.ranks.barrier()


def _scaled(config: RunConfig, tokens: int, count: int) -> RunConfig:
    """One sequence a step, or one for each rank where they do not share it."""
    config = with_context(config, tokens)
    if config.optimizations.ring_attention.enabled:
        return config
    return dataclasses.replace(config, training=dataclasses.replace(config.training, global_batch_tokens=tokens * count))


def _step(made: Assembled) -> dict[str, float]:
    """Figures of all ranks: the slowest's time, the highest peaks, the tokens of the whole step."""
    ranks, one = made.ranks, made.step()
    found = {name: ranks.max(value) for name, value in one.items()}
    found["tokens_per_s"] = made.plan.context * made.plan.micro_batch * (ranks.world // made.sharing) / found["step_s"]
    executor = made.executors.training
    if isinstance(executor, StreamedExecutor):
        assert made.executors.attached is not None
        passing = 0 if executor.sharing is None else executor.sharing.held_bytes
        rows = made.executors.attached.runner.allocator.device_bytes(KEYS_VALUES)
        found["keys_values_bytes"] = ranks.max(float(rows + passing))
    return found


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--tokens", type=int, help="of a sequence, instead of each case's own")
    parser.add_argument("--with", nargs="*", default=[], dest="further", metavar="OVERRIDE", help="overrides of every case")
    parser.add_argument("--member", choices=CASES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    further = tuple(arguments.further)
    if arguments.member is not None:
        member(CASES[arguments.member], arguments.tokens, further, int(os.environ["WORLD_SIZE"]), arguments.file)
    else:
        write(arguments.file, compare(arguments.only, arguments.ranks, arguments.tokens, further))


if __name__ == "__main__":
    main()
