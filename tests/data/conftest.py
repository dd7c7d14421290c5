"""A tiny real tokenizer, and real git repositories."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from elite.config import DataConfig
from elite.data import Harvest, TokenStore, harvest, tokenise

MakeRepository = Callable[..., Path]


def git(folder: Path, *arguments: str) -> None:
    subprocess.run(["git", "-C", str(folder), "-c", "user.name=t", "-c", "user.email=t@t", *arguments], check=True, capture_output=True)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with a special token, a control token that is not marked special (as Qwen2.5's) and a run of blanks (as Phi-2's)."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False)
    raw.train_from_iterator(["def f(x):\n    return x + 1\n", "import os\n\n\nclass A:\n    pass\n"] * 4, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|endoftext|>")
    wrapped.add_tokens([AddedToken("<|im_end|>", normalized=False), AddedToken("   ", normalized=False)])
    return wrapped


@pytest.fixture
def repository(tmp_path: Path) -> MakeRepository:
    """Makes a git repository `name` out of path → text or bytes, all of it added."""

    def make(files: dict[str, str | bytes], name: str = "repo") -> Path:
        root = tmp_path / name
        root.mkdir(parents=True)
        git(root, "init", "-q")
        for path, content in files.items():
            file = root / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content.encode() if isinstance(content, str) else content)
        git(root, "add", "-A")
        return root

    return make


def source(name: str, lines: int = 12) -> str:
    """A small file unlike any other name's."""
    return "".join(f"def {name}_{line}(x):\n    return x + {line}\n" for line in range(lines))


def tree(files: int, prefix: str = "m") -> dict[str, str | bytes]:
    """`files` small files of unequal length in a few folders."""
    return {f"pkg{index % 3}/sub{index % 2}/{prefix}{index}.py": source(f"{prefix}{index}", 3 + index % 7) for index in range(files)}


@pytest.fixture
def corpus(repository: MakeRepository, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> tuple[Harvest, TokenStore]:
    """Two repositories of 30 and 20 files, harvested and tokenised."""
    repository(tree(30, "a"), "projects/alpha")
    repository(tree(20, "b"), "projects/beta")
    gathered = harvest(DataConfig(repo=str(tmp_path / "projects")), seed=0)
    return gathered, tokenise(gathered, tokenizer, tmp_path / "cache", progress=False)


@pytest.fixture
def store(corpus: tuple[Harvest, TokenStore]) -> TokenStore:
    return corpus[1]
