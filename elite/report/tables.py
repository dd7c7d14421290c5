"""Tables in the documentation, made from measurement files: `python -m elite.report.tables [--check]`.

A document holds `<!-- table: NAME -->` … `<!-- end -->`; what stands between is written from `docs/measurements/NAME.json`.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from elite.config import CONF_DIR
from elite.report.measurement import MEASUREMENTS

ROOT = CONF_DIR.parent
DOCUMENTS = (ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md")))
BLOCK = re.compile(r"(<!-- table: (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
GIB = 2**30
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
        f"{summary['measured_peak_bytes'] / GIB:.2f}",
        f"{summary['predicted_peak_bytes'] / GIB:.2f}",
        # Random weights have a loss too, but it says nothing.
        "–" if random else f"{first['val_loss']:.3f} → {last['val_loss']:.3f}",
        "–" if random else f"{first['val_loss_alone']:.3f} → {last['val_loss_alone']:.3f}",
    )


def table(measurement: dict[str, Any]) -> str:
    """A measurement as a Markdown table."""
    rows = [HEAD, tuple("---" for _ in HEAD), *(row(run) for run in measurement["runs"])]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def filled(text: str, folder: Path = MEASUREMENTS) -> str:
    """`text` with every table block written anew."""

    def fill(match: re.Match[str]) -> str:
        measurement = json.loads((folder / f"{match['name']}.json").read_text())
        return f"{match[1]}{table(measurement)}\n{match[3]}"

    return BLOCK.sub(fill, text)


def main(check: bool) -> int:
    """Write all documents, or only say which are stale."""
    stale = [document for document in DOCUMENTS if filled(document.read_text()) != document.read_text()]
    for document in stale:
        print(f"{'stale' if check else 'written'}: {document.relative_to(ROOT)}")
        if not check:
            document.write_text(filled(document.read_text()))
    return 1 if check and stale else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a document is stale")
    sys.exit(main(parser.parse_args().check))
