"""Checkpoint offload.

What:   gradient checkpointing whose layer inputs wait in host memory.
How:    torch.utils.checkpoint saves each layer's input through a hook that copies it to pinned memory on a side stream while the next
        layer works; the backward brings it back one layer ahead. The copies hide behind a layer's work once sequences are long.
Memory: two layers' inputs in flight instead of one a layer. The host holds one [tokens, hidden] tensor a layer, each rounded up to a
        power of two by torch's allocator of pinned memory, which reuses them from step to step.
Source: Unsloth's offloaded checkpointing; Bekman et al. 2025, arXiv:2506.13996 (Arctic Long Sequence Training).
"""

from dataclasses import replace
from typing import Any, ClassVar

from elite.facts import Facts
from elite.optimizations.contract import Applied, Exactness, Optimization, Site, Stage, Step
from elite.optimizations.gradient_checkpointing import GradientCheckpointing

IN_FLIGHT = 2
"""Layers' inputs on the device at once: one in use or being stored, one arriving."""


class CheckpointOffload(Optimization):
    """See the module's docstring."""

    name = "checkpoint_offload"
    title = "gradient checkpointing in host memory"
    row = 48
    stage = Stage.executor
    exactness = Exactness.EXACT
    claims: ClassVar[frozenset[Site]] = frozenset({Site.LAYER_ACTIVATIONS, Site.SAVED_TENSORS})
    source = "Unsloth; Bekman et al. 2025"

    def check(self, facts: Facts) -> str | None:
        return None

    def memory(self, step: Step, facts: Facts) -> Step:
        checkpointed = GradientCheckpointing(self.config).memory(step, facts)
        # On a CPU host memory is the device.
        return checkpointed if facts.device.kind == "cpu" else replace(checkpointed, inputs_at_once=IN_FLIGHT)

    def host_memory(self, step: Step, facts: Facts) -> float:
        if facts.device.kind == "cpu":
            return 0.0
        row = step.hidden * facts.model.hidden_size * facts.micro_tokens
        # torch's allocator of pinned memory rounds up to a power of two.
        return facts.model.num_hidden_layers * 2.0 ** (row - 1).bit_length()

    def apply(self, target: Any) -> Applied:
        from torch.autograd.graph import saved_tensors_hooks

        from elite.optimizations.functions.offload import HostShelf
        from elite.optimizations.functions.recompute import Recomputed

        layers, shelf = target.get_decoder().layers, HostShelf(IN_FLIGHT)
        undo = Recomputed(layers, lambda: saved_tensors_hooks(shelf.pack, shelf.unpack)).undo
        return Applied(len(layers), "decoder layers", undo)
