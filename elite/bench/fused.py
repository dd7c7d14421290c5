"""What fused kernels change of a whole step: `python -m elite.bench.fused FILE`.

LoRA of rank 8 on every linear map, random weights and tokens, gradient checkpointing. Phi-2's geometry with the preset `standard` with and
without `fused_kernels`; Qwen2.5-1.5B's besides against Liger's kernels in the same run and against what people run without this project:
transformers and peft with liger-kernel's own patch, its fused loss included. One sequence a step; of short ones, with which the GPU waits
for the host, several in one pass as well. A profile of one further step says how much of it that wait is.
"""

import argparse
import dataclasses
import gc
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from elite import geometry
from elite.bench.assemble import assembled, described, peaks, reset_peak, synchronise, write
from elite.bench.profile import profiled
from elite.compose import from_overrides
from elite.console import console
from elite.plan.batch import with_context
from elite.plan.words import gib
from elite.runfolder import environment
from elite.training.heap import settled

STEPS = 12
"""The first warms up, the others count; short steps wait for the host, whose times scatter."""
RANK = 8
COMMON = ("model.weights=random", f"adapter.rank={RANK}", "training.max_steps=1", "executor=whole", "optimizations=standard")
FUSED = "optimizations.fused_kernels.enabled=true"
UNFUSED = "optimizations.fused_kernels.enabled=false"
LIGER = "optimizations.liger_kernels.enabled=true"
CASES = (
    ("phi2", 4096, 1, {"unfused": (UNFUSED,), "fused": (FUSED,)}),
    ("phi2", 4096, 4, {"unfused": (UNFUSED,), "fused": (FUSED,)}),
    ("phi2", 16384, 1, {"unfused": (UNFUSED,), "fused": (FUSED,)}),
    ("qwen25_coder_1_5b", 16384, 1, {"unfused": (UNFUSED,), "fused": (FUSED,), "liger": (UNFUSED, LIGER)}),
)
"""Model, tokens of a sequence, sequences of a pass, and what is compared."""
PEER = "transformers, peft, liger-kernel"


def compare() -> dict[str, Any]:
    """Every case and the peer; what the file gets."""
    runs = []
    for model, tokens, sequences, choices in CASES:
        for name, overrides in choices.items():
            runs.append({"name": name, **_measured((f"model={model}", *COMMON, *overrides), tokens, sequences)})
            _said(runs[-1])
            # A model is a web of references, which only the collector undoes; it would count in the next one's peak.
            gc.collect()
            torch.cuda.empty_cache()
    # Last: liger-kernel's patch reaches other models of the process too.
    runs.append({"name": PEER, **_peer(*CASES[-1][:2])})
    _said(runs[-1])
    return {"environment": environment(), "runs": runs}


def _measured(overrides: tuple[str, ...], tokens: int, sequences: int) -> dict[str, Any]:
    config = with_context(from_overrides(*overrides).config, tokens)
    training = dataclasses.replace(config.training, micro_batch=sequences, global_batch_tokens=sequences * tokens)
    with assembled(dataclasses.replace(config, training=training)) as made:
        applied = {name: f"{one.count} {one.detail}" for name, one in made.loaded.applied.items()}
        steps = [made.step() for _ in range(STEPS)]
        return {**described(made), "applied": applied, "steps": steps, "profile": profiled(made.step)}


def _peer(model: str, tokens: int) -> dict[str, Any]:
    """The step that the libraries' own documentation describes, without any part of this project."""
    from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    device, chosen = torch.device("cuda"), from_overrides(f"model={model}").config.model
    with device:
        core = AutoModelForCausalLM.from_config(geometry.hf_config(chosen), dtype=torch.bfloat16, attn_implementation="sdpa")
    _apply_liger_kernel_to_instance(model=core)
    adapted: Any = get_peft_model(core, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM"))
    core.gradient_checkpointing_enable({"use_reentrant": False})
    core.config.use_cache = False
    adapted.train()
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-4, fused=True)
    ids = torch.randint(chosen.vocab_size, (1, tokens), device=device)

    def step() -> None:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = adapted(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    with settled():
        steps = [_timed(step, tokens, device) for _ in range(STEPS)]
    facts = {"name": model, "weights": "random", "adapter": f"lora, rank {RANK}", "num_hidden_layers": chosen.num_hidden_layers}
    return {"model": facts, "device": torch.cuda.get_device_name(), "context": tokens, "micro_batch": 1, "active": [], "steps": steps}


def _timed(step: Callable[[], None], tokens: int, device: torch.device) -> dict[str, float]:
    reset_peak(device)
    synchronise(device)
    began = time.perf_counter()
    step()
    synchronise(device)
    seconds = time.perf_counter() - began
    return {"step_s": seconds, "tokens_per_s": tokens / seconds} | peaks(device)


def _said(run: dict[str, Any]) -> None:
    seconds, rate = (median(step[name] for step in run["steps"][1:]) for name in ("step_s", "tokens_per_s"))
    peak, batch = max(step["allocated_peak_bytes"] for step in run["steps"]), run["micro_batch"]
    console.print(f"{run['model']['name']:18} {batch} × {run['context']:7,} {run['name']:34} {seconds:7.3f} s {rate:9,.0f} {gib(peak)}")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    write(parser.parse_args().file, compare())


if __name__ == "__main__":
    main()
