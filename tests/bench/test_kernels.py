"""The bench of kernels: a CPU times the eager forms and the references; what is written is complete, bytes are those counted by hand."""

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from elite.bench import kernel_case, kernels
from elite.bench.assemble import write
from elite.bench.kernel_case import BOTH, FORWARD, Case, Geometry
from elite.bench.kernel_clock import Clock, error
from tests.kernels.interpreter import run_interpreted

LLAMA = Geometry("tiny_llama", hidden=64, mlp=96, heads=4, kv_heads=2, rotary=16, vocab=257, eps=1e-5, phi=False)
PHI = Geometry("tiny_phi", hidden=80, mlp=96, heads=2, kv_heads=2, rotary=16, vocab=257, eps=1e-5, phi=True, dropout=0.1, q_bias=True)
TOKENS = 32
CPU = torch.device("cpu")
ABSENT = {op for op in ("rotary", "residual", "pack") if not (Path(kernels.__file__).parents[1] / "kernels" / op).is_dir()}
"""Operations whose kernels this checkout does not have: what is measured then is that they are missing."""
# Values of two bytes: 32 tokens of 64 (Phi 80) are 4,096 (5,120) bytes, a weight 128 (160), 32 MLP activations of 96 are 6,144. Queries
# and keys of 4 and 2 heads of 16: 6,144; of Phi's 2 and 2 of 40, of which 16 turn: 4,096. Of the angles,
# whose halves are alike, one is read: 2 · 32 · 8 · 2 = 1,024. Gradients turn in place.
BYTES = {
    ("norm", "tiny_llama", FORWARD): 2 * 4096 + 128,
    ("norm", "tiny_llama", BOTH): 2 * 4096 + 128 + 3 * 4096 + 128,
    ("norm", "tiny_phi", FORWARD): 2 * 5120 + 2 * 160,
    ("norm", "tiny_phi", BOTH): 2 * 5120 + 2 * 160 + 3 * 5120 + 160,
    ("add_norm", "tiny_llama", FORWARD): 4 * 4096 + 128,
    ("add_norm", "tiny_llama", BOTH): 8 * 4096 + 2 * 128,
    ("rotary", "tiny_llama", FORWARD): 2 * 6144 + 1024,
    ("rotary", "tiny_llama", BOTH): 4 * 6144 + 2 * 1024,
    ("rotary", "tiny_phi", FORWARD): 2 * 4096 + 1024,
    ("rotary", "tiny_phi", BOTH): 4 * 4096 + 2 * 1024,
    ("swiglu", "tiny_llama", FORWARD): 3 * 6144,
    ("swiglu", "tiny_llama", BOTH): 8 * 6144,
    ("gelu", "tiny_phi", FORWARD): 2 * 6144,
    ("gelu", "tiny_phi", BOTH): 5 * 6144,
    ("residual", "tiny_phi", FORWARD): 4 * 5120,
    ("residual", "tiny_phi", BOTH): 7 * 5120,
    # 32 keys of 4 heads of 16 in half precision, 2 heads in fp32 twice.
    ("group_sum", "tiny_llama", FORWARD): 4096 + 2 * 4096,
    # Three outputs of attention, three log-sum-exps of 4 · 32 fp32 values.
    ("merge", "tiny_llama", FORWARD): 3 * 4096 + 3 * 512,
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All operations on both geometries, read back from the file."""
    path = tmp_path_factory.mktemp("bench") / "kernels.json"
    for result in kernels.compare([LLAMA, PHI], [TOKENS], tuple(kernels.OPS), Clock(CPU, fill_ms=1.0)):
        write(path, result)
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def test_the_file_says_where_it_comes_from(found: dict[str, Any]) -> None:
    assert found["device"] == "CPU" and found["copy_gb_s"] > 0
    assert found["environment"]["versions"]["torch"] and set(found["environment"]["libraries"]) == set(kernels.LIBRARIES)


def test_every_operation_has_its_rows(found: dict[str, Any]) -> None:
    rows = {(row["op"], row["model"], row["variant"], row["pass"]) for row in found["rows"]}
    assert len(rows) == len(found["rows"]) and {row[0] for row in rows} == set(kernels.OPS)
    assert {row[1] for row in rows if row[0] in ("gelu", "residual")} == {"tiny_phi"}
    # Rows of tiny_phi's 80 are not of whole blocks of 64.
    assert {row[1] for row in rows if row[0] in ("swiglu", "group_sum", "dequantise")} == {"tiny_llama"}
    losses = [(variant, which) for op, model, variant, which in sorted(rows) if op == "linear_cross_entropy" and model == "tiny_phi"]
    assert losses == [("frozen head", BOTH), ("no gradients", FORWARD), ("trained head", BOTH)]
    assert {variant for op, _, variant, _ in rows if op == "lora"} == {"q_proj", "fc1", "gate_proj"}
    assert {variant for op, _, variant, _ in rows if op == "pack"} == {"int8 encode", "int8 decode", "int4 encode", "int4 decode"}


def test_providers_are_timed_and_right(found: dict[str, Any]) -> None:
    for row in found["rows"]:
        assert set(row["providers"]) == {"eager", "reference"} and row["tokens"] == TOKENS
        for name, figures in row["providers"].items():
            if row["op"] in ABSENT and "unavailable" in figures:
                assert "No module named" in figures["unavailable"] and row["unchecked"] == figures["unavailable"]
                continue
            low, middle, high = figures["ms"]
            assert 0 < low <= middle <= high
            assert row["op"] in ABSENT or figures["error"] < 0.006, (row["op"], name)
            share = row["bytes"] and row["bytes"] / (middle / 1e3) / (found["copy_gb_s"] * 1e9)
            assert figures.get("bandwidth_share") == (pytest.approx(share) if share else None)


def test_bytes_by_hand(found: dict[str, Any]) -> None:
    rows = {(row["op"], row["model"], row["pass"]): row["bytes"] for row in found["rows"] if row["op"] not in ("pack", "dequantise")}
    assert {key: rows[key] for key in BYTES} == BYTES
    assert all(rows[key] is None for key in rows if key[0] in ("linear_cross_entropy", "lora"))
    # 8 bits a value and a scale of 16 for each 64; 4.5 bits a value: 64 values take 66 bytes, with padding 68, and 36.
    packed = {(row["variant"]): row["bytes"] for row in found["rows"] if row["op"] == "pack" and row["model"] == "tiny_llama"}
    eight, four = 4096 + TOKENS * 68, 4096 + TOKENS * 36
    assert packed == {"int8 encode": eight, "int8 decode": eight, "int4 encode": four, "int4 decode": four}
    # Weights of 64 · 64 and 96 · 64 in two bytes and a half, a scale of a byte for each 64, a coarser one of four for each 256 of those,
    # 16 codes, 256 of scales and their mean.
    whole = {row["variant"]: row["bytes"] for row in found["rows"] if row["op"] == "dequantise"}
    assert whole == {name: 64 * rows * 5 // 2 + rows + 4 + 4 * (16 + 256 + 1) for name, rows in (("q", 64), ("up", 96))}


def test_geometries_are_those_of_the_models() -> None:
    phi, llama, qwen, smol = map(kernel_case.geometry, kernels.MODELS)
    assert (phi.head_dim, phi.rotary, phi.dropout, phi.phi, phi.q_bias) == (80, 32, 0.1, True, True)
    assert (llama.hidden, llama.mlp, llama.rotary, llama.kv_heads, llama.q_bias) == (4096, 14336, 128, 8, False)
    assert (qwen.rotary, qwen.eps, qwen.q_bias, qwen.vocab) == (128, 1e-6, True, 151936)
    assert (smol.heads, smol.rotary, smol.dropout) == (9, 64, 0.0)


def test_matrix_products_are_short_unless_tokens_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(CPU, fill_ms=1.0)
    monkeypatch.setattr(kernels, "TOKENS", (8, 16))
    *_, last = kernels.compare([LLAMA], None, ("swiglu", "lora"), clock)
    tokens = {(row["op"], row["tokens"]) for row in last["rows"]}
    assert tokens == {("swiglu", 8), ("swiglu", 16), ("lora", 8)}


def failing() -> Any:
    """A provider whose library is not here."""
    raise ModuleNotFoundError("No module named 'liger_kernel'\nsecond line")


def test_what_fails_is_kept_with_its_reason() -> None:
    (case,) = kernels.OPS["swiglu"](LLAMA, TOKENS, CPU)
    rows = kernels.measured(replace(case, reference=failing), Clock(CPU, fill_ms=1.0), 1.0)
    assert [row["pass"] for row in rows] == [FORWARD, BOTH]
    for row in rows:
        said = "ModuleNotFoundError: No module named 'liger_kernel'"
        assert row["providers"]["reference"] == {"unavailable": said} and row["unchecked"] == said
        assert row["providers"]["eager"]["error"] is None and row["providers"]["eager"]["ms"]
        assert kernels.progress(row).endswith(f"reference: {said}")


def test_progress_compares_with_the_fastest_other() -> None:
    providers = {"elite": {"ms": [1, 2.0, 3]}, "eager": {"ms": [1, 9.0, 9]}, "liger": {"ms": [1, 1.5, 2]}}
    row = {"op": "norm", "variant": "", "model": "m", "tokens": 8, "pass": FORWARD, "providers": providers}
    assert kernels.progress(row).endswith("2.000 ms    0.75× liger")


def test_errors_are_relative_and_the_worst_counts() -> None:
    found, expected = [torch.tensor([3.0, 4.5]), torch.zeros(2)], [torch.tensor([3.0, 4.0]), torch.zeros(2)]
    assert error(found, expected) == pytest.approx(0.1)
    assert error([found[0], torch.tensor([0.0, 0.5])], expected) == pytest.approx(0.5)


def test_a_provider_that_writes_to_its_inputs_spoils_no_other() -> None:
    def spoiling(more: Tensor, base: Tensor, out: Tensor) -> Tensor:
        made: Tensor = more.unflatten(1, (2, 2)).float().sum(2) + base
        base.zero_()
        return made

    (case,) = kernels.OPS["group_sum"](LLAMA, TOKENS, CPU)
    (row,) = kernels.measured(replace(case, eager=spoiling), Clock(CPU, fill_ms=1.0), 1.0)
    assert row["providers"]["eager"]["error"] < 1e-6 and row["providers"]["reference"]["error"] == 0


def check_ours(device: str) -> None:
    """Each of elite's own providers gives what the reference gives."""
    for case in cases(torch.device(device)):
        expected, why = kernels._expected(case)
        if case.op in ABSENT:
            continue
        results = kernels._results(case, case.ours(), case.owned().checked_inputs)
        for which in case.passes:
            # The interpreter cuts what a GPU rounds.
            assert not why and error(results[which], expected[which]) < 0.008, (case.op, case.variant, which)


def cases(device: torch.device) -> Iterator[Case]:
    for make in kernels.OPS.values():
        for geometry in (LLAMA, PHI):
            yield from make(geometry, TOKENS, device)


def test_our_providers_interpreted() -> None:
    run_interpreted("tests.bench.test_kernels", "check_ours")


@pytest.mark.gpu
def test_our_providers() -> None:
    check_ours("cuda")


def test_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "kernels.json"
    monkeypatch.setattr(sys, "argv", ["kernels", str(file), "--models", "smollm2_135m", "--tokens", "8", "--ops", "norm", "merge"])
    kernels.main()
    found = json.loads(file.read_text())
    assert [(row["op"], row["model"], row["tokens"]) for row in found["rows"]] == [
        ("norm", "smollm2_135m", 8),
        ("norm", "smollm2_135m", 8),
        ("merge", "smollm2_135m", 8),
    ]
    assert found["rows"][0]["shape"] == [[8, 576], [576]] and found["seconds"] > 0
