"""The corpus on disk or in memory: the same tokens, the same run, and as much memory as the plan says."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest

from elite.callbacks import metrics_file
from elite.data.tokens import TokenStore, open_store
from elite.facts import Corpus
from elite.optimizations.contract import Estimate, Step
from elite.optimizations.memory_mapped_data import MemoryMappedData, corpus_bytes
from elite.plan import make_plan
from tests.conftest import Trained
from tests.plan.helpers import CORPUS, STANDARD, device, phi2, run_config

OTHERS = (*(name for name in STANDARD if name != MemoryMappedData.name), "adamw_8bit", "qlora")

ON, OFF = (f"optimizations.memory_mapped_data.enabled={word}" for word in ("true", "false"))


def test_a_run_is_the_same_and_says_how_it_read(trained: Trained) -> None:
    request = ("debug=tiny", "training.completion_tokens=0", "data.order=shuffled", "training.deterministic=true")
    mapped, resident = trained(*request, ON, "output.root=mapped"), trained(*request, OFF, "output.root=resident")
    lines = [
        [(line["loss"], line["grad_norm"]) for line in metrics_file.read(folder.metrics) if "loss" in line] for folder in (mapped, resident)
    ]
    assert lines[0] == lines[1] and len(lines[0]) == 3
    applied = [json.loads(folder.summary.read_text())["applied"] for folder in (mapped, resident)]
    assert "memory_mapped_data" in applied[0] and "memory_mapped_data" not in applied[1]
    store = open_store(Path(resident.read_identity()["tokens"]))
    assert store is not None
    planned = [json.loads(folder.plan.read_text())["corpus_bytes"] for folder in (mapped, resident)]
    assert planned == [0, store.tokens.nbytes]
    assert isinstance(store.tokens, np.memmap) and not isinstance(store.resident().tokens, np.memmap)
    assert np.array_equal(store.tokens, store.resident().tokens) and store.resident().tokens.dtype == store.tokens.dtype


def test_reading_takes_what_the_plan_says(tmp_path: Path) -> None:
    tokens = 48 << 20
    np.zeros(tokens, dtype=np.uint16).tofile(tmp_path / "tokens.bin")
    process = psutil.Process()
    before = process.memory_info().rss
    mapped = TokenStore(tmp_path, np.memmap(tmp_path / "tokens.bin", dtype=np.uint16, mode="r"), (), 0, ())
    after_mapping = process.memory_info().rss - before
    resident = mapped.resident()
    after_reading = process.memory_info().rss - before
    corpus = Corpus("here", 1, 0, tokens, 0, 0, "exact")
    planned = corpus_bytes(Step(Estimate()), corpus, phi2())
    assert planned == resident.tokens.nbytes == 2 * tokens
    assert after_mapping < 0.02 * planned and after_reading == pytest.approx(planned, rel=0.05)
    assert corpus_bytes(Step(Estimate()), corpus, replace(phi2(), vocab_size=1 << 16)) == 4 * tokens


@pytest.mark.parametrize("name", ["rtx3090", "cpu"])
def test_a_corpus_beyond_the_host_is_to_be_mapped(name: str) -> None:
    machine = device(name)
    huge = replace(CORPUS, train_tokens=machine.host_ram_bytes)
    config = run_config(4096, OTHERS)
    if name == "cpu":
        machine = replace(machine, memory_usable_bytes=machine.host_ram_bytes)
    refused = make_plan(config, machine, phi2(), huge)
    assert not refused.fits and refused.shortage and refused.fix == "optimizations.memory_mapped_data.enabled=true"
    mapped = make_plan(run_config(4096, (*OTHERS, MemoryMappedData.name)), machine, phi2(), huge)
    assert mapped.fits and mapped.corpus_bytes == 0 and not mapped.shortage
    assert mapped.total_bytes == refused.total_bytes, "device memory is not touched by it"
