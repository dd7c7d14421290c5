"""Checkpoints round-trip bit for bit, and damage is noticed."""

import json
from pathlib import Path

import pytest
import torch

from elite import checkpoint


def write(folder: Path, step: int, state: dict[str, object]) -> Path:
    def save_model(path: Path) -> None:
        path.mkdir()
        (path / "weights").write_bytes(b"w" * 100)

    return checkpoint.write(folder, checkpoint.snapshot(step, save_model, state))


def equal(one: object, two: object) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(two, torch.Tensor) and one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, dict):
        return isinstance(two, dict) and one.keys() == two.keys() and all(equal(one[key], two[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(two) and len(one) == len(two) and all(map(equal, one, two))
    return type(one) is type(two) and one == two


def test_a_tree_comes_back_as_it_was(tmp_path: Path) -> None:
    shared = torch.randn(3, 4)
    state = {
        "optimizer": {
            "state": {0: {"step": torch.tensor(3.0), "exp_avg": shared, "again": shared[:2]}},
            "param_groups": [{"betas": (0.9, 0.95), "lr": 1e-3}],
        },
        "bytes": torch.arange(5, dtype=torch.uint8),
        "half": torch.randn(2).bfloat16(),
        "nothing": None,
        "flag": True,
    }
    assert equal(checkpoint.load_state(write(tmp_path, 7, state)), state)


def test_eight_bit_optimizer_state_comes_back(tmp_path: Path) -> None:
    import bitsandbytes

    def optimizer() -> tuple[torch.nn.Linear, torch.optim.Optimizer]:
        torch.manual_seed(0)
        linear = torch.nn.Linear(128, 64)
        return linear, bitsandbytes.optim.AdamW8bit(linear.parameters(), lr=1e-2)

    def step(linear: torch.nn.Linear, optimizer: torch.optim.Optimizer) -> None:
        linear(torch.ones(2, 128)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    one, first = optimizer()
    step(one, first)
    path = write(tmp_path, 1, {"optimizer": first.state_dict(), "weights": one.state_dict()})
    two, second = optimizer()
    loaded = checkpoint.load_state(path)
    two.load_state_dict(loaded["weights"])
    second.load_state_dict(loaded["optimizer"])
    step(one, first)
    step(two, second)
    assert torch.equal(one.weight, two.weight) and torch.equal(one.bias, two.bias)


def test_random_states_come_back(tmp_path: Path) -> None:
    import random

    import numpy as np

    path = write(tmp_path, 1, {"random": checkpoint.random_state()})
    expected = (random.random(), float(np.random.rand()), torch.rand(3).tolist())
    checkpoint.set_random_state(checkpoint.load_state(path)["random"])
    assert (random.random(), float(np.random.rand()), torch.rand(3).tolist()) == expected


@pytest.mark.parametrize("victim", ["state.json", "state.safetensors", "model/weights", checkpoint.MANIFEST])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "gone"])
def test_damage_is_noticed_and_the_one_before_is_used(tmp_path: Path, victim: str, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    good = write(tmp_path, 1, {"x": torch.ones(64)})
    bad = write(tmp_path, 2, {"x": torch.ones(64)}) / victim
    content = bad.read_bytes()
    if damage == "gone":
        bad.unlink()
    else:
        middle = len(content) // 2
        bad.write_bytes(
            content[:middle] if damage == "truncated" else content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        )
    assert checkpoint.latest(tmp_path) == good
    assert "step_000002 is damaged" in caplog.text


def test_an_unfinished_save_leaves_no_checkpoint(tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        raise OSError("disk full")

    write(tmp_path, 1, {})
    with pytest.raises(checkpoint.Unsaved, match="disk full"):
        checkpoint.write(tmp_path, checkpoint.snapshot(2, fail, {}))
    assert [path.name for path in tmp_path.glob("step_*")] == ["step_000001"]
    checkpoint.prune(tmp_path, {1})
    assert [path.name for path in tmp_path.iterdir()] == ["step_000001"]


def test_prune_keeps_what_it_is_told(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        write(tmp_path, step, {})
    checkpoint.prune(tmp_path, {2, 4})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000002", "step_000004"]


def test_what_cannot_be_stored_is_refused() -> None:
    with pytest.raises(TypeError, match="cannot hold a set"):
        checkpoint.flatten({"x": {1, 2}}, {})


def test_the_manifest_names_every_file(tmp_path: Path) -> None:
    path = write(tmp_path, 3, {"x": torch.ones(2)})
    names = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}
    assert set(json.loads((path / checkpoint.MANIFEST).read_text())["files"]) == names - {checkpoint.MANIFEST}
