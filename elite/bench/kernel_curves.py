"""Loss curves with and without each fused kernel, on the same real batches: `python -m elite.bench.kernel_curves FILE [--steps N]`.

The pretrained SmolLM2 (RMS norm, whole rotary embedding, SwiGLU) with adapters and in full, and a shallow model of Phi-2's geometry with
random weights in full (layer norm, partial rotary embedding, GELU; its dropout off, as masks differ by nature). Every run begins with the
same values; curves must stay as close as `Exactness.EQUAL` allows.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from elite.bench import text
from elite.bench.assemble import write
from elite.bench.curves import differences, trained
from elite.config import AdapterMethod, RunConfig
from elite.console import console
from elite.data.tokens import TokenStore
from elite.runfolder import environment

ALL = ("norms", "rotary", "activations", "residuals")
"""Parts of `fused_kernels`."""
ALONE = tuple((part,) for part in ALL)
PHI = ("model=phi2", "model.weights=random", "model.num_hidden_layers=2", "model.extra.resid_pdrop=0.0")


def compare(pretrained: RunConfig, phi: RunConfig) -> dict[str, Any]:
    """Every part alone and all together against none; what the file gets.

    Args:
        pretrained: whose tokenizer's tokens both train on.

    Raises:
        PlanError: a plan does not fit.
        DataError: the repository has too little text.
    """
    store, runs = text.tokens(pretrained), []
    cases = (
        (pretrained, AdapterMethod.lora, (*ALONE, ALL)),
        (pretrained, AdapterMethod.full, (ALL,)),
        (phi, AdapterMethod.full, (*ALONE, ALL)),
    )
    for config, method, choices in cases:
        adapted = replace(config, adapter=replace(config.adapter, method=method))
        plain, start = trained(_with(adapted, ()), store, None)
        for parts in choices:
            runs.append(_against(plain, adapted, parts, store, start))
            console.print({key: value for key, value in runs[-1].items() if key not in ("plain", "fused")}, markup=False)
    steps, rate = pretrained.training.max_steps, pretrained.training.learning_rate
    return {"environment": environment(), "steps": steps, "learning_rate": rate, "runs": runs}


def _against(plain: dict[str, Any], config: RunConfig, parts: Sequence[str], store: TokenStore, start: list[Any]) -> dict[str, Any]:
    fused, _ = trained(_with(config, parts), store, start)
    apart = differences(plain["losses"], fused["losses"], plain["dtype"])
    return {"model": config.model.name, "adapter": config.adapter.method.value, "parts": parts, **apart, "plain": plain, "fused": fused}


def _with(config: RunConfig, parts: Sequence[str]) -> RunConfig:
    """The run with these fused kernels and no others."""
    chosen = replace(config.optimizations.fused_kernels, enabled=bool(parts), **{name: name in parts for name in ALL})
    return replace(config, optimizations=replace(config.optimizations, fused_kernels=chosen))


def main() -> None:
    """The command."""
    options = text.options(__doc__.splitlines()[0])
    options.set_defaults(context=4096)
    options.add_argument("--steps", type=int, default=50)
    arguments = options.parse_args()
    overrides = f"training.max_steps={arguments.steps}", "executor=whole"
    pretrained = text.request(arguments, *overrides)
    arguments.model_path = None
    write(arguments.file, compare(pretrained, text.request(arguments, *overrides, *PHI)))


if __name__ == "__main__":
    main()
