"""Three steps of a tiny model in one of the ways in which several GPUs train together, assembled as a run is: one rank of them.

`python -m torch.distributed.run --nproc-per-node=2 -m tests.distributed.on_gpus NAME MODEL FILE`; a name of `ALONE` with one process.
MODEL is what `save_model` has written: weights drawn on a GPU are others than those drawn in host memory, which some ways load to.
"""

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from elite import geometry
from elite.bench.assemble import Assembled, assembled, write
from elite.compose import from_overrides
from elite.data.batches import Batch, random_batch
from elite.distributed.gradients import gradient_exchange
from elite.distributed.ranks import place
from elite.training.step import make_scaler, optimizer_step

STEPS, SEQUENCES = 3, 2
COMMON = ("debug=tiny", "optimizations=standard", "training.preflight=false", "training.learning_rate=1e-3", "tier.lora_rank=8")
ALONE = {
    "adapters": ("executor=whole",),
    "full": ("executor=whole", "adapter.method=full"),
    "streamed": ("executor=streamed", "executor.chunk=64", "executor.block=64"),
    "four bits": ("executor=whole", "optimizations.qlora.enabled=true"),
}
"""What one rank does."""
OFFLOADED = ("optimizations.zero_3.offload_optimizer=true", "optimizations.zero_3.offload_parameters=true")
RING, GATHERED = "optimizations.ring_attention.enabled=true", "optimizations.ring_attention.variant=all_gather"
ZERO_2, ZERO_3 = "optimizations.zero_2.enabled=true", "optimizations.zero_3.enabled=true"


@dataclass(frozen=True)
class Way:
    """What several ranks do."""

    alone: str
    """One rank does the same so."""
    overrides: tuple[str, ...] = ()
    exact_steps: int = STEPS
    """As many first ones are one rank's but for rounding."""


WAYS = {
    "ddp": Way("adapters"),
    "ddp full": Way("full"),
    # Two exchanges are plain.
    "power_sgd": Way("full", ("optimizations.power_sgd.enabled=true", "optimizations.power_sgd.start_iteration=2"), exact_steps=2),
    "ring": Way("adapters", (RING,)),
    "ring all_gather": Way("adapters", (RING, GATHERED)),
    "ring streamed": Way("streamed", (RING,)),
    "ring streamed all_gather": Way("streamed", (RING, GATHERED)),
    "tensor_parallel": Way("adapters", ("optimizations.tensor_parallel.enabled=true", "optimizations.fused_lora.enabled=false")),
    "zero_2": Way("full", (ZERO_2,)),
    "zero_2 offloaded": Way("full", (ZERO_2, "optimizations.zero_2.offload_optimizer=true")),
    "zero_2 streamed": Way("streamed", (ZERO_2,)),
    "zero_3": Way("full", (ZERO_3,)),
    "zero_3 offloaded": Way("full", (ZERO_3, *OFFLOADED)),
    "zero_3 adapters": Way("adapters", (ZERO_3, *OFFLOADED)),
    "zero_3 four bits": Way("four bits", (ZERO_3,)),
    "zero_3 ring": Way("adapters", (ZERO_3, RING)),
}


def steps(made: Assembled) -> dict[str, list[float]]:
    """Losses and gradient norms of steps over the same sequences, whoever has them."""
    batches, ranks = _own(made), made.carriers
    found: dict[str, list[float]] = {"losses": [], "norms": []}
    for _ in range(STEPS):
        scaler, norm = make_scaler(ranks.device, made.dtype), made.config.training.max_grad_norm
        done = optimizer_step(made.executors.training, made.optimizer, scaler, batches, made.loaded.trainable, norm, ranks)
        found["losses"].append(done.loss)
        found["norms"].append(done.grad_norm)
    return found


def _own(made: Assembled) -> list[Batch]:
    """This rank's part of the step's sequences."""
    seeds = [torch.Generator().manual_seed(seed) for seed in range(SEQUENCES)]
    batches = [random_batch(1, made.plan.context, made.vocab, seed) for seed in seeds]
    if made.sharing > 1:
        return [batch.shared(made.ranks.rank, made.sharing) for batch in batches]
    return batches[made.carriers.rank :: made.carriers.world]


def save_model(folder: Path) -> None:
    """The model that all ways begin with."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(geometry.hf_config(from_overrides(*COMMON).config.model)).save_pretrained(folder)


def main(name: str, model: Path, file: Path) -> None:
    """One rank's part."""
    way = WAYS.get(name) or Way(name)
    loaded = ("model.weights=pretrained", f"model.path={model}")
    config = from_overrides(*COMMON, *loaded, *ALONE[way.alone], *way.overrides, f"hardware.gpus={place()[2]}").config
    # A kernel that is being measured beside others is not to be remembered.
    config = dataclasses.replace(config, output=dataclasses.replace(config.output, cache=str(file.with_suffix(f".{place()[1]}"))))
    with assembled(config) as made:
        found = steps(made)
        wrapper = type(gradient_exchange(made.executors.training.model)).__name__
        if made.ranks.is_main:
            active = [switch.name for switch in made.plan.decisions if switch.active]
            write(file, found | {"active": active, "exchange": wrapper})
        made.ranks.barrier()


if __name__ == "__main__":
    main(sys.argv[1], *map(Path, sys.argv[2:]))
