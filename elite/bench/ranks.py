"""What several GPUs of one machine bring, against one of them: `python -m elite.bench.ranks FILE [--ranks 2] [--only NAME …]`.

Each case is taken by one rank alone and by all, in processes of their own, on random weights and tokens, LoRA of rank 8 on every linear
map. Under `ring` all ranks carry one sequence together; under `ddp` and `zero3` each has its own, or several: `window` is the step that a
run takes unless it is told otherwise, of 65,536 tokens for two ranks, a sequence a pass; `together` the same with all of a rank's
sequences in one pass, which `training.micro_batch=auto` comes to. Steps after the first count. The bytes of keys and values are what lies
on one device for them: their rows, and those that are on their way between ranks.

`zero3_llama8b` trains all weights of a model that one rank alone has no room for, in the memory of a smaller card (`hardware.cap=memory`):
it is taken by all ranks only. That the cap holds is tried, by asking for more.

Multicast over NVLink stays off: it needs rights that containers often lack, and rings do not use it.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from elite.bench.assemble import Assembled, assembled, described, write
from elite.compose import from_overrides
from elite.config import Cap, RunConfig
from elite.console import console
from elite.executor.streamed.executor import StreamedExecutor
from elite.plan.batch import with_context
from elite.plan.words import gib
from elite.runfolder import environment
from elite.training.telemetry import pinned_bytes

STEPS = 3
"""The first warms up."""
LONG_STEP_S = 20.0
"""After a first step as long as this, one more must do."""
THREADS = 4
"""Of a rank on the host, unless the case has work for more."""
COMMON = ("model.weights=random", "adapter.rank=8", "training.max_steps=1", "training.preflight=false")
RING = (
    *(*COMMON, "executor=streamed", "optimizations.ring_attention.enabled=true"),
    *("executor.boundaries=device", "executor.block=16384"),
)
"""Short blocks, of which little is under way between ranks; rows on the device are not copied for each of them. Phi-2 at 262,144 tokens
takes 110 GB that way: `--with executor.boundaries=host` on smaller GPUs."""
DDP = (*COMMON, "executor=whole", "optimizations=standard")
ZERO3 = (
    *(*COMMON, "adapter.method=full", "executor=whole"),
    *("optimizations=extreme", "optimizations.adamw_8bit.enabled=false", "optimizations.zero_3.offload_optimizer=true"),
    *("hardware=rtx3090", "hardware.cap=memory"),
)
KEYS_VALUES = frozenset(f"{where}_{kind}" for where in ("keys_values", "shared") for kind in ("k", "v", "dk", "dv"))
"""Rows of the streamed executor."""
QUIET = {"NCCL_NVLS_ENABLE": "0"}


@dataclass(frozen=True)
class Case:
    """One comparison."""

    model: str
    tokens: int
    """Of a sequence."""
    overrides: tuple[str, ...]
    alone: bool = True
    """One rank has room for it."""
    threads: int = THREADS
    """Of a rank on the host."""
    passes: int = 1
    """Of a rank in a step, where it has sequences of its own: of `training.micro_batch` each."""


CASES = {
    "ddp_qwen_8k": Case("qwen25_coder_1_5b", 2**13, DDP),
    "ddp_qwen_8k_window": Case("qwen25_coder_1_5b", 2**13, DDP, passes=4),
    "ddp_qwen_8k_together": Case("qwen25_coder_1_5b", 2**13, (*DDP, "training.micro_batch=4")),
    "ring_qwen_128k": Case("qwen25_coder_1_5b", 2**17, RING),
    "ring_phi2_128k": Case("phi2", 2**17, RING),
    "ring_qwen_256k": Case("qwen25_coder_1_5b", 2**18, RING),
    "ring_phi2_256k": Case("phi2", 2**18, RING),
    # The optimizer's step is the host's.
    "zero3_llama8b": Case("llama31_8b", 2**13, ZERO3, alone=False, threads=16),
}


def compare(file: Path, names: list[str], counts: list[int], tokens: int | None, further: tuple[str, ...]) -> None:
    """These cases by so many ranks in turn; what has been taken is in the file when a later one fails.

    Args:
        tokens: of a sequence, instead of each case's own.
        further: overrides of every case.
    """
    runs = list[dict[str, Any]]()
    for name in names:
        for count in counts:
            if count == 1 and not CASES[name].alone:
                console.print(f"{name:16} 1 rank has no room for it")
                continue
            run = {"case": name, "environment": environment(), **_apart(name, count, tokens or CASES[name].tokens, further)}
            runs.append(run)
            write(file, {"runs": runs})
            step = run["steps"][-1]
            peak = gib(step.get("allocated_peak_bytes", 0))
            console.print(f"{name:16} {count} ranks {step['step_s']:8.2f} s {step['tokens_per_s']:9,.0f} tokens/s {peak}")


def _apart(name: str, count: int, tokens: int, further: tuple[str, ...]) -> dict[str, Any]:
    """What so many ranks find, in processes of their own.

    Raises:
        CalledProcessError: one of them failed; it has said why.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.json"
        asked = (str(file), "--member", name, "--tokens", str(tokens), "--with", *further)
        launched(count, "elite.bench.ranks", asked, CASES[name].threads)
        found: dict[str, Any] = json.loads(file.read_text())
        return found


def launched(count: int, module: str, asked: tuple[str, ...], threads: int = THREADS) -> None:
    """Run a module as so many ranks of this machine.

    Raises:
        CalledProcessError: one of them failed; it has said why.
    """
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", "-m", module)
    subprocess.run((*launcher, *asked), check=True, env=os.environ | QUIET | {"OMP_NUM_THREADS": str(threads)})


def member(case: Case, tokens: int, further: tuple[str, ...], count: int, file: Path) -> None:
    """One rank's part of a case; the first writes what all found."""
    began = time.perf_counter()
    config = from_overrides(f"model={case.model}", *case.overrides, f"hardware.gpus={count}", *further).config
    with assembled(_scaled(config, tokens, count * case.passes)) as made:
        ready_s, holds = time.perf_counter() - began, cap_holds(made)
        steps = [_step(made, case.passes)]
        while len(steps) < (2 if steps[0]["step_s"] > LONG_STEP_S else STEPS):
            steps.append(_step(made, case.passes))
        if made.ranks.is_main:
            shared = {"ranks": made.ranks.world, "sharing": made.sharing, "passes": case.passes}
            write(file, described(made) | shared | {"ready_s": ready_s, "cap_holds": holds, "steps": steps})
        # None leaves while another still needs it.
        made.ranks.barrier()


def cap_holds(made: Assembled) -> bool | None:
    """Whether a capped process is refused more device memory than the card has that it stands for; None without a cap."""
    if made.config.hardware.cap is Cap.none or made.ranks.device.type != "cuda":
        return None
    try:
        torch.empty(int(made.plan.usable_bytes), dtype=torch.uint8, device=made.ranks.device)
    except torch.OutOfMemoryError:
        return True
    return False


def _scaled(config: RunConfig, tokens: int, passes: int) -> RunConfig:
    """One sequence a step, or so many passes where ranks do not share it."""
    sequences, config = config.training.sequences, with_context(config, tokens)
    if config.optimizations.ring_attention.enabled:
        return config
    training = dataclasses.replace(config.training, micro_batch=sequences, global_batch_tokens=tokens * sequences * passes)
    return dataclasses.replace(config, training=training)


def _step(made: Assembled, passes: int) -> dict[str, float]:
    """Figures of all ranks: the slowest's time, the highest peaks, the tokens of the whole step."""
    ranks, one = made.ranks, made.step(passes)
    if ranks.device.type == "cuda":
        # By the driver's account; torch gives nothing back meanwhile.
        free, total = torch.cuda.mem_get_info(ranks.device)
        one |= {"device_bytes": total - free, "host_pinned_bytes": pinned_bytes(0, ranks.device)}
    found = {name: ranks.max(value) for name, value in one.items()}
    found["tokens_per_s"] = made.plan.context * made.plan.micro_batch * passes * (ranks.world // made.sharing) / found["step_s"]
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
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="how many take each case, in turn")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--tokens", type=int, help="of a sequence, instead of each case's own")
    parser.add_argument("--with", nargs="*", default=[], dest="further", metavar="OVERRIDE", help="overrides of every case")
    parser.add_argument("--member", choices=CASES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    further = tuple(arguments.further)
    if arguments.member is not None:
        member(CASES[arguments.member], arguments.tokens, further, int(os.environ["WORLD_SIZE"]), arguments.file)
    else:
        compare(arguments.file, arguments.only, arguments.ranks, arguments.tokens, further)


if __name__ == "__main__":
    main()
