"""Tiny models of real architectures, seeded, in fp32."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from elite.attention import DOCUMENT_SDPA

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 97}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "phi": {"num_key_value_heads": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 5},
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8},
    "gpt_neox": {},
    "starcoder2": {"num_key_value_heads": 2, "residual_dropout": 0.0, "embedding_dropout": 0.0},
    "phi3": {"num_key_value_heads": 2, "pad_token_id": 0, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "gemma": {"num_key_value_heads": 1, "head_dim": 8},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 8},
    "gemma3_text": {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
    "gpt2": {},
    "cohere": {},
    "lfm2": {"num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]},
}


def tiny(kind: str, attention: str = DOCUMENT_SDPA, **changes: Any) -> PreTrainedModel:
    """A two-layer model of architecture `kind`."""
    config = AutoConfig.for_model(kind, **{**SIZES, **KINDS[kind], **changes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention)
    model.config.use_cache = False
    return model.train()
