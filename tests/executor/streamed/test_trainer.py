"""Under transformers' own Trainer: the same losses, step by step, and the same weights at the end."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, Trainer, TrainingArguments

from elite.executor.streamed.attach import attach
from elite.streaming import Keep, Streaming
from tests.executor.streamed.exactness import tokens, uneven

STEPS = 4
LAYOUT = Streaming(chunk=16, block=7)


class Recording(Trainer):
    """Keeps the loss of every micro-batch; the log rounds."""

    losses: list[Tensor]

    def training_step(self, *arguments: Any, **named: Any) -> Tensor:
        """As its own."""
        loss: Tensor = super().training_step(*arguments, **named)
        self.losses.append(loss.detach().clone())
        return loss


def rows(packed: bool) -> list[dict[str, Tensor]]:
    """Rows of 40 tokens with some unscored ones; packed rows hold two documents, told by their positions."""
    found = []
    for i in range(4 * STEPS):
        ids = tokens(1, 40, seed=i)[0]
        row = {"input_ids": ids, "labels": ids.masked_fill(tokens(1, 40, seed=100 + i)[0] < 5 * i, -100)}
        if packed:
            row["position_ids"] = torch.cat([torch.arange(25), torch.arange(15)])
        found.append(row)
    return found


def train(model: PreTrainedModel, packed: bool, folder: Path) -> tuple[list[float], list[float]]:
    """Losses of micro-batches and of evaluations."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=STEPS,
        learning_rate=1e-2,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=3,
    )
    trainer = Recording(model=model, args=arguments, train_dataset=rows(packed), eval_dataset=rows(packed)[:3])
    trainer.losses = []
    trainer.train()
    return [loss.item() for loss in trainer.losses], [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]


@pytest.mark.parametrize(
    ("packed", "layout"),
    [(False, LAYOUT), (True, Streaming(chunk=16, block=7, keep=Keep.multilevel, slots=1))],
    ids=["rows", "packed"],
)
def test_trainer(packed: bool, layout: Streaming, tmp_path: Path) -> None:
    plain, model = uneven("llama"), uneven("llama")
    expected = train(plain, packed, tmp_path / "plain")
    attached = attach(model, layout)
    found = train(model, packed, tmp_path / "streamed")
    attached.undo()
    assert len(expected[0]) == 2 * STEPS and len(expected[1]) == STEPS
    assert abs(expected[1][0] - expected[1][-1]) > 1e-2, "nothing was learnt"
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)
    for one, two in zip(model.parameters(), plain.parameters(), strict=True):
        # Adam divides tiny gradients by their own size: a rounding error may count for a whole step there.
        assert (one - two).norm() <= 1e-3 * two.norm()
