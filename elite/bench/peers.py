"""The streamed executor against the recipe of its peers, side by side: `python -m elite.bench.peers FILE [--contexts N …]`.

Recipe: the whole executor with Liger's kernels, checkpoint offload, tiled MLP and fused loss, as ALST and Unsloth train long contexts.
Both use Liger's elementwise kernels and LoRA of rank 8 on every linear map. The second step of each is timed. With the same kernels'
rates, measured in the same run, the floor of a step is computed: attention forward and backward once, linear maps three times, the
head twice, nothing else. Where the streamed step's time goes comes from a profile of a further step.
"""

import argparse
import gc
import time
from pathlib import Path
from typing import Any

import torch

from elite.bench.assemble import Assembled, assembled, described, write
from elite.bench.profile import profiled, sdpa_kernels
from elite.compose import from_overrides
from elite.console import console
from elite.executor.streamed.choose import fastest, rates
from elite.executor.streamed.kernels import AttentionShape
from elite.plan.batch import with_context
from elite.plan.words import gib
from elite.runfolder import environment

COMMON = (
    "model=qwen25_coder_1_5b",
    "model.weights=random",
    "adapter.rank=8",
    "training.max_steps=1",
    "optimizations.liger_kernels.enabled=true",
)
RECIPE = (
    *COMMON,
    "executor=whole",
    "optimizations.gradient_checkpointing.enabled=false",
    "optimizations.fused_lora.enabled=false",
    "optimizations.checkpoint_offload.enabled=true",
    "optimizations.tiled_mlp.enabled=true",
)
STREAMED = (*COMMON, "executor=streamed", "executor.weights=streamed", "executor.keep=attention", "executor.chunk=16384")
WARM_S = 3.0
"""Rates are taken at the clocks of a long step, which are lower than those of a short burst."""
MATMUL_CALLS_A_SECOND = 1000
"""Roughly, so that products too run warm."""
MATMUL_TOKENS = 16384
"""Rows of the matrix product whose rate stands for all linear maps."""


def compare(contexts: list[int]) -> dict[str, Any]:
    """Both executors at every context; figures of every step."""
    found: dict[str, Any] = {"environment": environment(), "runs": [], "floors": []}
    for name, overrides in (("recipe", RECIPE), ("streamed", STREAMED)):
        for tokens in contexts:
            run = _measured(name, overrides, tokens)
            # A model is a web of references, which only the collector undoes; it would count in the next one's peak.
            gc.collect()
            torch.cuda.empty_cache()
            found["runs"].append(run)
            second = run["steps"][1]
            peak = gib(second["allocated_peak_bytes"])
            console.print(f"{name:9} {tokens:8,}  {second['step_s']:7.2f} s  {second['tokens_per_s']:8,.0f} tokens/s  {peak}")
    found["rates"] = _rates()
    found["floors"] = [{"context": tokens, "step_s": _floor(found["rates"], tokens)} for tokens in contexts]
    return found


def _measured(name: str, overrides: tuple[str, ...], tokens: int) -> dict[str, Any]:
    config = with_context(from_overrides(*overrides).config, tokens)
    with assembled(config) as made:
        steps = [made.step() for _ in range(2)]
        run = {"name": name, **described(made), "steps": steps}
        if name == "streamed":
            assert made.executors.attached is not None
            run["host_pinned_bytes"] = made.executors.attached.runner.host_bytes()
            run["profile"] = profiled(made.step) if tokens >= 2**16 else None
        else:
            run["sdpa"] = _sdpa(made)
    return run


def _sdpa(made: Assembled) -> list[str]:
    """Names of the kernels that torch's attention runs for this model's shape."""
    config = made.loaded.core.config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    return sdpa_kernels(heads, kv_heads, config.hidden_size // heads, made.dtype, made.ranks.device)


def _rates() -> dict[str, float]:
    """TFLOP/s of the streamed run's attention kernel on its chunks and of a matrix product of its shape."""
    device, config = torch.device("cuda"), from_overrides(*STREAMED).config
    model, chunk = config.model, config.executor.chunk or MATMUL_TOKENS
    head_dim = model.hidden_size // model.num_attention_heads
    shape = AttentionShape(model.num_attention_heads, model.num_key_value_heads, head_dim, torch.bfloat16)
    kernel = fastest(shape, device, Path(from_overrides(*STREAMED).config.output.cache).expanduser(), chunk, 4 * chunk)
    began = time.perf_counter()
    while time.perf_counter() - began < WARM_S:
        rates(shape, device, kernel, chunk, 4 * chunk)
    found = rates(shape, device, kernel, chunk, 4 * chunk)
    a = torch.randn(MATMUL_TOKENS, model.hidden_size, device=device, dtype=torch.bfloat16)
    b = torch.randn(model.intermediate_size, model.hidden_size, device=device, dtype=torch.bfloat16)
    for _ in range(int(WARM_S * MATMUL_CALLS_A_SECOND)):
        a @ b.t()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(20):
        a @ b.t()
    end.record()
    end.synchronize()
    return found | {"matmul": 20 * 2 * a.shape[0] * b.numel() / begin.elapsed_time(end) / 1e9}


def _floor(rate: dict[str, float], tokens: int) -> float:
    """Seconds of a step in which only matrix products and attention kernels run, at the rates measured."""
    model = from_overrides(*STREAMED).config.model
    hidden, keys = model.hidden_size, model.num_key_value_heads * model.hidden_size // model.num_attention_heads
    linear = 2 * hidden * hidden + 2 * hidden * keys + 3 * hidden * model.intermediate_size
    chunk = min(MATMUL_TOKENS, tokens)
    pairs = {"diagonal": tokens * chunk / 2, "prefix": tokens * (tokens - chunk) / 2}
    # A pair costs 4·H·D operations forward and 10·H·D backward; H·D is the hidden size here.
    attention = sum(hidden * n * (4 / rate[f"{kind}_forward"] + 10 / rate[f"{kind}_backward"]) for kind, n in pairs.items())
    matrices = 2 * tokens * (3 * model.num_hidden_layers * linear + 2 * hidden * model.vocab_size) / rate["matmul"]
    return (model.num_hidden_layers * attention + matrices) / 1e12


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--contexts", type=int, nargs="+", default=[2**15, 2**16, 2**17, 2**18])
    arguments = parser.parse_args()
    write(arguments.file, compare(arguments.contexts))


if __name__ == "__main__":
    main()
