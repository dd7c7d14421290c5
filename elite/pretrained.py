"""Where a model's weights and tokenizer are: a folder, an installed package, the hub's cache, the hub."""

import hashlib
import importlib.util
import json
import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

from elite.config import ModelConfig, Weights
from elite.errors import ModelError
from elite.model_folder import check_config, check_tokenizer, check_weights, missing_weights, readable

log = logging.getLogger("elite.model")
OFFLINE_REMEDY = "model.path=FOLDER for local weights, model=smollm2_135m (`make setup` installs it), or model.weights=random"
WEIGHT_FILES = ("*.safetensors", "*.json", "tokenizer*", "*.model", "*.txt")
CODE_FILES = ("*.py",)
"""Of use with `model.trust_remote_code` alone."""


def locate(model: ModelConfig, cache: Path, download: bool) -> Path | None:
    """The folder with this model's files in transformers' own layout, or None if it is not on this machine.

    Args:
        download: whether the hub may be asked.

    Raises:
        ModelError: `model.path` is no folder with a model in safetensors, or the hub was asked and did not answer.
    """
    if model.path is not None:
        folder = Path(model.path).expanduser()
        if not folder.is_dir():
            raise ModelError(f"model.path={model.path} is not a folder", "give the folder that holds config.json and the weights")
        if model.gguf_file and (folder / model.gguf_file).is_file():
            return _converted(folder / model.gguf_file, cache)
        check_weights(folder, f"model.path={model.path}")
        return folder
    # A dotted name would import its parents.
    package = importlib.util.find_spec(model.package) if model.package and model.package.isidentifier() else None
    if package is not None and package.submodule_search_locations and model.gguf_file:
        gguf = Path(package.submodule_search_locations[0]) / model.gguf_file
        if not gguf.is_file():
            raise ModelError(f"model.gguf_file={model.gguf_file} is not in the package {model.package}", "leave model.gguf_file out")
        return _converted(gguf, cache)
    return _from_hub(model, download) if model.hub else None


def _from_hub(model: ModelConfig, download: bool) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    assert model.hub is not None
    missing = f"model={model.name}: {model.hub} is not on this machine"
    try:
        folder = Path(snapshot_download(model.hub, local_files_only=True))
        if not missing_weights(folder):
            return folder
    except LocalEntryNotFoundError:
        pass
    except HFValidationError as error:
        raise ModelError(f"model.hub={model.hub} is no id of the hub: {error}", "model.hub=OWNER/NAME") from None
    if not download:
        return None
    try:
        wanted = [*WEIGHT_FILES, *(CODE_FILES if model.trust_remote_code else ())]
        folder = Path(snapshot_download(model.hub, allow_patterns=wanted))
    except LocalEntryNotFoundError as error:
        raise ModelError(f"{missing} and the hub cannot be reached", OFFLINE_REMEDY) from error
    except HfHubHTTPError as error:
        refusal = str(error).splitlines()[0]
        raise ModelError(f"{missing} and the hub refuses it: {refusal}", "log in with `hf auth login`, or model.path=FOLDER") from error
    lacking = missing_weights(folder)
    if lacking:
        raise ModelError(f"model={model.name}: {model.hub} lacks {lacking} on this machine and on the hub", OFFLINE_REMEDY)
    return folder


def _converted(gguf: Path, cache: Path) -> Path:
    """GGUF as safetensors in transformers' layout. Parsing takes 20 s, so it is done once for each file."""
    stat = gguf.stat()
    key = hashlib.sha256(f"{gguf.name} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:16]
    folder = cache / "models" / f"{gguf.stem}-{key}"
    if (folder / "complete").is_file():
        return folder
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    log.info("converting %s once (about half a minute)", gguf.name)
    with gguf.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelError(f"{gguf} is no GGUF file", "download it anew, or weights in safetensors")
    with readable(f"{gguf} is cut off, damaged or of a kind that transformers cannot read", "download it anew, or weights in safetensors"):
        source: dict[str, Any] = {"gguf_file": gguf.name, "trust_remote_code": False}
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **source)
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **source)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".partial-"))
    tokenizer.save_pretrained(partial)
    config: dict[str, Any] = model.config.to_dict()
    # The weights are plain from here on; `save_pretrained` would refuse because they were quantised in the file.
    config.pop("quantization_config", None)
    (partial / "config.json").write_text(json.dumps(config, indent=2))
    tied = set(model.all_tied_weights_keys)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name not in tied}
    save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
    (partial / "complete").touch()
    try:
        partial.rename(folder)
    except OSError:
        # Another process was faster; its folder is as good.
        shutil.rmtree(partial)
    return folder


def tokenizer(model: ModelConfig, cache: Path, download: bool) -> Any | None:
    """The model's tokenizer, or None if it is not on this machine.

    Random weights get one of bytes: they know no vocabulary, and benchmarks need no network.
    """
    from transformers import AutoTokenizer

    if model.weights is Weights.random:
        return byte_tokenizer()
    folder = locate(model, cache, download)
    if folder is None:
        return None
    check_tokenizer(folder, model.trust_remote_code)
    # A tokenizer is found by the model's type, where it does not name its class.
    check_config(folder, model.trust_remote_code)
    with readable(f"{folder} holds no tokenizer that transformers can read", "save_pretrained the tokenizer there too"):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=model.trust_remote_code)


def byte_tokenizer() -> Any:
    """A token a byte, and one that ends a text: 257 tokens, no files."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(BPE({symbol: i for i, symbol in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
