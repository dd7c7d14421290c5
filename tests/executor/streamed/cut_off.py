"""A streamed step of two micro-batches in processes that end early: each makes everything anew but for what the one before has kept."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from elite.data.batches import Batch, random_batch
from elite.executor.contract import StepCut
from elite.executor.streamed.attach import attach
from elite.executor.streamed.executor import StreamedExecutor
from elite.executor.streamed.mid_step import MidStep
from elite.streaming import Keep, Place, Streaming
from tests.executor.streamed.exactness import VOCABULARY
from tests.models import tiny
from tests.training.rig import ALONE

LAYERS, TOKENS, TAIL, PASSES, LABELS = 3, 22, 5, 2, 40
LAYOUT = Streaming(chunk=16, block=7, keep=Keep.layers, boundaries=Place.disk, journal=True)
OF_A_LAYER = 5 + 4
"""Calls in a layer's backward: documents of 22, 17 and 5 tokens are two chunks, two and one; keys of the first four are made before."""
REFILLED = 2
"""Calls more where a process ends between a document's last forward and its first backward, which leave their keys to each other."""


class Killed(BaseException):
    """Stands for the end of the process: nothing of ours catches it."""


@dataclass
class Done:
    """What a process did before it ended."""

    gradients: dict[str, Tensor] = field(default_factory=dict)
    losses: list[Tensor] = field(default_factory=list)
    calls: int = 0
    """Of layers, on chunks."""
    stages: int = 0


@dataclass(frozen=True)
class Case:
    """A step of two micro-batches."""

    layout: Streaming = LAYOUT
    full: bool = False
    dtype: torch.dtype = torch.float32
    number: int = 5
    seed: int = 11
    rows: int = 2
    tail: int = TAIL
    tokens: int = 2
    """Seed of the batches."""

    def model(self) -> Any:
        core = tiny("llama", num_hidden_layers=LAYERS)
        if self.full:
            return core
        core.requires_grad_(False)
        torch.manual_seed(4)
        options = LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.2, task_type="CAUSAL_LM", init_lora_weights=False)
        return get_peft_model(core, options).train()

    def window(self) -> list[Batch]:
        generator = torch.Generator().manual_seed(self.tokens)
        return [random_batch(self.rows, TOKENS, VOCABULARY, generator, self.tail) for _ in range(PASSES)]

    def process(self, folder: Path, call: int | None = None, stage: int | None = None, factor: float = 1.0) -> Done:
        """The step from its beginning, or from what an earlier process has left in `folder`, with everything else made anew.

        Args:
            call: ends at this call of a layer, from 0.
            stage: is asked to stop in this stage, from 1.
            factor: of the trained weights.
        """
        model, done = self.model(), Done()
        core = model if self.full else model.get_base_model()
        for parameter in model.parameters():
            parameter.data.mul_(factor if parameter.requires_grad else 1)
        attached = attach(model, replace(self.layout, folder=str(folder / "others")))
        journal, executor = MidStep(attached.runner, core, folder / "mid_step", ALONE), StreamedExecutor(model, self.dtype)
        window = self.window()

        def stopping() -> bool:
            done.stages += 1
            return done.stages == stage

        torch.manual_seed(self.seed)
        with counted(core.model.layers, done, call):
            try:
                journal.begin(self.number, window, 1.0, stopping)
                for batch in window:
                    loss = executor.loss_sum(batch) / LABELS
                    loss.backward()
                    done.losses.append(loss.detach())
            except (Killed, StepCut) as end:
                assert isinstance(end, Killed) == (stage is None)
                return done
        assert call is None and stage is None, "never reached"
        done.gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        journal.end()
        assert not (folder / "mid_step").exists()
        return done


def works(arguments: dict[str, Any]) -> bool:
    """Whether a layer is called on a chunk: not for the decoder's arguments, nor to be tried on a few tokens."""
    return "work" in arguments and arguments["work"].chunk.index >= 0


@contextmanager
def counted(layers: nn.ModuleList, done: Done, last: int | None) -> Iterator[None]:
    """Within, calls of layers on chunks are counted; at number `last` the process ends."""

    def before(_layer: nn.Module, _inputs: Any, arguments: dict[str, Any]) -> None:
        if works(arguments):
            if done.calls == last:
                raise Killed
            done.calls += 1

    hooks = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in layers]
    yield
    for hook in hooks:
        hook.remove()


def assert_equal(found: Done, expected: Done) -> None:
    """Losses and all gradients, bit for bit."""
    assert len(found.losses) == PASSES and found.gradients.keys() == expected.gradients.keys()
    assert all(torch.equal(one, two) for one, two in zip(found.losses, expected.losses, strict=True))
    for name, gradient in expected.gradients.items():
        assert gradient.abs().max() > 0 and torch.equal(found.gradients[name], gradient), name


CASES = {
    "layers": Case(),
    "attention": Case(replace(LAYOUT, keep=Keep.attention)),
    "bf16": Case(dtype=torch.bfloat16),
    "keys on the host": Case(replace(LAYOUT, keep=Keep.attention, keys_values=Place.host), dtype=torch.bfloat16),
    "full": Case(full=True),
}


@cache
def undisturbed(case: Case, factor: float = 1.0) -> Done:
    """The step in one go."""
    with TemporaryDirectory() as folder:
        return case.process(Path(folder), factor=factor)
