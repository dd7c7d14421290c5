"""Label smoothing through every loss there is, against torch's own."""

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor

from elite.data.batches import IGNORE
from elite.executor.streamed.attach import attach
from elite.executor.streamed.executor import StreamedExecutor
from elite.executor.whole import WholeExecutor
from elite.optimizations.fused_loss import FusedLoss
from elite.optimizations.label_smoothing import LabelSmoothing
from elite.optimizations.targets import LoopBuild
from elite.streaming import Streaming
from elite.training.live_bytes import LiveBytes
from tests.models import tiny
from tests.test_attention import row

BATCH = row(13, 24)
CPU = torch.device("cpu")


def smooth(executor: WholeExecutor | StreamedExecutor, epsilon: float) -> None:
    build = LoopBuild(executor, None, [], 1, 1, 0, CPU, lambda: 0.0)
    assert LabelSmoothing(LabelSmoothing.Config(enabled=True, epsilon=epsilon)).apply(build).count == 1


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("kind", ["llama", "phi"])
@pytest.mark.parametrize("way", ["plain", "fused", "streamed"])
def test_it_is_torchs_smoothing_whichever_loss_computes_it(way: str, kind: str, adapters: bool) -> None:
    core = tiny(kind)
    model = get_peft_model(core, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)) if adapters else core
    logits = core(input_ids=BATCH.input_ids, position_ids=BATCH.position_ids, documents=BATCH.documents, use_cache=False).logits
    truth = F.cross_entropy(logits.flatten(0, 1), BATCH.labels.flatten(), ignore_index=IGNORE, reduction="sum", label_smoothing=0.2)
    truth.backward()
    expected = gradients(model)
    model.zero_grad()
    if way == "streamed":
        attach(model, Streaming(chunk=16, block=16), CPU)
    if way == "fused":
        FusedLoss(FusedLoss.Config(enabled=True, tile=7)).apply(core)
    kind_of = StreamedExecutor if way == "streamed" else WholeExecutor
    training, validation = (kind_of(model, torch.float32) for _ in range(2))
    if isinstance(training, WholeExecutor) and isinstance(validation, WholeExecutor):
        training.fused_loss = validation.fused_loss = way == "fused"
    smooth(training, 0.2)
    loss = training.loss_sum(BATCH)
    loss.backward()
    assert loss.item() == pytest.approx(truth.item(), rel=1e-5)
    found = gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, rtol=1e-3, atol=1e-5 * max(1.0, gradient.abs().max().item())), name
    with torch.no_grad():
        plain = F.cross_entropy(logits.flatten(0, 1), BATCH.labels.flatten(), ignore_index=IGNORE, reduction="sum")
        assert validation.loss_sum(BATCH).item() == pytest.approx(plain.item(), rel=1e-5), "validation keeps the plain loss"


def test_it_takes_no_memory_besides() -> None:
    peaks = []
    for epsilon in (0.0, 0.2):
        model, batch = tiny("llama", vocab_size=2003), row(300, 200)
        executor = WholeExecutor(model, torch.float32)
        executor.label_smoothing = epsilon
        live = LiveBytes()
        live.ignore([*model.parameters(), *model.buffers()])
        with live:
            executor.loss_sum(batch).backward()
        peaks.append(live.peak)
    assert peaks[1] == pytest.approx(peaks[0], rel=0.01)
