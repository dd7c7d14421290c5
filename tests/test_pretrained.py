"""Where weights are found, and what is said when they are not."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from elite import compose, pretrained
from elite.config import ModelConfig
from elite.errors import ModelError
from tests.models import tiny


def at(folder: Path) -> ModelConfig:
    return ModelConfig(path=str(folder))


def saved(folder: Path, **options: Any) -> Path:
    tiny("llama", "eager").save_pretrained(folder, **options)
    return folder


def test_a_whole_folder_is_taken(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    assert pretrained.locate(at(folder), tmp_path, download=False) == folder


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"lacks \*.safetensors"):
        pretrained.locate(at(tmp_path), tmp_path, download=False)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", max_shard_size="20KB")
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 1 and pretrained.locate(at(folder), tmp_path, download=False) == folder
    shards[1].unlink()
    with pytest.raises(ModelError, match=f"lacks {shards[1].name}"):
        pretrained.locate(at(folder), tmp_path, download=False)


def test_a_folder_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="holds no tokenizer"):
        pretrained.tokenizer(at(saved(tmp_path / "model")), tmp_path, download=False)


def test_bytes_come_back() -> None:
    tokenizer = pretrained.byte_tokenizer()
    text = "def f():\n\treturn 'ü ∑'  # é\n"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert len(ids) == len(text.encode()) and tokenizer.decode(ids) == text and len(tokenizer) == 257


def test_the_quickstart_model_knows_code(cache: Path) -> None:
    """The real weights, converted: a loss on Python that no wrong tensor would give."""
    config = compose.from_overrides("model=smollm2_135m").config.model
    folder = pretrained.locate(config, cache, download=False)
    assert folder is not None and pretrained.locate(config, cache, download=False) == folder
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    import json.encoder

    ids = tokenizer(Path(json.encoder.__file__).read_text(), return_tensors="pt").input_ids[:, :256]
    with torch.no_grad():
        assert 1.0 < model(input_ids=ids, labels=ids).loss.item() < 2.0
