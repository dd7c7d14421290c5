"""A run that goes on on another number of ranks: the same global batches, dealt otherwise.

Ranks take consecutive sequences of one stream, so a step is the same sequences however many ranks share them, as long as each has equally
many. Losses are normalised over all of a step's tokens: the gradient is the same sum in another order. Random numbers, of dropout, are
drawn by each rank for itself, and so are others.
"""

from dataclasses import replace
from typing import Any

from elite.config import Executor, RunConfig
from elite.errors import CheckpointError
from elite.facts import Corpus, Device, ModelShape
from elite.optimizations.adamw_8bit import AdamW8bit
from elite.optimizations.ring_attention import RingAttention
from elite.optimizations.tensor_parallel import TensorParallel
from elite.optimizations.zero_2 import ZeRO2
from elite.optimizations.zero_3 import ZeRO3
from elite.plan import make_plan
from elite.plan.batch import accumulation_for

DIVIDING = {ZeRO2.name, ZeRO3.name}
"""What acts or not as there are ranks to divide with."""
OF_THE_RANKS = (
    *("ranks", "decisions", "micro_batch", "accumulation", "device", "device_kind", "device_present", "device_capped"),
    *("memory", "total_bytes", "needed_bytes", "ahead_bytes", "reserved_bytes", "device_bytes", "usable_bytes", "headroom_bytes"),
    "checkpoint_bytes",
    *("host_bytes", "host_usable_bytes", "corpus_bytes", "disk_bytes"),
    *("step_flops", "step_s", "time", "exchanged", "rates", "tokens_per_s", "mfu", "epoch_s", "run_s", "stages"),
)
"""What of a plan is said of each rank, or of what they do together; all else is the run's own and stays."""


def redealt(begun: RunConfig, plan: dict[str, Any], device: Device, shape: ModelShape) -> tuple[RunConfig, dict[str, Any]]:
    """The run's configuration and plan with its steps dealt to the ranks that are here.

    Args:
        plan: as in `plan.json`.
        device: this machine, with as many ranks as are asked for.

    Raises:
        CheckpointError: it would be another run, or does not fit.
    """
    missing = [
        name for name in ("ranks", "micro_batch", "accumulation", "step_tokens", "executor", "corpus", "decisions") if name not in plan
    ]
    if missing:
        problem = f"the run's plan does not say its {missing[0]}: it is of an older version, or damaged"
        raise CheckpointError(problem, "go on with as many ranks as it was begun on, or resume=never")
    before, count = plan["ranks"], device.count
    stays = f"hardware.gpus={before}, or resume=never"
    where = f"the run was begun on {before} ranks, here are {count}"
    # Ranks that share each sequence, or divide each layer, carry all of them together.
    shared = any(one["name"] in (RingAttention.name, TensorParallel.name) and one["active"] for one in plan["decisions"])
    sequences = plan["accumulation"] * plan["micro_batch"] * (1 if shared else before)
    if not shared and sequences % count:
        raise CheckpointError(f"{where}: a step's {sequences} sequences cannot be dealt equally to {count} ranks", stays)
    own = sequences if shared else sequences // count
    micro_batch = own // accumulation_for(own, plan["micro_batch"])
    config = replace(
        begun,
        hardware=replace(begun.hardware, gpus=count),
        training=replace(begun.training, micro_batch=micro_batch, global_batch_tokens=plan["step_tokens"]),
        executor=replace(begun.executor, name=Executor(plan["executor"])),
    )
    made = make_plan(config, device, shape, Corpus(**plan["corpus"]))
    if not made.fits:
        raise CheckpointError(f"{where}: that does not fit ({made.shortage})", stays)
    now, then = ({one["name"] for one in found["decisions"] if one["active"]} for found in (made.to_dict(), plan))
    if now & then & {AdamW8bit.name} and (now | then) & DIVIDING:
        problem = f"{where}: what optimizations.{AdamW8bit.name} keeps lies in blocks of 8 bits on the ranks that divided it"
        raise CheckpointError(problem, stays)
    # Who holds what is no matter of the mathematics.
    if (now ^ then) - DIVIDING:
        differing = ", ".join(f"optimizations.{name}" for name in sorted((now ^ then) - DIVIDING))
        raise CheckpointError(f"{where}: {differing} would act on one number of ranks and not on the other", stays)
    again = replace(begun, hardware=config.hardware)
    return again, plan | {name: value for name, value in made.to_dict().items() if name in OF_THE_RANKS}
