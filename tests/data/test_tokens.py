"""The token store: what a document becomes, and a cache that is hit, keyed and repaired."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from elite.data import Document, Harvest, TokenStore, cached, tokenise
from elite.errors import DataError, ModelError

Corpus = tuple[Harvest, TokenStore]
TRICKY = "stop <|endoftext|> and <|im_end|>\n"


def made(*texts: str) -> Harvest:
    """A harvest of these texts, the last one held out."""
    documents = tuple(Document("r", f"{index}.py", text) for index, text in enumerate(texts))
    return Harvest("r", documents[:-1], documents[-1:], {"binary": 2}, sum(len(text.encode()) for text in texts), ())


def manifests(cache: Path) -> list[Path]:
    return sorted(cache.glob("tokens/*/manifest.json"))


def test_document_is_header_text_and_end(corpus: Corpus, tokenizer: PreTrainedTokenizerFast) -> None:
    gathered, store = corpus
    assert store.end_token == tokenizer.convert_tokens_to_ids("<|endoftext|>") and store.tokens.dtype == np.uint16
    position = 0
    for file, (split, document) in zip(
        store.files, [("train", d) for d in gathered.train] + [("val", d) for d in gathered.val], strict=True
    ):
        assert (file.repo, file.path, file.split, file.start) == (document.repo, document.path, split, position)
        position += file.length
        ids = store.tokens[file.start : position].tolist()
        assert ids.index(store.end_token) == len(ids) - 1
        assert tokenizer.decode(ids[:-1]) == f"# {document.path}\n{document.text}"
    assert position == len(store.tokens)
    counted = store.corpus(gathered)
    assert counted.count_method == "exact" and counted.train_tokens + counted.val_tokens == len(store.tokens)
    assert counted.train_tokens == store.count("train") == sum(file.length for file in store.select("train"))


def test_control_tokens_in_text_stay_plain(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in tokenizer(TRICKY).input_ids
    store = tokenise(made(TRICKY, "a   b"), tokenizer, tmp_path, progress=False)
    control = [tokenizer.convert_tokens_to_ids(token) for token in ("<|endoftext|>", "<|im_end|>")]
    first, second = (store.tokens[file.start : file.start + file.length].tolist() for file in store.files)
    assert not set(control) & set(first[:-1]) and first[-1] == control[0]
    assert tokenizer.decode(first[:-1]) == f"# 0.py\n{TRICKY}"
    assert tokenizer.convert_tokens_to_ids("   ") in second, "runs of blanks are vocabulary, not control"
    assert tokenizer.backend_tokenizer.encode_special_tokens is False, "the caller's tokenizer stays as it was"


def test_end_token_falls_back_to_eos(tmp_path: Path) -> None:
    raw = Tokenizer(models.WordLevel({"a": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ModelError, match="no end-of-text token"):
        tokenise(made("a", "a a"), PreTrainedTokenizerFast(tokenizer_object=raw), tmp_path, progress=False)
    named = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", unk_token="<unk>")
    store = tokenise(made("a", "a a"), named, tmp_path, progress=False)
    assert store.end_token == 1 and [store.tokens[file.start + file.length - 1] for file in store.files] == [1, 1]


def test_large_vocabulary_takes_uint32(tmp_path: Path) -> None:
    vocabulary = {f"w{index}": index for index in range(1 << 16)} | {"<unk>": 1 << 16}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    store = tokenise(made("x", "y"), PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="w7"), tmp_path, progress=False)
    assert store.tokens.dtype == np.uint32 and store.tokens.tolist() == [1 << 16, 7] * 2


def test_second_call_reads_the_cache(corpus: Corpus, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    gathered, store = corpus
    (manifest,) = manifests(tmp_path / "cache")
    before = manifest.stat().st_mtime_ns
    # Padding and truncation that an earlier call switched on are no part of what is stored, so the key must not see them.
    tokenizer.backend_tokenizer.enable_padding(length=4)
    tokenizer.backend_tokenizer.enable_truncation(2)
    again = tokenise(gathered, tokenizer, tmp_path / "cache", progress=False)
    assert manifest.stat().st_mtime_ns == before and manifests(tmp_path / "cache") == [manifest]
    assert isinstance(again.tokens, np.memmap) and np.array_equal(again.tokens, store.tokens) and again.files == store.files
    found = cached(gathered, tokenizer, tmp_path / "cache")
    assert found is not None and found.files == store.files
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()


def test_other_text_split_path_or_tokenizer_is_another_key(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    first = made("a = 1", "b = 1", "c = 1")
    renamed = replace(first, train=(replace(first.train[0], path="x.py"), *first.train[1:]))
    resplit = replace(first, train=first.train[:1], val=(first.train[1], *first.val))
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()), eos_token="<|endoftext|>")
    other.add_tokens(["return"])
    for number, gathered in enumerate((first, made("a = 2", "b = 1", "c = 1"), renamed, resplit), start=1):
        assert cached(gathered, tokenizer, tmp_path) is None
        tokenise(gathered, tokenizer, tmp_path, progress=False)
        assert len(manifests(tmp_path)) == number
    assert cached(first, other, tmp_path) is None and cached(first, tokenizer, tmp_path) is not None


@pytest.mark.parametrize("damage", ["flip", "truncate", "index", "manifest", "no manifest"])
def test_corrupt_cache_is_rebuilt_and_said_once(
    damage: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gathered = made("a = 1\n" * 9, "b = 1\n", "c = 1\n")
    sound = np.array(tokenise(gathered, tokenizer, tmp_path, progress=False).tokens)
    folder = manifests(tmp_path)[0].parent
    content = (folder / "tokens.bin").read_bytes()
    if damage == "flip":
        (folder / "tokens.bin").write_bytes(content[:-2] + bytes([content[-2] ^ 1, content[-1]]))
    elif damage == "truncate":
        (folder / "tokens.bin").write_bytes(content[:-2])
    elif damage == "index":
        (folder / "index.json").write_text("{}")
    elif damage == "manifest":
        (folder / "manifest.json").write_text("[]")
    else:
        (folder / "manifest.json").unlink()
    assert cached(gathered, tokenizer, tmp_path) is None
    with caplog.at_level(logging.WARNING, "elite.data"):
        for _ in range(2):
            assert np.array_equal(tokenise(gathered, tokenizer, tmp_path, progress=False).tokens, sound)
    assert [record.levelname for record in caplog.records] == ["WARNING"] and "corrupt" in caplog.text
    assert [path.name for path in folder.parent.iterdir()] == [folder.name], "no temporary folder stays behind"


def test_another_process_was_faster(tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gathered = made("a = 1\n", "b = 1\n")
    rename = Path.rename

    def late(self: Path, target: Path) -> Path:
        monkeypatch.setattr(Path, "rename", rename)
        tokenise(gathered, tokenizer, tmp_path, progress=False)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", late)
    assert len(tokenise(gathered, tokenizer, tmp_path, progress=False).files) == 2
    assert len(list((tmp_path / "tokens").iterdir())) == 1


def test_cache_that_cannot_be_written(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError) as caught:
        tokenise(made("a", "b"), tokenizer, tmp_path / "file", progress=False)
    assert "output.cache=PATH" in str(caught.value) and len(str(caught.value).splitlines()) <= 3


def test_index_names_what_it_holds(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    store = tokenise(made("a\n    b\n", "c\n"), tokenizer, tmp_path, progress=False)
    index = json.loads((manifests(tmp_path)[0].parent / "index.json").read_text())
    assert index["dtype"] == "uint16" and [file["path"] for file in index["files"]] == ["0.py", "1.py"]
    vocabulary = tokenizer.get_vocab()
    assert vocabulary["Ċ"] in store.line_ends and vocabulary["a"] not in store.line_ends
