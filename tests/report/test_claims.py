"""The table of claimed contexts, and the plans that it is made of."""

import json
from pathlib import Path

from elite.bench.claims import ON_DISK, _row
from elite.report.claims import CLAIMS, table


def test_a_plan_that_does_not_fit_is_tried_with_the_disk() -> None:
    row = _row("phi2", "rtx3090", "tier10")
    assert row["context"] == 2**21 and row["fits"] and row["with"] == ON_DISK and row["disk_bytes"] > 0
    assert _row("smollm2_135m", "rtx3090", "tier1")["with"] == ""


def test_every_claim_has_a_line_that_says_what_is_missing(tmp_path: Path) -> None:
    assert table(tmp_path).startswith("Not measured yet")
    row = {"model": "phi2", "hardware": "rtx2060s", "fits": False, "total_bytes": 9 * 2**30, "host_bytes": 45 * 2**30}
    row |= {"disk_bytes": 0, "step_s": 7200.0, "executor": "streamed", "with": "", "shortage": "1.00 GiB too much"}
    claims = [row | {"claim": words} for words, _, _ in CLAIMS]
    claims[0] |= {"fits": True, "with": ON_DISK}
    (tmp_path / "claims.json").write_text(json.dumps({"tiers": [], "seconds": 3.0, "claims": claims}))
    lines = table(tmp_path).splitlines()
    assert len([line for line in lines if "rtx2060s" in line]) == len(CLAIMS)
    assert f"| yes | 9.00 | 45.00 | 0.00 | 2.0 h | {ON_DISK} |" in lines[2]
    assert "| no | 9.00 | 45.00 | 0.00 | 2.0 h | 1.00 GiB too much |" in lines[3]
