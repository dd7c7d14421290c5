"""De-duplication, the hold-out by file, and the estimate."""

import random
from pathlib import Path

import pytest

from elite.config import DataConfig
from elite.data import Document, estimate, harvest
from elite.data.harvest import _held_out, _without_copies
from elite.errors import ConfigError, DataError

from .conftest import MakeRepository, tree


def test_exact_copies_are_dropped_and_counted(repository: MakeRepository) -> None:
    root = repository(tree(20) | {"copy/a.py": "same = 1\n", "copy/b.py": "same = 1\n", "zzz.py": "same = 1\n"})
    gathered = harvest(DataConfig(repo=str(root)), seed=0)
    texts = [document.text for document in gathered.train + gathered.val]
    assert len(texts) == len(set(texts)) == 21 and gathered.skipped == {"duplicate": 2}
    assert "copy/a.py" in {document.path for document in gathered.train + gathered.val}
    assert gathered.bytes == sum(len(text) for text in texts)


@pytest.mark.parametrize(
    ("files", "fraction", "expected"), [(20, 0.1, 2), (21, 0.1, 3), (100, 0.07, 7), (2, 0.1, 1), (3, 0.99, 2), (5, 0.0, 1)]
)
def test_number_held_out(files: int, fraction: float, expected: int) -> None:
    documents = [Document("r", f"{index}.py", str(index)) for index in range(files)]
    assert len(_held_out(documents, fraction, seed=0)) == expected


def test_split_is_disjoint_and_follows_from_names_and_seed() -> None:
    documents = [Document("r", f"{index}.py", str(index)) for index in range(50)]
    shuffled = random.Random(1).sample(documents, len(documents))
    first = _held_out(documents, 0.1, seed=0)
    assert first == _held_out(shuffled, 0.1, seed=0) != _held_out(documents, 0.1, seed=1)
    assert _without_copies(tuple(shuffled)) == _without_copies(tuple(documents))
    changed = [Document("r", document.path, document.text + "!") for document in documents]
    assert {document.path for document in _held_out(changed, 0.1, seed=0)} == {document.path for document in first}


def test_harvest_is_deterministic_and_ordered(repository: MakeRepository, tmp_path: Path) -> None:
    root = repository(tree(30))
    cfg = DataConfig(repo=str(root))
    gathered = harvest(cfg, seed=3)
    assert gathered == harvest(cfg, seed=3) and gathered.val != harvest(cfg, seed=4).val
    assert not set(gathered.train) & set(gathered.val) and (len(gathered.train), len(gathered.val)) == (27, 3)
    assert list(gathered.train) == sorted(gathered.train, key=lambda document: (document.repo, document.path))


def test_estimate(repository: MakeRepository) -> None:
    gathered = harvest(DataConfig(repo=str(repository(tree(20)))), seed=0)
    corpus = estimate(gathered, bytes_per_token=2.0)
    assert corpus.count_method == "estimated from bytes" and (corpus.train_files, corpus.val_files) == (18, 2)
    assert abs(corpus.train_tokens + corpus.val_tokens - gathered.bytes / 2) <= 1


def test_too_few_files(repository: MakeRepository) -> None:
    with pytest.raises(DataError) as caught:
        harvest(DataConfig(repo=str(repository({"a.py": "a = 1\n", "b.png": "x", "c.py": "a = 1\n"}))), seed=0)
    message = str(caught.value)
    assert "1 usable file(s)" in message and "binary 1, duplicate 1" in message and len(message.splitlines()) <= 3


def test_unknown_source() -> None:
    with pytest.raises(ConfigError, match="data.source=ftp"):
        harvest(DataConfig(source="ftp"), seed=0)
