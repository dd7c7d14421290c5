"""Whether a model can be streamed: known before a weight exists, so that a plan can say it."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

UNSUPPORTED = {
    "final_logit_softcapping": "caps its logits",
    "attn_logit_softcapping": "caps its attention scores",
    "logit_scale": "scales its logits",
    "logits_scaling": "scales its logits",
}
"""Fields of a model's configuration that change what a streamed head or attention would have to compute."""
ATTENTION = frozenset({"full_attention", "sliding_attention"})
"""Kinds of layers that see what lies before a chunk through keys and values alone."""


def reason_against(model: "PreTrainedModel") -> str | None:
    """Why this causal language model, possibly without memory, cannot be streamed; None if it can."""
    from torch import nn

    config, head = model.config.get_text_config(), model.get_output_embeddings()
    for name, what in UNSUPPORTED.items():
        if getattr(config, name, None) not in (None, 1, 1.0):
            return f"it {what} ({name})"
    if not isinstance(getattr(model.get_decoder(), "layers", None), nn.ModuleList):
        return "its decoder layers lie elsewhere than in get_decoder().layers"
    others = set(getattr(config, "layer_types", None) or ()) - ATTENTION
    if others:
        return f"some of its layers are no attention ({', '.join(sorted(others))})"
    if not isinstance(head, nn.Linear):
        return f"its head is a {type(head).__name__}, not a linear map"
    if any("sinks" in name for name, _ in model.named_parameters()):
        return "its attention has sinks"
    if getattr(config, "attention_dropout", 0.0):
        return "it drops attention weights out (attention_dropout)"
    return None


def windowed_layers(config: "PretrainedConfig") -> int:
    """How many layers have the window."""
    text = config.get_text_config()
    if sliding_window(config) is None:
        return 0
    kinds = getattr(text, "layer_types", None)
    return int(text.num_hidden_layers) if kinds is None else list(kinds).count("sliding_attention")


def sliding_window(config: "PretrainedConfig") -> int | None:
    """Keys that a query of a windowed layer sees; None if every layer sees all."""
    window: int | None = getattr(config.get_text_config(), "sliding_window", None)
    return window
