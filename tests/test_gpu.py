"""What only a CUDA GPU can show (make test-gpu)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AttentionInterface

from elite.attention import DOCUMENT_SDPA
from elite.callbacks import metrics_file
from elite.data.batches import Batch
from elite.distributed.ranks import Ranks
from elite.executor.whole import WholeExecutor
from elite.runfolder import RunFolder
from elite.training.step import accumulate, make_scaler
from tests.conftest import ROOT
from tests.models import tiny
from tests.test_attention import row

pytestmark = pytest.mark.gpu


def gradients(dtype: torch.dtype, batch: Batch, kind: str) -> tuple[float, dict[str, torch.Tensor]]:
    device = torch.device("cuda")
    model = tiny(kind, DOCUMENT_SDPA, hidden_size=256, num_attention_heads=4, intermediate_size=512)
    torch.nn.Module.to(model, device)
    ranks = Ranks(0, 1, device)
    loss = accumulate(WholeExecutor(model, dtype), [batch], make_scaler(device, torch.float32), ranks)
    return loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["llama", "phi", "qwen2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_stays_close_to_fp32(kind: str, dtype: torch.dtype) -> None:
    batch = row(300, 37, 175)
    loss, low = gradients(dtype, batch, kind)
    expected, full = gradients(torch.float32, batch, kind)
    assert loss == pytest.approx(expected, abs=1.5e-2)
    for name, gradient in full.items():
        cosine = torch.nn.functional.cosine_similarity(low[name].flatten().float(), gradient.flatten(), dim=0)
        assert cosine > 0.99, (name, cosine.item())


def test_shared_heads_in_fp32_form_no_scores() -> None:
    query, key, value = (torch.randn(1, heads, 8192, 64, device="cuda", requires_grad=True) for heads in (8, 2, 2))
    module = torch.nn.Module()
    module.is_causal = True  # type: ignore[assignment]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out, _ = AttentionInterface()[DOCUMENT_SDPA](module, query, key, value, None, documents=((8192,),))
    out.sum().backward()
    # Scores of all heads would take 2 GiB.
    assert torch.cuda.max_memory_allocated() - before < 256 * 2**20
    assert key.grad is not None and key.grad.shape == key.shape


def run(folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "train.py"), "debug=tiny", f"output.cache={folder / 'cache'}", *overrides]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize(
    "variant",
    [
        (),
        ("optimizations=extreme", "adapter.rank=64"),
        ("optimizations=none",),
        ("adapter.method=full",),
        ("hardware=rtx2060s", "hardware.cap=memory"),
        ("training.deterministic=true",),
    ],
)
def test_it_trains(variant: tuple[str, ...], tmp_path: Path, repository: Path) -> None:
    done = run(tmp_path, f"data.repo={repository}", *variant)
    assert done.returncode == 0, done.stderr
    folder = RunFolder(next((tmp_path / "runs").glob("*/*/run.json")).parent)
    steps = [line for line in metrics_file.read(folder.metrics) if "loss" in line]
    assert len(steps) == 3 and all(line["gpu_peak_bytes"] > 0 and line["mfu"] > 0 for line in steps)
    summary, looked = json.loads(folder.summary.read_text()), json.loads(folder.preflight.read_text())
    assert summary["measured_peak_bytes"] > 0 and summary["reserved_peak_bytes"] >= summary["measured_peak_bytes"]
    assert looked["fits"] and looked["measured_bytes"] > 0 and "preflight: planned" in done.stdout


def test_a_cap_is_a_cap(tmp_path: Path, repository: Path) -> None:
    program = (
        "import torch; from elite import compose, hardware, prepared; from elite.distributed.ranks import joined\n"
        "config = compose.from_overrides('hardware=rtx2060s', 'hardware.cap=memory').config\n"
        "with joined() as ranks:\n"
        "    prepared.prepare_process(config, ranks, hardware.device(config.hardware))\n"
        "    torch.empty(int(6.5 * 2**30), dtype=torch.uint8, device='cuda')\n"
        "    torch.cuda.empty_cache()\n"
        "    torch.empty(int(7.5 * 2**30), dtype=torch.uint8, device='cuda')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "7.50 GiB" in done.stderr and "OutOfMemoryError" in done.stderr


def test_a_card_that_is_not_here_is_refused(tmp_path: Path, repository: Path) -> None:
    done = run(tmp_path, f"data.repo={repository}", "hardware=rtx2060s")
    assert done.returncode == 2 and "hardware.cap=memory" in done.stderr and "Traceback" not in done.stderr
