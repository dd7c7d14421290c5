"""What the host's side of a step costs, on a CPU whose host is the device, too."""

from pathlib import Path

from elite.bench.calibrate.measure import Machine
from elite.bench.host_paths import DEPTHS, OF_WHOLE, PLACES, SHALLOW, SIZES, WAYS, measure, paths


def test_every_way_is_taken_on_every_executor_that_knows_it() -> None:
    found = list(paths())
    assert len({(name, model, layers) for name, model, layers, _ in found}) == len(found)
    of_whole = [way for way in WAYS if way.endswith(OF_WHOLE)]
    names = len(WAYS) * len(PLACES) - len(of_whole) * (len(PLACES) - 1)
    assert len(found) == len(SIZES) * (names + len(SHALLOW) * len(PLACES) * (len(DEPTHS) - 1))


def test_a_path_is_timed_by_its_parts(cache: Path) -> None:
    chosen = [path for path in paths() if path[:3] == ("whole fused", "llama", 3)]
    (row,) = measure(Machine(str(cache)), str(cache), iter(chosen))
    assert (row["name"], row["model"], row["layers"]) == ("whole fused", "llama", 3)
    # Its backward multiplies for inputs and adapters, and computes on the host.
    assert 0 < row["update_s"] < row["forward_s"] < row["backward_s"] and 0 < row["operation_s"] < row["forward_s"]
