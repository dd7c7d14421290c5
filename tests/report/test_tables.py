"""Documents say what the measurements say."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from elite.errors import EliteError
from elite.report import measurement, tables
from elite.runfolder import RunFolder
from tests.report import samples

generated = cache(tables.generated)


# Made once, and in one process.
@pytest.mark.xdist_group("documents")
@pytest.mark.parametrize("path", [*tables.DOCUMENTS, tables.PLOT, tables.KERNELS_PLOT, tables.CALIBRATION_PLOT], ids=lambda path: path.name)
def test_documents_are_current(path: Path) -> None:
    expected = generated().get(path)
    assert (path.read_text() if path.exists() else None) == expected, "make docs"


def devices(value: Any) -> list[str]:
    """Every device that a measurement names, however deep."""
    if isinstance(value, list):
        return [name for inner in value for name in devices(inner)]
    if not isinstance(value, dict):
        return []
    here = value.get("device")
    name = here.get("name") if isinstance(here, dict) else here
    return ([name] if isinstance(name, str) and name else []) + devices([inner for key, inner in value.items() if key != "device"])


@pytest.mark.parametrize("path", sorted(measurement.MEASUREMENTS.glob("*.json")), ids=lambda path: path.stem)
def test_measurements_name_their_origin(path: Path) -> None:
    content = json.loads(path.read_text())
    assert content["name"] == path.stem and devices(content)
    # A probe is one run; the runs of a comparison share an environment.
    for run in content.get("runs", [content]):
        environment = run.get("environment") or content["environment"]
        assert environment["versions"]["torch"] and environment["commit"] and environment["command"]
        assert not any(Path(argument.rpartition("=")[2]).is_absolute() for argument in environment["command"])
        if "metrics" in run:
            assert len([line for line in run["metrics"] if "loss" in line]) == run["summary"]["steps"]


def test_an_unfinished_run_is_no_measurement(tmp_path: Path) -> None:
    with pytest.raises(EliteError, match="has not ended well"):
        measurement.collect(RunFolder(tmp_path))


def test_a_benchmarks_file_is_kept_without_its_places(tmp_path: Path) -> None:
    content = samples.probe(64, [], samples.LOSSY)
    content["environment"] = samples.ENVIRONMENT | {
        "command": ["/home/me/train.py", "mode=probe", "probe.file=/tmp/out/a.json", "tier.context=64"]
    }
    source = tmp_path / "raw.json"
    source.write_text(json.dumps(content))
    path = measurement.write("probe_a", [source], tmp_path / "kept")
    kept = json.loads(path.read_text())
    assert path.name == "probe_a.json" and kept["name"] == "probe_a"
    assert kept["environment"]["command"] == ["train.py", "mode=probe", "probe.file=a.json", "tier.context=64"]
    assert kept["layout"] == content["layout"] | {"folder": "rows"}
    assert kept["probe"] == content["probe"] and kept["planned"] == content["planned"]
    with pytest.raises(EliteError, match="by itself"):
        measurement.write("two", [source, source], tmp_path)
