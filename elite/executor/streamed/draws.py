"""Random state before each layer and chunk, so that computing one again draws the same masks."""

import torch

from elite.chunks import Chunk
from elite.executor.streamed.step import Step


class Draws:
    """The default generators that a layer may draw from.

    Args:
        device: where it computes.
    """

    def __init__(self, device: torch.device) -> None:
        self._generators = [torch.default_generator]
        if device.type == "cuda":
            index = device.index if device.index is not None else torch.cuda.current_device()
            # There once CUDA is at work.
            torch.cuda.init()
            self._generators.append(torch.cuda.default_generators[index])

    def seed(self, step: Step, stage: int, chunk: Chunk) -> None:
        """Set them for a stage of the model (0 before the layers, then one each) and a chunk."""
        if step.seed is not None:
            # torch.manual_seed would queue a call, with a formatted stack, for every kind of device that is not here.
            for generator in self._generators:
                generator.manual_seed(step.seed + stage * len(step.order) + chunk.index)
