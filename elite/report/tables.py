"""Tables in the documentation, made from measurement files: `python -m elite.report.tables [--check]`.

A document holds `<!-- table: NAME -->` … `<!-- end -->`. What stands between is what `TABLES` says, else the runs in
`docs/measurements/NAME.json`. The comparisons of executors and of kernels, and of plans with what they came to, are drawn besides, as soon
as they have been measured.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from elite.config import CONF_DIR
from elite.report import (
    ablations,
    agreement,
    calibration,
    calibration_plot,
    claims,
    fused,
    gains,
    kernels,
    kernels_plot,
    optimizations,
    plot,
    ranks,
    streamed,
    times,
)
from elite.report.markdown import NONE, gibibytes, grid, missing
from elite.report.measurement import MEASUREMENTS

ROOT = CONF_DIR.parent
DOCUMENTS = (ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md")))
PLOT = ROOT / "docs" / "streamed.svg"
KERNELS_PLOT = ROOT / "docs" / "kernels.svg"
CALIBRATION_PLOT = ROOT / "docs" / "calibration.svg"
BLOCK = re.compile(r"(<!-- table: (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
HEAD = (
    "device",
    "model",
    "context",
    "preset",
    "steps",
    "tokens/s",
    "step s",
    "peak GiB measured",
    "peak GiB planned",
    "validation loss",
    "alone",
)


def row(run: dict[str, Any]) -> tuple[str, ...]:
    """One run as cells under `HEAD`."""
    summary, first, last = run["summary"], run["summary"]["val_first"], run["summary"]["val_last"]
    random = run["config"]["model"]["weights"] == "random"
    return (
        run["environment"]["device"]["name"],
        run["config"]["model"]["name"] + (" (random weights)" if random else ""),
        f"{run['config']['tier']['context']:,}",
        run["config"]["optimizations"]["preset"],
        str(summary["steps"]),
        f"{summary['tokens_per_s']:,.0f}",
        f"{summary['step_s']:.2f}",
        gibibytes(summary["measured_peak_bytes"]),
        gibibytes(summary["predicted_peak_bytes"]),
        # Random weights have a loss too, but it says nothing.
        NONE if random else f"{first['val_loss']:.3f} → {last['val_loss']:.3f}",
        NONE if random else f"{first['val_loss_alone']:.3f} → {last['val_loss_alone']:.3f}",
    )


def table(measurement: dict[str, Any]) -> str:
    """Runs as a Markdown table."""
    return grid(HEAD, [row(run) for run in measurement["runs"]])


def figure(folder: Path) -> str:
    """A link to the drawing, for a document at the root."""
    if streamed.comparison(folder) is None:
        return missing(f"{streamed.PEERS}.json")
    return f"![Peak GPU memory and tokens/s against context]({PLOT.relative_to(ROOT).as_posix()})"


def kernels_figure(folder: Path) -> str:
    """As `figure`, of the kernels."""
    if kernels.measured(folder) is None:
        return missing(f"{kernels.KERNELS}.json")
    return f"![Time of other implementations relative to ours, by operation]({KERNELS_PLOT.relative_to(ROOT).as_posix()})"


def calibration_figure(folder: Path) -> str:
    """As `figure`, of plans against measurements."""
    if calibration.measured(folder) is None:
        return missing(f"{calibration.CALIBRATION}.json")
    return f"![Planned against measured memory and time]({CALIBRATION_PLOT.relative_to(ROOT).as_posix()})"


TABLES: dict[str, Callable[[Path], str]] = {
    "planned_times": times.table,
    "streamed_plot": figure,
    "streamed_peers": streamed.peers,
    "streamed_time": streamed.parts,
    "streamed_contexts": streamed.contexts,
    "streamed_probe": streamed.probed,
    "encodings": streamed.encodings,
    "streamed_gradients": agreement.gradients,
    "streamed_curves": agreement.curves,
    "fused_steps": fused.steps,
    "kernel_curves": fused.curves,
    "kernels_plot": kernels_figure,
    "kernels_summary": kernels.summary,
    "kernels": kernels.every,
    "kernels_loss": kernels.losses,
    "kernels_dequantise": partial(kernels.every, name=kernels.DEQUANTISE),
    "calibration_plot": calibration_figure,
    "calibration": calibration.summary,
    "calibration_rows": calibration.every,
    "claims": claims.table,
    "optimizations": optimizations.table,
    "convergence": gains.settings,
    "convergence_packing": gains.packing,
    "ablation_phi2": ablations.leave_one_out,
    "ablation_phi2_rest": ablations.leave_one_out_rest,
    "ablation_smollm2_16k": ablations.one_at_a_time,
    "ablation_smollm2_4k": ablations.one_at_a_time_short,
    "none_extreme": ablations.extremes,
    "gqa_uptraining": ablations.conversion,
    "ranks": ranks.against_one,
    "ranks_divided": ranks.divided,
    "ranks_gradients": ranks.gradients,
}


def filled(text: str, folder: Path = MEASUREMENTS) -> str:
    """`text` with every table block written anew.

    Raises:
        FileNotFoundError: a block names neither a table nor a measurement.
    """

    def fill(match: re.Match[str]) -> str:
        name = match["name"]
        made = TABLES[name](folder) if name in TABLES else table(json.loads((folder / f"{name}.json").read_text()))
        return f"{match[1]}{made}\n{match[3]}"

    return BLOCK.sub(fill, text)


def generated(folder: Path = MEASUREMENTS) -> dict[Path, str]:
    """What every document, and each drawing if there is something to draw, should hold."""
    made = {document: filled(document.read_text(), folder) for document in DOCUMENTS}
    compared, found, plans = streamed.comparison(folder), kernels.measured(folder), calibration.measured(folder)
    drawings = {} if compared is None else {PLOT: plot.drawn(compared)}
    drawings |= {} if found is None else {KERNELS_PLOT: kernels_plot.drawn(found)}
    return made | drawings | ({} if plans is None else {CALIBRATION_PLOT: calibration_plot.drawn(plans)})


def main(check: bool) -> int:
    """Write all documents, or only say which are stale."""
    stale = {path: text for path, text in generated().items() if not path.exists() or path.read_text() != text}
    for path, text in stale.items():
        print(f"{'stale' if check else 'written'}: {path.relative_to(ROOT)}")
        if not check:
            path.write_text(text)
    return 1 if check and stale else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a document is stale")
    sys.exit(main(parser.parse_args().check))
