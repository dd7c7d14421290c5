"""What plans say of contexts that were claimed for small cards: `python -m elite.bench.claims FILE`. No GPU, no network.

Every hardware preset is planned with every tier; where a tier does not fit, again with boundaries on disk. So is each claim, for every
model preset; and so are two presets of optimizations at a context that one of them cannot hold. FILE gets the rows and the seconds that the
tiers took.
"""

import argparse
import time
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from elite import geometry, hardware
from elite.bench.assemble import write
from elite.compose import TIER_OPTIONS, from_overrides, options
from elite.config import HardwareConfig, RunConfig
from elite.console import console, start_logging
from elite.facts import NO_CORPUS
from elite.plan import Plan, make_plan
from elite.plan.words import duration, gib
from elite.report.claims import CLAIMS
from elite.runfolder import environment
from elite.streaming import Place

ON_DISK = "executor.boundaries=disk"
MODEL = "phi2"
"""That tiers are planned for."""
PRESETS = {"none": "whole", "extreme": "auto"}
"""Presets of optimizations that are compared, each with its executor: everything off is the ordinary one, too."""
PRESET_CARD, PRESET_TIER = "h100", "tier8"
"""Where presets of optimizations are compared by plans: 512K tokens, which no card holds with everything off."""


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    file = parser.parse_args().file
    start_logging()
    began = time.perf_counter()
    cards = [name for name in hardware.presets() if name not in ("auto", "cpu")]
    tiers = [_row(MODEL, card, tier) for card in cards for tier in TIER_OPTIONS[1:]]
    seconds = time.perf_counter() - began
    claims = [_row(model, card, tier) | {"claim": claim} for claim, card, tier in CLAIMS for model in options("model")]
    presets = [_of_preset(preset, executor) for preset, executor in PRESETS.items()]
    here = hardware.device(HardwareConfig(name="cpu")).name
    write(file, {"environment": environment(), "device": here, "seconds": seconds, "tiers": tiers, "claims": claims, "presets": presets})
    for row in claims:
        console.print(_said(row), markup=False)
    console.print(f"{len(tiers)} plans of {MODEL} in {seconds:.0f} s")


def _row(model: str, card: str, tier: str) -> dict[str, Any]:
    """One plan, or where it does not fit and the disk helps, that."""
    config = replace(_of_tier(model, tier), hardware=_card(card))
    made = _plan(config)
    if made.fits:
        return _described(made, card, "")
    other = _plan(replace(config, executor=replace(config.executor, boundaries=Place.disk)))
    return _described(other, card, ON_DISK) if other.fits else _described(made, card, "")


def _of_preset(preset: str, executor: str) -> dict[str, Any]:
    where = (f"model={MODEL}", "model.weights=random", f"hardware={PRESET_CARD}", f"tier={PRESET_TIER}")
    made = _plan(from_overrides(*where, f"optimizations={preset}", f"executor={executor}").config)
    return _described(made, PRESET_CARD, "") | {"preset": preset}


@cache
def _of_tier(model: str, tier: str) -> RunConfig:
    """Composed once for all cards, which takes longer than a plan."""
    return from_overrides(f"model={model}", "model.weights=random", f"tier={tier}").config


@cache
def _card(name: str) -> HardwareConfig:
    return from_overrides(f"hardware={name}").config.hardware


def _plan(config: RunConfig) -> Plan:
    return make_plan(config, hardware.device(config.hardware), geometry.shape(config.model), NO_CORPUS)


def _described(plan: Plan, card: str, changed: str) -> dict[str, Any]:
    names = ("model", "tier", "context", "fits", "executor", "total_bytes", "host_bytes", "disk_bytes", "step_s", "layout")
    said = {name: getattr(plan, name) for name in names} | {"hardware": card, "with": changed}
    return said | ({} if plan.fits else {"shortage": plan.shortage, "fix": plan.fix})


def _said(row: dict[str, Any]) -> str:
    figures = (
        f"{gib(row['total_bytes'])} GPU, {gib(row['host_bytes'])} host, {gib(row['disk_bytes'])} disk, {duration(row['step_s'])} a step"
    )
    verdict = "fits " + row["with"] if row["fits"] else f"does not fit: {row['shortage']}"
    return f"{row['hardware']}  {row['model']}  {row['context']:,}  {figures}; {verdict}"


if __name__ == "__main__":
    main()
