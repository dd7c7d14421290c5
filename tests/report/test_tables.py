"""Documents say what the measurements say."""

import json
from pathlib import Path

import pytest

from elite.errors import EliteError
from elite.report import measurement, tables
from elite.runfolder import RunFolder


@pytest.mark.parametrize("document", tables.DOCUMENTS, ids=lambda path: path.name)
def test_documents_are_current(document: Path) -> None:
    assert tables.filled(document.read_text()) == document.read_text(), "make docs"


@pytest.mark.parametrize("path", sorted(measurement.MEASUREMENTS.glob("*.json")), ids=lambda path: path.stem)
def test_measurements_name_their_origin(path: Path) -> None:
    content = json.loads(path.read_text())
    assert content["name"] == path.stem and content["runs"]
    for run in content["runs"]:
        environment = run["environment"]
        assert environment["device"]["name"] and environment["versions"]["torch"] and environment["commit"] and environment["command"]
        assert len([line for line in run["metrics"] if "loss" in line]) == run["summary"]["steps"]


def test_an_unfinished_run_is_no_measurement(tmp_path: Path) -> None:
    with pytest.raises(EliteError, match="has not ended well"):
        measurement.collect(RunFolder(tmp_path))
