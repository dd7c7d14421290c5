"""`mode=probe` from end to end, on a CPU."""

import json
from pathlib import Path

import pytest

from elite import compose, modes
from tests.conftest import Program


def test_a_probe_and_a_step(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "new" / "probe.json"
    overrides = "probe.steps=2", f"probe.file={file}", f"output.cache={cache}", "optimizations.mixed_precision.enabled=false"
    layout = "executor.chunk=16", "executor.block=32", "executor.keep=layers"
    modes.run(compose.from_overrides("debug=tiny", "mode=probe", "training.global_batch_tokens=256", *layout, *overrides))
    found = json.loads(file.read_text())
    assert (found["executor"], found["context"]) == ("streamed", 256) and found["environment"]["versions"]["torch"]
    assert (found["layout"]["chunk"], found["layout"]["block"], found["layout"]["keep"]) == (16, 32, "layers")
    probe = found["probe"]
    parts = [probe[f"{name}_s"] for name in ("embed", "forward", "refill", "head", "backward")]
    assert (probe["tokens"], probe["chunks"]) == (256, 16) and probe["step_s"] == pytest.approx(sum(parts))
    assert all(part > 0 for part in parts) and probe["host_rss_peak_bytes"] > 2**20
    assert len(found["steps"]) == 2
    # Random tokens of a random model: a guess among 512.
    assert all(step["step_s"] > 0 and step["tokens_per_s"] > 0 and step["loss"] == pytest.approx(6.24, abs=0.3) for step in found["steps"])
    assert all(value > 0 for name, value in found["planned"].items() if name != "host_bytes")
    shown = capsys.readouterr().out
    assert "256 tokens, 16 chunks" in shown and all(word in shown for word in ("plan", "probe", "step 1", "step 2"))


def test_a_probe_that_does_not_fit_is_refused(program: Program, tmp_path: Path) -> None:
    done = program("debug=tiny", "mode=probe", f"tier.context={2**28}", "hardware=cpu", "probe.file=probe.json")
    assert done.returncode == 2 and "Traceback" not in done.stderr + done.stdout, done.stderr
    assert done.stderr.count("error:") == 1 and "the plan does not fit" in done.stderr
    assert not (tmp_path / "probe.json").exists()
