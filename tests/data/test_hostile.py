"""Repositories and records made to do harm: nothing outside is read, nothing of theirs runs, nothing hangs, what is left out is counted."""

import hashlib
import json
import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import pytest

from elite.config import DataConfig
from elite.data import git as data_git
from elite.data import records
from elite.data.documents import Reading
from elite.data.filters import LFS_POINTER
from elite.data.records import hf_documents, jsonl_documents
from elite.data.sources import repository_documents
from elite.errors import DataError

from .conftest import MakeRepository, git, source
from .test_sources import fails, jsonl, paths

SECRET = "password = 'hunter2'\n"


def read(root: Path) -> Reading:
    return repository_documents(DataConfig(repo=str(root)))


def renamed_in_index(root: Path, old: str, new: str) -> None:
    """Rename an entry of git's index to one that git itself would refuse, and close the file with its right hash."""
    assert len(old) == len(new)
    index = root / ".git/index"
    content = index.read_bytes()[:-20].replace(old.encode(), new.encode())
    index.write_bytes(content + hashlib.sha1(content).digest())


@pytest.mark.parametrize("name", ["../secret.py", "a/../../secret.py", ".git/config", "x/.GIT/config", ".git"])
def test_an_index_that_names_what_is_outside(repository: MakeRepository, tmp_path: Path, name: str) -> None:
    placeholder = "z" * len(name)
    root = repository({"a.py": "a = 1\n", placeholder: "p = 1\n"})
    (tmp_path / "secret.py").write_text(SECRET)
    renamed_in_index(root, placeholder, name)
    reading = read(root)
    assert [document.path for document in reading.documents] == ["a.py"]
    assert reading.skipped == {"outside the tree": 1}


def test_an_index_that_names_an_absolute_path(repository: MakeRepository, tmp_path: Path) -> None:
    secret = tmp_path / "secret.py"
    secret.write_text(SECRET)
    placeholder = "z" * len(str(secret))
    root = repository({"a.py": "a = 1\n", placeholder: "p = 1\n"})
    renamed_in_index(root, placeholder, str(secret))
    reading = read(root)
    assert all(SECRET not in document.text for document in reading.documents)
    assert reading.skipped == {"outside the tree": 1}


def test_links_of_every_kind(repository: MakeRepository, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.py").write_text(SECRET)
    root = repository({"a.py": "a = 1\n", "folder/deep/secret.py": "s = 1\n", "ring/one.py": "o = 1\n"})
    (root / "to_file.py").symlink_to(outside / "secret.py")
    (root / "to_device.py").symlink_to("/dev/zero")
    (root / "to_itself.py").symlink_to("to_itself.py")
    git(root, "add", "-A")
    (root / "folder/deep/secret.py").unlink()
    (root / "folder/deep").rmdir()
    (root / "folder/deep").symlink_to(outside)
    (root / "ring/one.py").unlink()
    (root / "ring").rmdir()
    (root / "ring").symlink_to("ring")
    reading = read(root)
    assert [document.path for document in reading.documents] == ["a.py"]
    assert reading.skipped == {"symlink": 4, "unreadable": 1}


def test_pipes_sockets_and_devices_are_never_opened(repository: MakeRepository) -> None:
    root = repository({"a.py": "a = 1\n", "pipe.py": "p = 1\n", "socket.py": "s = 1\n"})
    for name in ("pipe.py", "socket.py"):
        (root / name).unlink()
    os.mkfifo(root / "pipe.py")
    with socket.socket(socket.AF_UNIX) as listening:
        here = Path.cwd()
        # The path of a socket may have a hundred characters only.
        os.chdir(root)
        listening.bind("socket.py")
        os.chdir(here)
        reading = read(root)
    assert [document.path for document in reading.documents] == ["a.py"] and reading.skipped == {"not a file": 2}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes devices")
def test_a_device_is_never_opened(repository: MakeRepository) -> None:
    root = repository({"a.py": "a = 1\n", "zero.py": "z = 1\n"})
    (root / "zero.py").unlink()
    try:
        os.mknod(root / "zero.py", 0o600 | 0o020000, os.makedev(1, 5))
    except PermissionError:
        pytest.skip("this container makes no devices")
    reading = read(root)
    assert [document.path for document in reading.documents] == ["a.py"] and reading.skipped == {"not a file": 1}


def test_folders_nested_beyond_a_path_of_the_system(repository: MakeRepository) -> None:
    deep = "/".join(["d" * 20] * 100) + "/x.py"
    assert paths(repository({"a.py": "a = 1\n", deep: "x = 1\n"})) == {"a.py", deep}


def test_names_that_steer_a_terminal_or_are_no_text(repository: MakeRepository) -> None:
    names = {"\x1b]0;owned\x07.py", "[bold]x[/bold].py", "\u202egnp.py", "-rf.py", "a\r\nb.py"}
    root = repository({name: source(f"f{index}") for index, name in enumerate(sorted(names))})
    Path(os.fsdecode(os.fsencode(root) + b"/\xff\xfe.py")).write_text("x = 1\n")
    git(root, "add", "-A")
    reading = read(root)
    assert {document.path for document in reading.documents} == names and reading.skipped == {"not utf-8": 1}


def test_submodules_and_lfs_pointers_are_counted_and_said(repository: MakeRepository) -> None:
    inner = repository({"i.py": "i = 1\n"}, "inner")
    git(inner, "commit", "-qm", "one")
    root = repository({"a.py": "a = 1\n", "model.txt": LFS_POINTER + b"v1\noid sha256:0\nsize 9\n"}, "outer")
    git(root, "-c", "protocol.file.allow=always", "submodule", "--quiet", "add", str(inner), "module")
    reading = read(root)
    assert {document.path for document in reading.documents} == {"a.py", ".gitmodules"}
    assert reading.skipped == {"submodule": 1, "git-lfs pointer": 1}
    assert any("1 git submodule(s) skipped" in note for note in reading.notes)
    assert any("1 git-lfs pointer(s) skipped" in note for note in reading.notes)
    # Its .git is a file; named itself, it is a repository like any other.
    assert (root / "module/.git").is_file() and paths(root / "module") == {"i.py"}


def test_a_git_file_that_leads_astray(repository: MakeRepository, tmp_path: Path) -> None:
    other = repository({"b.py": SECRET}, "other")
    root = tmp_path / "root"
    root.mkdir()
    (root / "a.py").write_text("a = 1\n")
    (root / ".git").write_text(f"gitdir: {other}/.git\n")
    assert read(root).documents == ()
    (root / ".git").write_text("gitdir: /nowhere\n")
    fails(repository_documents, DataConfig(repo=str(root)), "git cannot list its files")


@pytest.fixture
def trap(tmp_path: Path) -> Iterator[Callable[[], None]]:
    """A program that leaves a mark, and the check that nobody ran it."""
    program, mark = tmp_path / "trap.sh", tmp_path / "mark"
    program.write_text(f"#!/bin/sh\necho \"$0 $@\" >> '{mark}'\n")
    program.chmod(0o755)

    def set_off() -> None:
        assert not mark.exists(), mark.read_text()

    yield set_off
    set_off()


def test_nothing_that_a_repository_configures_is_run(repository: MakeRepository, tmp_path: Path, trap: Callable[[], None]) -> None:
    root, program = repository({".gitattributes": "*.py filter=f diff=d\n", "a.py": "a = 1\n"}), str(tmp_path / "trap.sh")
    git(root, "update-index", "--force-write-index")
    hooks = tmp_path / "hooks"
    hooks.mkdir()
    for hook in ("post-index-change", "fsmonitor-watchman", "post-checkout", "pre-auto-gc"):
        (hooks / hook).symlink_to(program)
    settings = {
        "core.fsmonitor": program,
        "core.hooksPath": str(hooks),
        "core.pager": program,
        "core.sshCommand": program,
        "core.editor": program,
        "core.askPass": program,
        "credential.helper": f"!{program}",
        "filter.f.smudge": program,
        "filter.f.clean": program,
        "filter.f.process": program,
        "diff.d.textconv": program,
        "diff.external": program,
        "alias.ls-files": f"!{program}",
        "pager.ls-files": "true",
        "safe.directory": "*",
        "include.path": "/nowhere",
        "core.quotePath": "false",
    }
    for name, value in settings.items():
        with (root / ".git/config").open("a") as file:
            section, _, key = name.rpartition(".")
            group, _, part = section.partition(".")
            file.write(f'[{group}{f" {json.dumps(part)}" if part else ""}]\n\t{key} = "{value}"\n')
    assert paths(root) == {".gitattributes", "a.py"}
    trap()
    # The trap works: the same listing without our options springs it.
    subprocess.run(["git", "-C", str(root), "ls-files"], check=False, capture_output=True, timeout=30)
    assert (tmp_path / "mark").exists()
    (tmp_path / "mark").unlink()


def test_what_a_partial_clone_lacks_is_not_fetched(repository: MakeRepository, tmp_path: Path, trap: Callable[[], None]) -> None:
    root = repository({"a.py": "a = 1\n", "d/b.py": "b = 1\n"})
    git(root, "commit", "-qm", "one")
    git(root, "sparse-checkout", "init", "--cone", "--sparse-index")
    for name, value in (
        ("remote.origin.url", f"ext::{tmp_path / 'trap.sh'}"),
        ("remote.origin.promisor", "true"),
        ("extensions.partialClone", "origin"),
        ("protocol.ext.allow", "always"),
        ("core.repositoryFormatVersion", "1"),
    ):
        git(root, "config", name, value)
    tree = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD:d"], check=True, capture_output=True, text=True).stdout.strip()
    (root / ".git/objects" / tree[:2] / tree[2:]).unlink()
    assert paths(root) == {"a.py"}
    trap()
    # Without our options git asks for it.
    subprocess.run(["git", "-C", str(root), "ls-files"], check=False, capture_output=True, timeout=30)
    assert (tmp_path / "mark").exists()
    (tmp_path / "mark").unlink()


def test_a_bare_repository_among_the_files_is_not_asked(repository: MakeRepository, tmp_path: Path, trap: Callable[[], None]) -> None:
    outer = repository({"a.py": "a = 1\n"})
    inner = outer / "inner"
    inner.mkdir()
    git(inner, "init", "-q", "--bare")
    git(inner, "config", "core.fsmonitor", str(tmp_path / "trap.sh"))
    git(inner, "config", "core.worktree", str(outer))
    (inner / ".git").write_text("nonsense")
    fails(repository_documents, DataConfig(repo=str(inner)), "git cannot list its files")


def test_a_git_that_does_not_answer(repository: MakeRepository, monkeypatch: pytest.MonkeyPatch) -> None:
    root = repository({"a.py": "a = 1\n"})
    (root / ".git/config").unlink()
    os.mkfifo(root / ".git/config")
    monkeypatch.setattr(data_git, "TIMEOUT_S", 0.5)
    fails(repository_documents, DataConfig(repo=str(root)), "has not listed its files", "pipe")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("index", b"DIRC\0\0\0\2\xff\xff\xff\xff"),
        ("config", b"[core\n"),
        ("HEAD", b"\0"),
        ("config", b"[core]\nrepositoryformatversion = 99\n"),
    ],
)
def test_a_git_that_fails(repository: MakeRepository, file: str, content: bytes) -> None:
    root = repository({"a.py": "a = 1\n"})
    (root / ".git" / file).write_bytes(content)
    fails(repository_documents, DataConfig(repo=str(root)), "git cannot list its files")


def test_a_git_program_that_fails(repository: MakeRepository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = repository({"a.py": "a = 1\n"})
    fake = tmp_path / "bin/git"
    fake.parent.mkdir()
    fake.write_text("#!/bin/sh\nprintf 'broken \\033[31m\\nsecond line\\n' >&2\nexit 77\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}:{os.environ['PATH']}")
    with pytest.raises(DataError) as caught:
        repository_documents(DataConfig(repo=str(root)))
    assert "\x1b" not in str(caught.value) and "broken" in str(caught.value) and len(str(caught.value).splitlines()) == 2


def test_a_record_is_a_text_whatever_its_path_spells(tmp_path: Path) -> None:
    (tmp_path / "secret.py").write_text(SECRET)
    names = ["../secret.py", str(tmp_path / "secret.py"), "/dev/zero", "~/x", "a\0b", "file:///etc/passwd", "x" * 5000]
    reading = jsonl_documents(jsonl(tmp_path, *(json.dumps({"text": f"t{i}", "path": name}) for i, name in enumerate(names))))
    assert [document.text for document in reading.documents] == [f"t{i}" for i in range(6)] and reading.skipped == {"name too long": 1}


def test_records_of_the_wrong_shape(tmp_path: Path) -> None:
    good, remaining = '{"text": "a"}', '{"text": "b", "repo": {"x": [1]}, "path": 7}'
    reading = jsonl_documents(jsonl(tmp_path, b"\xef\xbb\xbf" + good.encode() + b"\r", remaining, "\r", '{"text": "nul\\u0000"}'))
    assert [(d.text, d.path) for d in reading.documents] == [("a", "line 1"), ("b", "7")] and reading.skipped == {"binary": 1}
    deep = '{"text": ' + "[" * 100_000 + "]" * 100_000 + "}"
    fails(jsonl_documents, jsonl(tmp_path, good, deep), "line 2", "nested too deeply")
    for line in ('{"text": null}', '{"text": {}}', '{"text": ["a"]}', "{}"):
        fails(jsonl_documents, jsonl(tmp_path, good, line), "line 2", "no text")
    for bad in (b"\0\0", b'{"text": 1' + b"0" * 5000 + b"}", b"null", b'"x"', b"{'text': 1}", b'{"text": "a"} {"text": "b"}'):
        fails(jsonl_documents, jsonl(tmp_path, good, bad), "line 2", "not")
    weird = '{"a\\u001b[31mb\\nc": 1}'
    with pytest.raises(DataError) as caught:
        jsonl_documents(jsonl(tmp_path, weird))
    assert "\x1b" not in str(caught.value) and len(str(caught.value).splitlines()) == 2


def test_an_enormous_line_is_not_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "MAX_LINE_BYTES", 1000)
    monkeypatch.setattr(records, "SKIP_BYTES", 64)
    lines = ['{"text": "a"}', json.dumps({"text": "x" * 5000}), "", '{"text": "b"}', "y" * 1001]
    reading = jsonl_documents(jsonl(tmp_path, *lines))
    assert [(d.text, d.path) for d in reading.documents] == [("a", "line 1"), ("b", "line 4")] and reading.skipped == {"too large": 2}


@pytest.mark.parametrize("target", ["../secret.txt", "/etc/passwd", "https://example.com/x.txt", "hf://datasets/x", "zip://a::https://b"])
def test_a_data_set_card_that_leads_elsewhere(tmp_path: Path, target: str) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    (tmp_path / "secret.txt").write_text(SECRET)
    card = {"configs": [{"config_name": "default", "data_files": [{"split": "train", "path": [target]}]}]}
    (folder / "README.md").write_text(f"---\n{json.dumps(card)}\n---\n# A set\n")
    fails(hf_documents, DataConfig(source="hf", path=str(folder)), target, "outside the folder")


def test_a_data_set_whose_records_point_elsewhere(tmp_path: Path) -> None:
    """A column of images or sounds is decoded when a record is read: from wherever the record says."""
    picture = {"bytes": None, "path": "https://example.com/x.png"}
    bytes_and_path = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    features = datasets.Features({"text": datasets.Value("string"), "path": datasets.Value("string"), "picture": bytes_and_path})
    rows = {"text": ["a"], "path": ["/nowhere/x.png"], "picture": [picture]}
    datasets.Dataset.from_dict(rows, features).save_to_disk(str(tmp_path / "set"))
    info = tmp_path / "set/dataset_info.json"
    known = json.loads(info.read_text())
    known["features"]["picture"] = {"_type": "Image"}
    info.write_text(json.dumps(known))
    (document,) = hf_documents(DataConfig(source="hf", path=str(tmp_path / "set"))).documents
    assert document.text == "a" and document.path == "/nowhere/x.png"
    fails(hf_documents, DataConfig(source="hf", path=str(tmp_path / "set"), text_field="picture"), "record 1", "picture")


def test_a_damaged_data_set(tmp_path: Path) -> None:
    def made(name: str) -> Path:
        datasets.Dataset.from_dict({"text": [f"text {i}" for i in range(50)]}).save_to_disk(str(tmp_path / name))
        return tmp_path / name

    cut = next(made("cut").glob("*.arrow"))
    cut.write_bytes(cut.read_bytes()[:100])
    (made("state") / "state.json").write_text("[" * 5000)
    (made("info") / "dataset_info.json").write_text('{"features": {"text": {"_type": "Nonsense"}}}')
    (tmp_path / "script").mkdir()
    (tmp_path / "script/script.py").write_text("raise SystemExit('run')")
    (tmp_path / "card").mkdir()
    (tmp_path / "card/README.md").write_text("---\nconfigs: [\n---\n")
    (tmp_path / "card/a.txt").write_text("a")
    for name in ("cut", "state", "info", "script", "card"):
        fails(hf_documents, DataConfig(source="hf", path=str(tmp_path / name)), "cannot load")
