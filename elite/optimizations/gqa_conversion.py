"""GQA conversion: fewer key/value heads.

What:   a model with many key/value heads becomes one with `kv_heads` of them, on load: an ordinary model of its architecture.
How:    neighbouring heads form a group, whose key and value projections (biases included) are averaged (`init=mean`, the paper's).
        `init=aligned` turns the heads of a group towards each other first, by orthogonal Procrustes, and folds the turn's inverse into
        the projections that read them: values freely, into the attention's output map; keys into the query projection, where only
        turns that commute with the rotary embedding are allowed: a rotation of each of its pairs, any turn of values it leaves alone.
        Where a norm stands between projection and scores, keys are averaged as they are. mode=uptrain trains the converted maps.
Memory: keys and values, their gradients and their projections shrink by kv_heads / (heads before). The plan counts with the new shape.
Source: Ainslie et al. 2023, arXiv:2305.13245; alignment: Schönemann 1966 (orthogonal Procrustes), Gower 1975 (several at once).
"""

from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, ClassVar

from elite.errors import PlanError
from elite.facts import Facts, LinearShape, ModelShape
from elite.optimizations.contract import Applied, Exactness, Optimization, OptimizationConfig, Site, Stage, Step
from elite.optimizations.options import require

POOLED = ("k_proj", "v_proj")
OUTPUTS = ("o_proj", "dense")
"""Names of the attention's output map."""
TURNING = frozenset({"llama", "mistral", "qwen2", "phi", "gemma", "starcoder2"})
"""Architectures whose rotary embedding turns the value i of a head with i + half, and whose keys meet no norm."""


class HeadInit(Enum):
    """How the heads of a group become one."""

    mean = "mean"
    aligned = "aligned"


class GQAConversion(Optimization):
    """See the module's docstring."""

    @dataclass(frozen=True)
    class Config(OptimizationConfig):
        """Options."""

        kv_heads: int = 4
        """Key/value heads after it; must divide those before."""
        init: HeadInit = HeadInit.mean

        def __post_init__(self) -> None:
            require("gqa_conversion.kv_heads", self.kv_heads, self.kv_heads >= 1, "must be positive")

    name = "gqa_conversion"
    title = "fewer key/value heads (GQA conversion)"
    row = 36
    stage = Stage.geometry
    exactness = Exactness.APPROX
    claims: ClassVar[frozenset[Site]] = frozenset({Site.KV_HEADS})
    source = "Ainslie et al. 2023"

    def check(self, facts: Facts) -> str | None:
        return self._against(facts.model.as_loaded)

    def _against(self, model: ModelShape) -> str | None:
        own = {name.rsplit(".", 1)[-1]: m.outputs for m in model.layer_linears if (name := m.name).startswith("self_attn.")}
        width = model.num_key_value_heads * model.head_dim
        if any(own.get(name) != width for name in POOLED) or "q_proj" not in own or not own.keys() & set(OUTPUTS):
            return f"the attention of {model.model_type} has no plain q_proj, k_proj, v_proj and output map"
        if model.num_key_value_heads <= self.config.kv_heads:
            return f"the model has {model.num_key_value_heads} key/value heads, no more than kv_heads={self.config.kv_heads}"
        if model.num_key_value_heads % self.config.kv_heads:
            most = max(n for n in range(1, self.config.kv_heads) if model.num_key_value_heads % n == 0)
            raise PlanError(
                f"optimizations.gqa_conversion.kv_heads={self.config.kv_heads}: must divide the {model.num_key_value_heads} key/value "
                f"heads of {model.name}",
                f"optimizations.gqa_conversion.kv_heads={most}",
            )
        return None

    def reshaped(self, model: ModelShape) -> ModelShape:
        if self._against(model) is not None:
            return model
        width = self.config.kv_heads * model.head_dim
        linears = tuple(replace(linear, outputs=width) if _last(linear) in POOLED else linear for linear in model.layer_linears)
        fewer = sum(linear.params for linear in model.layer_linears) - sum(linear.params for linear in linears)
        return replace(
            model,
            num_key_value_heads=self.config.kv_heads,
            layer_linears=linears,
            layer_params=model.layer_params - fewer,
            total_params=model.total_params - model.num_hidden_layers * fewer,
        )

    def memory(self, step: Step, facts: Facts) -> Step:
        return step

    def apply(self, target: Any) -> Applied:
        from elite.optimizations.functions.heads import convert

        aligned = self.config.init is HeadInit.aligned
        keys = aligned and target.config.model_type in TURNING
        before = target.config.num_key_value_heads
        count, turned = convert(target, self.config.kv_heads, aligned, keys)
        how = f"aligned ({'keys and values' if turned else 'values alone: keys cannot turn'}), averaged" if aligned else "averaged"
        return Applied(count, f"key and value projections, {before} → {self.config.kv_heads} heads, {how}")

    def converted(self, model: ModelShape) -> ModelShape:
        """The shape with those maps marked as trained that the conversion changes (mode=uptrain)."""
        names = converted_maps(self.config, model.model_type)
        return replace(model, layer_linears=tuple(replace(linear, trained=_last(linear) in names) for linear in model.layer_linears))


def converted_maps(config: Any, model_type: str) -> frozenset[str]:
    """Last names of the linear maps that the conversion changes."""
    if config.init is HeadInit.mean:
        return frozenset(POOLED)
    return frozenset((*POOLED, *OUTPUTS, *(("q_proj",) if model_type in TURNING else ())))


def _last(linear: LinearShape) -> str:
    """The map's own name, in the attention."""
    first, _, last = linear.name.rpartition(".")
    return last if first == "self_attn" else ""
