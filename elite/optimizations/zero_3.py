"""ZeRO-3: ranks divide the weights, too.

What:   each rank keeps a part of every weight, frozen ones included; a module's weights are whole only while it is at work.
How:    as ZeRO-2 (elite/optimizations/zero_2.py), by DeepSpeed's engine. Weights are loaded into host memory and divided one by one, so a
        model may be larger than a device. Under the whole executor a layer is gathered before it is called, the next one meanwhile, and
        again for its backward; under the streamed one (elite/executor/streamed/divided.py) once for each pass over its chunks, however
        many these are, forward and backward. With `offload_parameters` the parts wait in host memory. No text is completed in the course
        of the run: that would take all ranks.
Memory: R ranks: weights by R, and what is whole at once, two layers (one under the streamed executor) or the embedding; of what is trained
        state, gradients and fp32 weights by R, as in ZeRO-2. With `offload_parameters` the parts are the host's. With `offload_optimizer` a
        gradient's part comes back to the device before it leaves, and up to 250 million values of it in fp64, for its norm.
Source: Rajbhandari et al. 2020, arXiv:1910.02054; Rajbhandari et al. 2021, arXiv:2104.07857 (offload); DeepSpeed.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from elite.facts import Facts
from elite.optimizations.contract import Behind, Decision, Exchange, Passes, Site, Step
from elite.optimizations.parts import FP32
from elite.optimizations.zero_2 import EXCHANGE, ZeRO2, active_zero

PERSISTENT = 2**14
"""Values of a parameter that stays whole: gathering vectors is waiting for messages alone."""


class ZeRO3(ZeRO2):
    """See the module's docstring."""

    @dataclass(frozen=True)
    class Config(ZeRO2.Config):
        """Options."""

        offload_parameters: bool = False
        """Parts of weights wait in host memory."""

    name = "zero_3"
    title = "ZeRO-3 (divided weights)"
    row = 35
    source = "Rajbhandari et al. 2020, 2021; DeepSpeed"
    number = 3

    @property
    def excludes(self) -> Mapping[Site, str]:
        weights = "ranks have parts of the weights alone when it would act on them"
        sites = (Site.EVALUATED_WEIGHTS, Site.SLOW_WEIGHTS, Site.COMPILATION)
        return {**super().excludes, **dict.fromkeys(sites, weights)}

    def check(self, facts: Facts) -> str | None:
        if facts.device.count == 1:
            return (
                "one rank has no other to divide weights with: executor=streamed brings them from host memory (executor.weights=streamed)"
            )
        if facts.executor == "streamed" and facts.host_weights:
            return "weights wait whole in host memory (executor.weights=streamed); offload_parameters keeps their parts there"
        if facts.journal:
            return "ranks cannot be cut off alike within a step (training.mid_step_checkpoint), and each layer takes all of them"
        if facts.adapter == "converted":
            return "maps that are trained in the midst of frozen ones are not divided: adapter.method=lora or full"
        return super().check(facts)

    @property
    def offloads(self) -> bool:
        return bool(self.config.offload_optimizer or self.config.offload_parameters)

    def memory(self, step: Step, facts: Facts) -> Step:
        of_two = super().memory(step, facts)
        standing, model = of_two.standing, facts.model
        weights = standing.linear_weights + standing.other_weights
        adapters = FP32 * facts.trainable_params if facts.adapter == "lora" else 0.0
        layer = weights / model.total_params * model.layer_params + adapters / model.num_hidden_layers
        at_once = (1 if facts.executor == "streamed" else 2) * layer
        embedding = weights / model.total_params * model.embedding_params
        whole = max(at_once, embedding)
        part, offloaded = 1 / facts.device.count, self.config.offload_parameters and facts.device.kind == "cuda"
        kept = 0.0 if offloaded else part
        parts = replace(
            standing,
            linear_weights=standing.linear_weights * kept,
            other_weights=standing.other_weights * kept,
            trainable_copy=standing.trainable_copy - adapters * (1 - kept),
            runtime=standing.runtime + min(whole, (weights + adapters) * (1 - kept)),
        )
        # For the step the engine copies the gradients that it has added up.
        on_host = self.config.offload_optimizer and facts.device.kind == "cuda"
        copied = 0.0 if on_host else FP32 * facts.trainable_params * part
        made = replace(of_two, standing=parts, optimizer_workspace=of_two.optimizer_workspace + copied)
        # The loss takes the head's weights outside of its call, so the engine lets go of them with the whole model's.
        beside = 0.0 if facts.executor == "streamed" else min(at_once, embedding) * (1 - kept)
        made = replace(made, leaves_in=facts.device.count if on_host else None, beside_head=beside)
        # Its linear maps convert the weight at work, and again when they go back.
        return replace(made, offloaded_weights=(weights + adapters) * part if offloaded else 0.0, copies_stay=False)

    def host_memory(self, step: Step, facts: Facts) -> float:
        return super().host_memory(step, facts) + step.offloaded_weights

    def _sums(self, facts: Facts) -> int:
        # Passes add to the same.
        return 1

    def _on_the_way(self, facts: Facts) -> float:
        # Parts go straight from what was scattered.
        return 0.0

    def exchange(self, passes: Passes, facts: Facts) -> Exchange:
        """Gradients in every backward to who keeps them, and weights for each pass, under the whole executor less the last layer or two,
        which a forward leaves for the backward."""
        handed, ranks = passes.count * (FP32 * facts.trainable_params + passes.weights), facts.device.count
        return Exchange(EXCHANGE, handed, (ranks - 1) / ranks * handed, Behind.nothing)

    def settings(self, facts: Facts, dtype: str) -> dict[str, Any]:
        made, layer = super().settings(facts, dtype), facts.model.layer_params
        made["zero_optimization"] |= {
            "stage3_prefetch_bucket_size": layer,
            "stage3_max_live_parameters": 2 * layer,
            # A layer that is computed again is kept for its backward.
            "stage3_max_reuse_distance": layer,
            "stage3_param_persistence_threshold": PERSISTENT,
        }
        if self.config.offload_parameters:
            made["zero_optimization"]["offload_param"] = {"device": "cpu", "pin_memory": facts.device.kind == "cuda"}
        return made


def divides_weights(decisions: Iterable[Decision]) -> bool:
    """Whether ranks have parts of the weights alone."""
    return isinstance(active_zero(decisions), ZeRO3)
