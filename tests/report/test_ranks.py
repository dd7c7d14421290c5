"""Tables of several GPUs: ratios by hand, targets met and missed, and nothing where nothing was measured."""

import json
from pathlib import Path
from typing import Any

from elite.facts import GIB
from elite.report import ranks, tables

ENVIRONMENT = {"versions": {"torch": "2.11", "transformers": "5.17"}, "commit": "abc"}


def run(case: str, count: int, sharing: int, speeds: tuple[float, ...], keys: float = 0.0) -> dict[str, Any]:
    steps = [
        {"step_s": 4096 / speed, "tokens_per_s": speed, "allocated_peak_bytes": count * GIB, "keys_values_bytes": keys} for speed in speeds
    ]
    model = {"name": "phi2", "adapter": "full", "num_hidden_layers": 16 if case == "ring" else 32}
    planned = {"device_bytes": 3 * GIB, "host_bytes": 5 * GIB}
    rest = {"device": "a card", "usable_bytes": 22.5 * GIB, "planned": planned, "ready_s": 61.4, "cap_holds": True, "model": model}
    shape = {"sharing": sharing, "passes": 1, "micro_batch": 1, "context": 131072}
    return {"case": case, "environment": ENVIRONMENT, "ranks": count, "steps": steps} | shape | rest


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("|")][2:]


def written(folder: Path, name: str, **content: Any) -> Path:
    (folder / f"{name}.json").write_text(json.dumps({"environment": ENVIRONMENT, "ranks": 2} | content))
    return folder


def test_two_gpus_against_one(tmp_path: Path) -> None:
    runs = [
        # The first step counts for nothing.
        *(run("ring", 1, 1, (1, 100, 102), 10.0), run("ring", 2, 2, (1, 180, 190), 7.0)),
        *(run("ddp", 1, 1, (1, 100)), run("ddp", 2, 1, (1, 190))),
        *(run("window", count, 1, (1, 100 * count)) | {"passes": 4} for count in (1, 2)),
        *(run("together", count, 1, (1, 100 * count)) | {"micro_batch": 4} for count in (1, 2)),
        run("zero3", 2, 1, (1, 64)),
    ]
    shared, own, window, together = cells(ranks.against_one(written(tmp_path, "ranks", runs=runs)))
    assert (shared[0], own[0]) == ("phi2, 16 of its 32 layers", "phi2")
    assert shared[2:7] == ["2, one sequence", "101", "185", "1.83× (≥ 1.8×: met)", "0.70× (≤ 0.6×: missed)"]
    assert own[2:7] == ["2, one sequence each", "100", "190", "1.90× (≥ 1.9×: met)", "–"] and own[7:] == ["1.00", "2.00"]
    assert window[2:6] == ["2, 4 sequences each, one a pass", "100", "200", "2.00× (≥ 1.9×: met)"]
    assert together[2] == "2, 4 sequences each, together"
    (alone,) = cells(ranks.divided(tmp_path))
    assert alone == ["phi2, full", "131,072", "2", "22.50, held", "3.00", "2.00", "–", "–", "5.00", "–", "–", "64.0", "61"]


def test_errors_of_shared_rows(tmp_path: Path) -> None:
    def ratios(mean: float) -> dict[str, float]:
        return {"mean_ratio": mean, "median_ratio": 1.0, "worst_ratio": 1.234, "tensors_above": 3, "tensors_below": 2}

    content = {"alone": {"whole": {}, "streamed": {}}, "ratios": {"streamed": ratios(1.2), "whole, ring": ratios(1.2)}}
    described = {"device": "a card", "model": {"name": "smollm2_135m"}, "context": 32768, "rows": 4, "dtype": "bfloat16"}
    folder = written(tmp_path, "ranks_gradients", runs=[{"adapter": "lora", "tensors": 28, **content}], **described)
    streamed, ring = cells(ranks.gradients(folder))
    assert streamed == ["lora", "streamed", "1", "1.200×", "1.000×", "1.23×", "3", "2", "28"]
    assert ring == ["lora", "whole, ring", "2", "1.20× (≤ 1.1×: missed)", "1.000×", "1.23×", "3", "2", "28"]


def test_what_was_not_measured_says_so(tmp_path: Path) -> None:
    for name in ("ranks", "ranks_divided", "ranks_gradients"):
        assert tables.TABLES[name](tmp_path).startswith("Not measured yet: no `docs/measurements/ranks")
