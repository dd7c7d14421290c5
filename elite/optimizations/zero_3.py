"""ZeRO-3: ranks divide the weights, too.

What:   each rank keeps a part of every weight, frozen ones included; a module's weights are whole only while it is at work.
How:    as ZeRO-2 (elite/optimizations/zero_2.py), by DeepSpeed's engine. Weights are loaded into host memory and divided one by one, so a
        model may be larger than a device. A layer is gathered before it is called, the next one meanwhile, and again for its backward.
        With `offload_parameters` the parts wait in host memory. Under the whole executor; the streamed one brings weights layer by layer
        itself. No text is completed in the course of the run: that would take all ranks.
Memory: R ranks: weights by R, and what is whole at once, two layers or the embedding; of what is trained state, gradients and fp32 weights
        by R, as in ZeRO-2. With `offload_parameters` the parts are the host's.
Source: Rajbhandari et al. 2020, arXiv:1910.02054; Rajbhandari et al. 2021, arXiv:2104.07857 (offload); DeepSpeed.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from elite.facts import Facts
from elite.optimizations.contract import Decision, Exchange, Passes, Site, Step
from elite.optimizations.parts import FP32
from elite.optimizations.zero_2 import ZeRO2, active_zero, divided

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
        if facts.executor == "streamed":
            return "the streamed executor brings weights itself, layer by layer (executor.weights=streamed)"
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
        whole = weights / model.total_params * max(2 * model.layer_params, model.embedding_params)
        kept = 0.0 if self.config.offload_parameters and facts.device.kind == "cuda" else 1 / facts.device.count
        runtime = standing.runtime + min(whole, weights * (1 - kept))
        parts = replace(
            standing, linear_weights=standing.linear_weights * kept, other_weights=standing.other_weights * kept, runtime=runtime
        )
        return replace(of_two, standing=parts)

    def host_memory(self, step: Step, facts: Facts) -> float:
        found = super().host_memory(step, facts)
        if self.config.offload_parameters and facts.device.kind == "cuda":
            width = FP32 if facts.adapter == "full" else step.value
            found += width * facts.model.total_params / facts.device.count
        return found

    def exchange(self, passes: Passes, facts: Facts) -> Exchange:
        """Weights besides, for each forward and each backward."""
        width = FP32 if facts.adapter == "full" else passes.value
        weights = width * facts.model.total_params * passes.count * (passes.forwards + 1)
        return divided(super().exchange(passes, facts).handed_bytes + weights, facts)

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
