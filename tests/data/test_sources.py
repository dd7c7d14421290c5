"""Reading git repositories, JSON lines and local data sets, with everything that can be wrong with them."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest

from elite.config import DataConfig
from elite.data.documents import Reading
from elite.data.records import hf_documents, jsonl_documents
from elite.data.sources import find_repositories, repository_documents
from elite.errors import DataError

from .conftest import MakeRepository, git, source


def paths(root: Path) -> set[str]:
    return {document.path for document in repository_documents(DataConfig(repo=str(root))).documents}


def fails(read: Callable[[DataConfig], Reading], cfg: DataConfig, *mentions: str) -> None:
    """Reading raises a DataError of at most three lines that mentions these and a remedy."""
    with pytest.raises(DataError) as caught:
        read(cfg)
    message = str(caught.value)
    assert len(message.splitlines()) <= 3 and caught.value.remedy
    for mention in mentions:
        assert mention in message


def test_only_tracked_files(repository: MakeRepository) -> None:
    root = repository({".gitignore": "secret.py\nbuild/\n", "a.py": "a = 1\n", "secret.py": "k = 1\n", "build/b.py": "b = 1\n"})
    (root / "untracked.py").write_text("u = 1\n")
    assert paths(root) == {".gitignore", "a.py"}


def test_names_with_newline_space_and_unicode(repository: MakeRepository) -> None:
    names = {"with space.py", "line\nbreak.py", "ünï/日本.py", 'quote".py', "tab\there.py", " leading.py"}
    assert paths(repository({name: source(f"f{index}") for index, name in enumerate(sorted(names))})) == names


def test_skips_are_counted(repository: MakeRepository, tmp_path: Path) -> None:
    outside = tmp_path / "outside.py"
    outside.write_text("password = 1\n")
    files: dict[str, str | bytes] = {"a.py": "a = 1\n", "latin.py": "x = 'é'\n".encode("latin-1"), "huge.txt": "x", "gone.py": "g = 1\n"}
    root = repository(files | {"folder/inner.py": "i = 1\n", "turned.py": "t = 1\n", "fifo.py": "f = 1\n", "logo.png": b"\x89PNG"})
    (root / "link.py").symlink_to(outside)
    git(root, "add", "link.py")
    git(root, "update-index", "--add", "--cacheinfo", "160000," + "1" * 40 + ",module")
    os.truncate(root / "huge.txt", 50_000_000)
    (root / "gone.py").unlink()
    for replaced in ("turned.py", "fifo.py"):
        (root / replaced).unlink()
    (root / "turned.py").symlink_to(outside)
    os.mkfifo(root / "fifo.py")
    (root / "folder").rename(tmp_path / "elsewhere")
    (root / "folder").symlink_to(tmp_path / "elsewhere")
    reading = repository_documents(DataConfig(repo=str(root)))
    assert [document.path for document in reading.documents] == ["a.py"]
    expected = {"not utf-8": 1, "too large": 1, "missing": 1, "symlink": 3, "submodule": 1, "not a file": 1, "binary": 1}
    assert reading.skipped == expected


def test_single_50_mb_line_is_not_read(repository: MakeRepository, monkeypatch: pytest.MonkeyPatch) -> None:
    root = repository({"a.py": "a = 1\n", "line.py": "x"})
    os.truncate(root / "line.py", 50_000_000)
    read: list[str] = []
    original = Path.read_bytes

    def noted(self: Path) -> bytes:
        read.append(self.name)
        return original(self)

    monkeypatch.setattr(Path, "read_bytes", noted)
    repository_documents(DataConfig(repo=str(root)))
    assert read == ["a.py"]


def test_byte_order_mark_is_dropped(repository: MakeRepository) -> None:
    root = repository({"a.cs": b"\xef\xbb\xbfclass A {}\n"})
    assert repository_documents(DataConfig(repo=str(root))).documents[0].text == "class A {}\n"


def test_conflicting_file_is_read_once(repository: MakeRepository) -> None:
    root = repository({"a.py": "a = 1\n"})
    git(root, "commit", "-qm", "one")
    git(root, "checkout", "-qb", "other")
    (root / "a.py").write_text("a = 2\n")
    git(root, "commit", "-qam", "two")
    git(root, "checkout", "-q", "-")
    (root / "a.py").write_text("a = 3\n")
    git(root, "commit", "-qam", "three")
    with pytest.raises(subprocess.CalledProcessError):
        git(root, "merge", "other")
    assert len(repository_documents(DataConfig(repo=str(root))).documents) == 1


def test_inside_a_repository_means_its_top_level(repository: MakeRepository) -> None:
    root = repository({"a.py": "a = 1\n", "sub/b.py": "b = 1\n"})
    assert paths(root / "sub") == {"a.py", "sub/b.py"}


def test_git_environment_of_a_hook_is_ignored(repository: MakeRepository, monkeypatch: pytest.MonkeyPatch) -> None:
    root, other = repository({"a.py": "a = 1\n"}), repository({"b.py": "b = 1\n"}, "other")
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    assert paths(root) == {"a.py"}


def test_folder_of_repositories(repository: MakeRepository, tmp_path: Path) -> None:
    repository({"a.py": "a = 1\n"}, "many/one")
    repository({"a.py": "a = 2\n"}, "many/two")
    (tmp_path / "many/plain").mkdir()
    reading = repository_documents(DataConfig(repo=str(tmp_path / "many")))
    assert {document.repo for document in reading.documents} == {"one", "two"} and reading.origin == str(tmp_path / "many")


def test_search_without_a_name(repository: MakeRepository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    empty = tmp_path / "work/empty"
    empty.mkdir(parents=True)
    assert find_repositories(empty) == []
    project = repository({"p.py": "p = 1\n"}, "home/projects/p")
    assert find_repositories(empty) == [project]
    sibling = repository({"s.py": "s = 1\n"}, "work/sibling")
    assert find_repositories(empty) == [sibling]
    children = [repository({"c.py": "c = 1\n"}, f"work/empty/{name}") for name in ("c1", "c2")]
    assert find_repositories(empty) == children
    assert find_repositories(children[0]) == [children[0]]
    reading = repository_documents(DataConfig(), empty)
    assert reading.origin == str(children[0])
    assert "several repositories found: c1, c2; taking" in reading.notes[0] and "data.repo=PATH" in reading.notes[0]


def test_bad_repositories(repository: MakeRepository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "plain/inner").mkdir(parents=True)
    fails(repository_documents, DataConfig(repo=str(tmp_path / "nowhere")), "nowhere", "no such folder")
    fails(repository_documents, DataConfig(repo=str(tmp_path / "plain")), "plain", "neither a git repository")
    fails(repository_documents, DataConfig(repo=str(repository({}))), "tracks no files")
    fails(lambda cfg: repository_documents(cfg, tmp_path / "plain/inner"), DataConfig(), "no git repository")
    (tmp_path / "broken/.git").mkdir(parents=True)
    fails(repository_documents, DataConfig(repo=str(tmp_path / "broken")), "git cannot list")
    monkeypatch.setenv("PATH", str(tmp_path))
    fails(repository_documents, DataConfig(repo=str(tmp_path / "repo")), "git is not installed")


def jsonl(tmp_path: Path, *lines: str | bytes) -> DataConfig:
    file = tmp_path / "data.jsonl"
    file.write_bytes(b"\n".join(line.encode() if isinstance(line, str) else line for line in lines))
    return DataConfig(source="jsonl", path=str(file), exclude=["skip/"])


def test_jsonl(tmp_path: Path) -> None:
    whole = {"text": "a = 1", "repo": "r", "path": "a.py"}
    others = [{"text": "b"}, {"text": " "}, {"text": "c", "path": "skip/c.py"}, {"text": "\ud800"}]
    reading = jsonl_documents(jsonl(tmp_path, json.dumps(whole), "", *map(json.dumps, others)))
    assert [(d.repo, d.path, d.text) for d in reading.documents] == [("r", "a.py", "a = 1"), ("line 3", "line 3", "b")]
    assert reading.skipped == {"empty": 1, "excluded": 1, "not utf-8": 1}


def test_bad_jsonl(tmp_path: Path) -> None:
    fails(jsonl_documents, DataConfig(source="jsonl"), "data.path is unset")
    fails(jsonl_documents, DataConfig(source="jsonl", path=str(tmp_path / "no.jsonl")), "no such file")
    fails(jsonl_documents, DataConfig(source="jsonl", path=str(tmp_path)), "not a file")
    good = '{"text": "a"}'
    fails(jsonl_documents, jsonl(tmp_path, good, '{"text": '), "line 2", "not JSON")
    fails(jsonl_documents, jsonl(tmp_path, good, b'{"text": "\xff"}'), "line 2", "not JSON")
    fails(jsonl_documents, jsonl(tmp_path, "[1]"), "line 1", "not a JSON object")
    fails(jsonl_documents, jsonl(tmp_path, good, "", '{"content": "a"}'), "line 3", "content", "data.text_field")
    fails(jsonl_documents, jsonl(tmp_path, '{"text": 7}'), "line 1", "no text")


def test_hf(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"code": ["a = 1", "b = 1"], "repo": ["r", None], "path": ["a.py", None]})
    rows.save_to_disk(str(tmp_path / "plain"))
    datasets.DatasetDict({"test": rows.select([1]), "train": rows.select([0])}).save_to_disk(str(tmp_path / "splits"))
    (tmp_path / "files").mkdir()
    rows.to_parquet(str(tmp_path / "files/part.parquet"))

    def read(name: str) -> list[tuple[str, str, str]]:
        reading = hf_documents(DataConfig(source="hf", path=str(tmp_path / name), text_field="code"))
        return [(document.repo, document.path, document.text) for document in reading.documents]

    assert read("plain") == read("files") == [("r", "a.py", "a = 1"), ("record 2", "record 2", "b = 1")]
    assert read("splits") == [("r", "a.py", "a = 1")]


def test_bad_hf(tmp_path: Path) -> None:
    fails(hf_documents, DataConfig(source="hf", path="org/dataset"), "org/dataset", "no such file or folder")
    (tmp_path / "empty").mkdir()
    fails(hf_documents, DataConfig(source="hf", path=str(tmp_path / "empty")), "cannot load")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/state.json").write_text("{}")
    (tmp_path / "broken/dataset_info.json").write_text("{}")
    fails(hf_documents, DataConfig(source="hf", path=str(tmp_path / "broken")), "cannot load")
    datasets.Dataset.from_dict({"code": ["a"]}).save_to_disk(str(tmp_path / "named"))
    fails(hf_documents, DataConfig(source="hf", path=str(tmp_path / "named")), "record 1", "code", "data.text_field")
