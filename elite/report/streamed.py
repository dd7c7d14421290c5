"""Tables of the streamed executor: against its peers' recipe, where its time goes, long contexts, the probe, lossy boundaries.

They are made of `streamed_peers.json` (elite.bench.peers), `probe_*.json` (mode=probe) and `encodings.json` (elite.report.encodings).
A table whose file is not there says so.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from elite.plan.words import duration
from elite.report.markdown import NONE, gibibytes, grid, missing, origin

PEERS = "streamed_peers"
PROBES = "probe_*"
ENCODINGS = "encodings"
EXACT = "Exact unless labelled."
PARTS = {
    "attention": "attention_s",
    "other compute": "other_compute_s",
    "exposed copies": "exposed_copies_s",
    "waiting for the host": "host_s",
    "short gaps": "short_gaps_s",
}
"""What a profile splits a step into (elite.bench.profile)."""


@dataclass(frozen=True)
class Timed:
    """One executor at one context, in a comparison."""

    name: str
    """`recipe` or `streamed`."""
    tokens: int
    step_s: float
    """Median of the steps after the first, which warms up."""
    allocated_bytes: float
    """Highest of all steps."""
    reserved_bytes: float
    run: dict[str, Any]

    @property
    def tokens_per_s(self) -> float:
        """Throughput."""
        return self.tokens / self.step_s


@dataclass(frozen=True)
class Comparison:
    """The streamed executor and its peers' recipe."""

    runs: tuple[Timed, ...]
    """By context, the recipe first."""
    floors: dict[int, float]
    """Seconds of a step in which only matrix products and attention kernels run, by context."""
    origin: str
    """Model, device, versions, commit."""

    def of(self, name: str) -> dict[int, Timed]:
        """One executor's runs, by context."""
        return {run.tokens: run for run in self.runs if run.name == name}


def comparison(folder: Path) -> Comparison | None:
    """What `streamed_peers.json` holds; None if it is not there."""
    path = folder / f"{PEERS}.json"
    if not path.exists():
        return None
    found = json.loads(path.read_text())
    runs = sorted(map(_timed, found["runs"]), key=lambda run: (run.tokens, run.name))
    said = origin([found["environment"]], [run.run["device"] for run in runs])
    models = " / ".join(dict.fromkeys(f"{_model(run.run)}, {run.run['model']['adapter']}" for run in runs))
    return Comparison(tuple(runs), {floor["context"]: floor["step_s"] for floor in found["floors"]}, f"{models}; {said}")


def peers(folder: Path) -> str:
    """Streamed against recipe, by context."""
    found = comparison(folder)
    if found is None:
        return missing(f"{PEERS}.json")
    head = ("context", "executor", "step s", "tokens/s", "speed against the recipe", "peak GiB allocated", "reserved", "pinned host GiB")
    recipe, rows = found.of("recipe"), []
    for run in found.runs:
        against, floor = recipe.get(run.tokens), found.floors.get(run.tokens)
        profile = run.run.get("profile")
        rows.append(
            (
                f"{run.tokens:,}",
                _executor(run),
                f"{run.step_s:.2f}",
                f"{run.tokens_per_s:,.0f}",
                NONE if against is None else f"{against.step_s / run.step_s:.2f}×",
                gibibytes(run.allocated_bytes),
                gibibytes(run.reserved_bytes),
                gibibytes(run.run.get("host_pinned_bytes")),
                NONE if floor is None else f"{floor / run.step_s:.0%}",
                f"{profile['exposed_copies_s'] / profile['wall_s']:.1%}" if profile else NONE,
            )
        )
    said = (
        f"{EXACT} {found.origin}. Floor: attention forward and backward once, linear maps three times, the head twice, at the rates of the"
    )
    return grid((*head, "speed against the floor", "exposed copies"), rows) + f"\n\n{said} kernels themselves, and nothing else."


def parts(folder: Path) -> str:
    """Where the time of a streamed step goes, a token."""
    found = comparison(folder)
    if found is None:
        return missing(f"{PEERS}.json")
    rows = []
    for run in found.of("streamed").values():
        profile = run.run.get("profile")
        if profile:
            cells = [f"{profile[key] / run.tokens * 1e6:.2f} ({profile[key] / profile['wall_s']:.1%})" for key in PARTS.values()]
            rows.append((f"{run.tokens:,}", *cells, f"{profile['wall_s'] / run.tokens * 1e6:.2f}"))
    head = ("context", *(f"{name} µs/token" for name in PARTS), "all")
    return grid(head, rows) + f"\n\n{EXACT} {found.origin}. From the profile of one further step; in brackets the share of it."


def contexts(folder: Path) -> str:
    """Long contexts: what every probe, or the real steps after it, took."""
    found = _probes(folder)
    if not found:
        return missing(f"{PROBES}.json")
    head = ("model", "layers", "K/V heads", "device", "tokens", "run", "peak GiB reserved", "planned", "pinned host GiB", "step")
    rows = []
    for run in found:
        steps, probe = run["steps"], run["probe"]
        rows.append(
            (
                *_place(run),
                f"{probe['tokens']:,}",
                "whole step" if steps else "probe, extrapolated",
                gibibytes(_highest(steps or [probe], "reserved_peak_bytes")),
                gibibytes(run["planned"]["device_bytes"]),
                gibibytes(probe["host_pinned_bytes"]),
                duration(_seconds(steps) if steps else probe["step_s"]),
                *_layout(run["layout"]),
            )
        )
    return grid((*head, "kept", "encoding", "off the device"), rows) + _probes_origin(found)


def probed(folder: Path) -> str:
    """Plan and probe against the real step, where one was run."""
    found = [run for run in _probes(folder) if run["steps"]]
    if not found:
        return missing(f"{PROBES}.json` with `probe.steps=1")
    head = ("model", "layers", "K/V heads", "device", "tokens", "step planned", "probed", "real", "probed / real")
    rows = []
    for run in found:
        steps, probe, planned = run["steps"], run["probe"], run["planned"]
        rows.append(
            (
                *_place(run),
                f"{probe['tokens']:,}",
                *(duration(seconds) for seconds in (planned["step_s"], probe["step_s"], _seconds(steps))),
                f"{probe['step_s'] / _seconds(steps):.3f}",
                gibibytes(planned["device_bytes"]),
                gibibytes(_highest([probe], "reserved_peak_bytes")),
                gibibytes(_highest(steps, "reserved_peak_bytes")),
            )
        )
    return grid((*head, "peak GiB planned", "reserved, probed", "reserved, real"), rows) + _probes_origin(found)


def encodings(folder: Path) -> str:
    """Bits and gradient error of stored boundaries."""
    path = folder / f"{ENCODINGS}.json"
    if not path.exists():
        return missing(path.name)
    runs = json.loads(path.read_text())["runs"]
    rows = []
    for run in runs:
        summary = run["summary"]
        bits = sorted({f"{value:.2f}" for value in summary["bits_per_value"].values()}, key=float)
        cosines = [f"{summary[f'gradient_cosine_{n}'][which]:.4f}" for n in (1, 5) for which in ("mean", "worst")]
        rows.append(
            (_encoding(run["config"]["encoding"]), "–".join(bits[:1] + bits[1:][-1:]), *cosines, f"{summary['relative_rms_error']:.4f}")
        )
    head = (
        "encoding",
        "bits a value",
        "gradient cosine, every layer kept",
        "worst",
        "every fifth kept",
        "worst",
        "relative error of a row",
    )
    config, texts = runs[0]["config"], len({line["text"] for line in runs[0]["metrics"]})
    said = origin([run["environment"] for run in runs], [run["environment"]["device"]["name"] for run in runs])
    model = f"{config['model']['name']}, {config['model']['weights']} weights, fp32; {texts} texts of up to {config['tokens']:,} tokens"
    return grid(head, rows) + f"\n\n{EXACT} {model}; {said}."


def _timed(run: dict[str, Any]) -> Timed:
    steps: list[dict[str, float]] = run["steps"]
    allocated, reserved = (max(step[name] for step in steps) for name in ("allocated_peak_bytes", "reserved_peak_bytes"))
    return Timed(run["name"], run["context"], _seconds(steps), allocated, reserved, run)


def _seconds(steps: Sequence[dict[str, float]]) -> float:
    """Median of the steps after the first; the first if it is alone."""
    return median(step["step_s"] for step in steps[1:] or steps)


def _executor(run: Timed) -> str:
    layout = run.run["layout"]
    return run.name if layout is None or layout["encoding"] == "exact" else f"{run.name}, {_encoding(layout['encoding'])}"


def _encoding(name: str) -> str:
    return name if name == "exact" else f"{name} (approximate)"


def _model(run: dict[str, Any]) -> str:
    return run["model"]["name"] + (" (random weights)" if run["model"]["weights"] == "random" else "")


def _probes(folder: Path) -> list[dict[str, Any]]:
    """All probes, by model, K/V heads, tokens and device."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob(f"{PROBES}.json"))]
    keys = ("name", "num_key_value_heads")
    return sorted(found, key=lambda run: (*(run["model"][key] for key in keys), run["probe"]["tokens"], run["device"]))


def _place(run: dict[str, Any]) -> tuple[str, str, str, str]:
    model = run["model"]
    heads = f"{model['num_key_value_heads']} of {model['num_attention_heads']}"
    return _model(run), str(model["num_hidden_layers"]), heads, run["device"]


def _layout(layout: dict[str, Any]) -> tuple[str, str, str]:
    """What is kept, how it is encoded, and what does not wait on the device."""
    kept = f"multilevel, {layout['slots']} slots" if layout["keep"] == "multilevel" else layout["keep"]
    places = {"boundaries": layout["boundaries"], "weights": layout["weights"], "keys and values": layout["keys_values"]}
    away = [f"{name} on disk" if place == "disk" else name for name, place in places.items() if place not in ("device", "resident")]
    return kept, _encoding(layout["encoding"]), ", ".join(away) or "nothing"


def _highest(lines: Sequence[dict[str, float]], name: str) -> float | None:
    """None on a CPU, which reports no such peak."""
    return max((line[name] for line in lines if name in line), default=None)


def _probes_origin(runs: Sequence[dict[str, Any]]) -> str:
    said = origin([run["environment"] for run in runs])
    held = (
        "“Held to” a card: to its usable memory; “as” a card: to its dtypes and attention kernels too. Times are those of the GPU that ran"
    )
    return f"\n\n{EXACT} {said}; random tokens, adapters {' / '.join(sorted({run['model']['adapter'] for run in runs}))}. {held}."
