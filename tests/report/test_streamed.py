"""The streamed executor's tables say what the measurement files hold."""

import json
from pathlib import Path

import pytest

from elite.report import plot, streamed, tables
from elite.report.measurement import MEASUREMENTS
from tests.report import samples


def cells(table: str) -> list[dict[str, str]]:
    """Rows of the grid as head → cell; the head's names are made distinct by what stands before them."""
    grid = [line.strip("| ").split(" | ") for line in table.split("\n\n")[0].splitlines()]
    head = [name if grid[0].count(name) == 1 else f"{grid[0][i - 1]}, {name}" for i, name in enumerate(grid[0])]
    assert set(grid[1]) == {"---"} and all(len(row) == len(head) for row in grid)
    return [dict(zip(head, row, strict=True)) for row in grid[2:]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A comparison and three probes."""
    samples.write(tmp_path, "streamed_peers", samples.comparison())
    samples.write(tmp_path, "probe_a", samples.probe(2**20, []))
    samples.write(tmp_path, "probe_b", samples.probe(2**17, [samples.step(100, 6), samples.step(110, 5.5)]))
    samples.write(tmp_path, "probe_c", samples.probe(2**22, [], samples.LOSSY))
    return tmp_path


def test_peers(folder: Path) -> None:
    table = streamed.peers(folder)
    rows = cells(table)
    assert [(row["context"], row["executor"]) for row in rows] == [
        ("1,024", "recipe"),
        ("1,024", "streamed"),
        ("4,096", "recipe"),
        ("4,096", "streamed"),
    ]
    recipe, last = rows[2:]
    # The median of the steps after the first, 16 s, against 32; the floor is 12 s. Peaks are the highest of all steps.
    assert last["step s"] == "16.00" and last["tokens/s"] == "256"
    assert last["speed against the recipe"] == "2.00×" and rows[1]["speed against the recipe"] == "1.00×"
    assert (last["peak GiB allocated"], last["reserved"], last["pinned host GiB"]) == ("4.50", "5.00", "6.00")
    assert last["speed against the floor"] == "75%" and last["exposed copies"] == "5.0%"
    assert recipe["pinned host GiB"] == recipe["exposed copies"] == rows[1]["exposed copies"] == "–"
    for said in ("Exact unless labelled", "Card 1", "torch 2.99.0", "commit abc1234", "tiny (random weights), lora, rank 4"):
        assert table.count(said) == 1


def test_a_lossy_run_is_labelled(folder: Path) -> None:
    found = samples.comparison()
    found["runs"][-1]["layout"] = samples.LOSSY.to_dict()
    samples.write(folder, "streamed_peers", found)
    assert [row["executor"] for row in cells(streamed.peers(folder))][2:] == ["recipe", "streamed, int4 (approximate)"]


def test_where_time_goes(folder: Path) -> None:
    (row,) = cells(streamed.parts(folder))
    assert row["context"] == "4,096", "the shorter run has no profile"
    assert row["attention µs/token"] == "1464.84 (60.0%)" and row["exposed copies µs/token"] == "122.07 (5.0%)"
    assert row["waiting for the host µs/token"] == "73.24 (3.0%)" and row["all"] == "2441.41"


def test_contexts(folder: Path) -> None:
    table = streamed.contexts(folder)
    rows = cells(table)
    assert [row["tokens"] for row in rows] == ["131,072", "1,048,576", "4,194,304"]
    real, probe, lossy = rows
    assert (real["run"], real["step"], real["peak GiB reserved"], real["planned"]) == ("whole step", "110.0 s", "6.00", "4.50")
    assert (probe["run"], probe["step"], probe["peak GiB reserved"]) == ("probe, extrapolated", "90.0 s", "5.00")
    assert probe["K/V heads"] == "2 of 8" and probe["device"] == "Card 1 held to card2" and probe["pinned host GiB"] == "7.00"
    assert (probe["kept"], probe["encoding"], probe["off the device"]) == ("attention", "exact", "boundaries, weights")
    assert (lossy["kept"], lossy["encoding"]) == ("multilevel, 3 slots", "int4 (approximate)")
    assert lossy["off the device"] == "boundaries on disk, keys and values"
    assert table.count("commit abc1234") == 1 and "Exact unless labelled" in table


def test_probe_against_the_real_step(folder: Path) -> None:
    (row,) = cells(streamed.probed(folder))
    assert (row["step planned"], row["probed"], row["real"]) == ("2.0 min", "90.0 s", "110.0 s")
    assert row["probed / real"] == "0.818"
    assert (row["peak GiB planned"], row["reserved, probed"], row["reserved, real"]) == ("4.50", "5.00", "6.00")


def test_a_probe_on_a_cpu_has_no_device_peak(tmp_path: Path) -> None:
    found = samples.probe(64, [])
    del found["probe"]["reserved_peak_bytes"]
    samples.write(tmp_path, "probe_cpu", found)
    (row,) = cells(streamed.contexts(tmp_path))
    assert row["peak GiB reserved"] == "–"


def test_encodings() -> None:
    table = streamed.encodings(MEASUREMENTS)
    runs = json.loads((MEASUREMENTS / "encodings.json").read_text())["runs"]
    rows = cells(table)
    assert [row["encoding"] for row in rows] == ["exact", "int8 (approximate)", "int4 (approximate)"]
    for row, run in zip(rows, runs, strict=True):
        summary = run["summary"]
        assert float(row["gradient cosine, every layer kept"]) == pytest.approx(summary["gradient_cosine_1"]["mean"], abs=5e-5)
        assert float(row["every fifth kept, worst"]) == pytest.approx(summary["gradient_cosine_5"]["worst"], abs=5e-5)
        bits = [float(value) for value in row["bits a value"].split("–")]
        assert (bits[0], bits[-1]) == pytest.approx(
            (min(summary["bits_per_value"].values()), max(summary["bits_per_value"].values())), abs=5e-3
        )
    assert runs[0]["environment"]["device"]["name"] in table and runs[0]["environment"]["commit"] in table


@pytest.mark.parametrize("name", sorted(tables.TABLES.keys() - {"optimizations"}))
def test_what_was_not_measured_says_so(name: str, tmp_path: Path) -> None:
    made = tables.filled(f"<!-- table: {name} -->\n| old | 1.23 |\n<!-- end -->", tmp_path)
    assert "Not measured yet: no `docs/measurements/" in made and "old" not in made and made.endswith("\n<!-- end -->")
    assert made.count("\n") == 2


def test_probes_without_steps_compare_nothing(tmp_path: Path) -> None:
    samples.write(tmp_path, "probe_a", samples.probe(2**20, []))
    assert "Not measured yet" in streamed.probed(tmp_path) and "1,048,576" in streamed.contexts(tmp_path)


def test_an_unknown_table_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        tables.filled("<!-- table: steamed_peers -->\n<!-- end -->", tmp_path)


def test_the_drawing_is_written_once_measured(folder: Path) -> None:
    for path in MEASUREMENTS.glob("*.json"):
        if path.stem != "streamed_peers":
            (folder / path.name).write_text(path.read_text())
    found = streamed.comparison(folder)
    assert found is not None
    made = tables.generated(folder)
    assert made[tables.PLOT] == plot.drawn(found)
    assert "](docs/streamed.svg)" in made[tables.ROOT / "README.md"]
    (folder / "streamed_peers.json").unlink()
    made = tables.generated(folder)
    assert tables.PLOT not in made and "streamed.svg" not in made[tables.ROOT / "README.md"]
