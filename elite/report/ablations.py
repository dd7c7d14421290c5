"""What each optimization costs and saves, from recorded multiruns: tables out of an `ablation.json` kept as a measurement."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from elite.facts import GIB
from elite.plan.words import duration
from elite.report.comparison import kept
from elite.report.markdown import NONE, grid, missing, origin, signed

LEAVE_ONE_OUT, REST = "ablation_phi2", "ablation_phi2_rest"
ONE_AT_A_TIME, SHORT = "ablation_smollm2_16k", "ablation_smollm2_4k"
EXTREMES = "none_extreme"
CONVERSION = "gqa_uptraining"
HEAD = (
    "what acts",
    "peak, GiB",
    "Δ",
    "reserved",
    "tokens/s",
    "Δ",
    "largest Δ of training loss",
    "plan off: peak",
    "step",
    "claimed by the forerunner",
)
CLAIMED = "5.4x less memory, 40–60 % faster, 8.37 GB in all at 512K"
"""By the forerunner, of `extreme`."""


def table(name: str, folder: Path) -> str:
    """Every job of one recorded ablation against its baseline."""
    file = folder / f"{name}.json"
    if not file.exists():
        return missing(file.name)
    content = json.loads(file.read_text())
    rows = [_line(job["values"]) for job in content["jobs"] if job["state"] != "running"]
    return grid(HEAD, rows) + f"\n\n{_origin(content)}."


leave_one_out = partial(table, LEAVE_ONE_OUT)
"""The table of `experiment=ablation` on Phi-2's geometry."""
leave_one_out_rest = partial(table, REST)
"""The jobs that the first sweep did not come to."""
one_at_a_time = partial(table, ONE_AT_A_TIME)
"""The table of `ablation.kind=one_at_a_time` on SmolLM2-135M, 16,384 tokens."""
one_at_a_time_short = partial(table, SHORT)
"""The same with 4,096 tokens, where each fits."""


def _line(found: dict[str, Any]) -> tuple[str, ...]:
    name = found["job"].replace("without_", "without ").replace("only_", "only ")
    if found["peak_gib"] is None:
        return (name, f"not run: {found['reason'].partition(': ')[2] or found['reason']}", *[""] * (len(HEAD) - 3), found["claimed"])
    before = found["tokens_per_s"] - (found["tokens_per_s_difference"] or 0.0)
    return (
        name,
        f"{found['peak_gib']:.2f}",
        signed(found["peak_gib_difference"], ".2f"),
        f"{found['reserved_gib']:.2f}",
        f"{found['tokens_per_s']:,.0f}",
        signed(None if found["tokens_per_s_difference"] is None else (found["tokens_per_s"] / before - 1) * 100, ".0f", " %"),
        kept(found),
        signed(found["plan_peak_error_percent"], ".1f", " %"),
        signed(found["plan_step_error_percent"], ".0f", " %"),
        found["claimed"] or NONE,
    )


def extremes(folder: Path) -> str:
    """`none` against `extreme`: measured contexts from the multirun, 512K from the plans that `claims.json` holds."""
    file, plans = folder / f"{EXTREMES}.json", folder / "claims.json"
    if not file.exists():
        return missing(file.name)
    content = json.loads(file.read_text())
    cells = {tuple(job["label"].replace("optimizations=", "").split(" tier.context=")): job["values"] for job in content["jobs"]}
    contexts = sorted({int(context) for _, context in cells})
    head = ("context", "none: GiB", "extreme: GiB", "less memory", "none: tokens/s", "extreme: tokens/s", "faster", "seen")
    rows = []
    for context in contexts:
        none, extreme = cells["none", str(context)], cells["extreme", str(context)]
        rows.append(_pair(context, none["peak_gib"], extreme["peak_gib"], none["tokens_per_s"], extreme["tokens_per_s"], "measured"))
    if plans.exists():
        rows += _planned(json.loads(plans.read_text()).get("presets", []))
    return grid(head, rows) + f"\n\nClaimed: {CLAIMED}. {_origin(content)}."


def _pair(context: int, none: float, extreme: float, slow: float, fast: float, seen: str) -> tuple[str, ...]:
    return (
        f"{context:,}",
        f"{none:,.2f}",
        f"{extreme:,.2f}",
        f"{none / extreme:,.1f}x",
        f"{slow:,.0f}",
        f"{fast:,.0f}",
        f"{(fast / slow - 1) * 100:+.0f} %",
        seen,
    )


def _planned(rows: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """The pair of plans for one context that no card of ours could measure."""
    if not rows:
        return []
    none, extreme = ({row["preset"]: row for row in rows}[name] for name in ("none", "extreme"))
    seen = f"**extrapolated by the plan**: none does not fit; extreme is {extreme['executor']}, a step {duration(extreme['step_s'])}"
    gib = [row["total_bytes"] / GIB for row in (none, extreme)]
    speed = [row["context"] / row["step_s"] for row in (none, extreme)]
    return [_pair(none["context"], gib[0], gib[1], speed[0], speed[1], seen)]


def conversion(folder: Path) -> str:
    """The losses of `mode=uptrain`: as loaded, converted, and along the way."""
    file = folder / f"{CONVERSION}.json"
    if not file.exists():
        return missing(file.name)
    runs = json.loads(file.read_text())["runs"]
    head = ("model", "key/value heads", "heads pooled", "tokens of up-training", "validation loss", "alone", "learning rate", "tokens/s")
    rows = []
    for run in runs:
        model, options = run["config"]["model"], run["config"]["optimizations"]["gqa_conversion"]
        before, summary = run["summary"]["conversion"]["before"], run["summary"]
        common = (model["name"], f"{model['num_key_value_heads']} → {options['kv_heads']}", options["init"])
        rows.append((model["name"], str(model["num_key_value_heads"]), "as loaded", NONE, *_losses(before), NONE, NONE))
        for line in run["metrics"]:
            if "val_loss" in line:
                rows.append(
                    (*common, f"{line['tokens']:,}", *_losses(line), f"{summary['learning_rate']:g}", f"{summary['tokens_per_s']:,.0f}")
                )
    environments = [run["environment"] for run in runs]
    return grid(head, rows) + f"\n\n{origin(environments, [one['device']['name'] for one in environments])}."


def _losses(line: dict[str, float]) -> tuple[str, str]:
    return f"{line['val_loss']:.4f}", f"{line['val_loss_alone']:.4f}"


def _origin(content: dict[str, Any]) -> str:
    return origin([content["environment"]], [content["environment"]["device"]["name"]])
