"""The bench of loss curves: both executors train on the same batches from the same values, and their curves are held to the limits."""

from pathlib import Path

import pytest

from elite.bench import curves, text
from elite.compose import from_overrides

STEPS = 4


def test_both_executors_follow_one_curve(repository: Path, cache: Path) -> None:
    overrides = f"training.max_steps={STEPS}", "training.learning_rate=1e-2", "optimizations.mixed_precision.enabled=false"
    config = from_overrides("debug=tiny", *overrides, f"data.repo={repository}", f"output.cache={cache}").config
    found = curves.compare(text.at_context(config, 256))
    assert found["steps"] == STEPS and found["environment"]["versions"]["torch"]
    lora, full = found["runs"]
    assert (lora["adapter"], full["adapter"]) == ("lora", "full")
    for run in (lora, full):
        assert (run["whole"]["executor"], run["streamed"]["executor"]) == ("whole", "streamed") and run["dtype"] == "float32"
        assert run["streamed"]["layout"]["chunk"] == 256 // curves.CHUNKS
        assert len(run["whole"]["losses"]) == len(run["streamed"]["losses"]) == STEPS
        assert run["within"] and run["max_difference"] <= 1e-4
        assert run["limits"] == {"max_difference": 1e-3, "mean_drift": 1e-5}
    # It trains, or equal curves would say little.
    assert full["whole"]["losses"][-1] < full["whole"]["losses"][0] - 0.1


@pytest.mark.parametrize(
    ("streamed", "largest", "drift", "within"),
    [
        ([2.0, 1.0, 0.5], 0.0, 0.0, True),
        ([2.01, 0.99, 0.5], 0.01, 0.0, True),
        ([2.02, 0.98, 0.5], 0.02, 0.0, False),
        ([2.003, 1.003, 0.503], 0.003, 0.003, False),
    ],
)
def test_differences_by_hand(streamed: list[float], largest: float, drift: float, within: bool) -> None:
    found = curves.differences([2.0, 1.0, 0.5], streamed, "bfloat16")
    assert found["max_difference"] == pytest.approx(largest) and found["mean_drift"] == pytest.approx(drift, abs=1e-12)
    assert found["within"] is within and found["limits"] == {"max_difference": 1.5e-2, "mean_drift": 1e-3}
