"""How fast settings learn, from curves whose answers are known."""

import json
from pathlib import Path
from typing import Any

import pytest

from elite.report.gains import curve, grouped, reached, settings

STEPS = 40


def run(seed: int, speed: float, **changes: Any) -> dict[str, Any]:
    """Falls by `speed` thousandths of a nat a step of two seconds; validated every tenth."""
    lines: list[dict[str, float]] = [{"step": 0, "val_loss": 3.0 + seed}]
    for step in range(1, STEPS + 1):
        lines.append({"step": step, "loss": 1.0, "step_time_s": 2.0})
        if step % 10 == 0:
            lines.append({"step": step, "val_loss": 3.0 + seed - speed * step / 1000})
    config: dict[str, Any] = {
        "seed": seed,
        "name": str(speed),
        "model": {"name": "small"},
        "schedule": {"name": "cosine"},
        "optimizations": {"preset": "standard", "lora_plus": {"enabled": False, "ratio": 16.0}},
    }
    for key, value in changes.items():
        group, name = key.split("__", 1)
        config[group][name] = value
    versions = {"torch": "2", "transformers": "5"}
    return {
        "config": config,
        "plan": {"context": 2048, "steps": STEPS, "step_tokens": 32768},
        "environment": {"versions": versions, "commit": "abc", "device": {"name": "a card"}},
        "summary": {"tokens_per_s": 100.0 * speed},
        "metrics": lines,
    }


def faster(seed: int, speed: float) -> dict[str, Any]:
    return run(seed, speed, optimizations__lora_plus={"enabled": True, "ratio": 16.0})


def test_a_curve_has_its_validations_and_the_seconds_until_each() -> None:
    points = curve(run(0, 10)["metrics"])
    assert [(point.step, point.seconds) for point in points] == [(0, 0), (10, 20), (20, 40), (30, 60), (40, 80)]


@pytest.mark.parametrize(("loss", "step"), [(2.95, 5), (2.9, 10), (2.65, 35), (2.5, None)])
def test_a_loss_is_reached_between_validations(loss: float, step: float | None) -> None:
    found = reached(curve(run(0, 10)["metrics"]), loss)
    assert found is None if step is None else found is not None and found.step == pytest.approx(step)


def test_runs_that_differ_in_the_seed_alone_are_one_setting() -> None:
    found = grouped([run(0, 10), run(1, 10), faster(0, 20), faster(1, 20), run(0, 5, schedule__name="one_cycle")])
    assert {name: sorted(runs) for name, runs in found.items()} == {
        "baseline": [0, 1],
        "lora_plus": [0, 1],
        "schedule.name=one_cycle": [0],
    }


def test_the_table_says_how_much_faster(tmp_path: Path) -> None:
    assert "Not measured yet" in settings(tmp_path)
    runs = [run(0, 10), run(1, 10), faster(0, 20), faster(1, 40), run(0, 5, schedule__name="one_cycle")]
    (tmp_path / "convergence.json").write_text(json.dumps({"runs": runs}))
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in settings(tmp_path).splitlines() if line.startswith("|")]
    by_name = {line[0]: line for line in lines}
    # The baseline's last loss, after 20 steps of one seed and 10 of the other: 2 and 4 times as fast.
    assert by_name["lora_plus"][3:7] == ["15.0 ± 7.1", "3.00× ± 1.41", "3.00× ± 1.41", "3,000 ± 1,414"]
    assert by_name["lora_plus"][7] == "2x faster convergence"
    assert by_name["schedule.name=one_cycle"][3] == "– (1 of 1 never)" and "10–20 %" in by_name["schedule.name=one_cycle"][7]
    assert by_name["baseline"][1:4] == ["2", "3.1000 ± 0.7071", "–"]


def test_runs_of_another_version_are_compared_in_steps_alone(tmp_path: Path) -> None:
    """An option that the baseline's version did not have is no difference, unless it is on; the GPU was shared otherwise."""
    later = run(0, 20, optimizations__new={"enabled": False, "size": 3}, model__trust=False)
    on = run(0, 20, optimizations__new={"enabled": True, "size": 3})
    assert list(grouped([run(0, 10), later, on])) == ["baseline", "new"]
    on["environment"] |= {"commit": "def"}
    (tmp_path / "convergence.json").write_text(json.dumps({"runs": [run(0, 10), on]}))
    (line,) = (line for line in settings(tmp_path).splitlines() if line.startswith("| new"))
    assert [cell.strip() for cell in line.split("|")[4:8]] == ["20.0", "2.00×", "–", "–"]
