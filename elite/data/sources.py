"""Documents of git repositories. Nothing here opens the network.

Only files that git tracks are read, so `.gitignore` holds by itself; their text is that of the working tree. What is read is a regular
file inside the repository and never a link, a pipe, a device or git's own; everything else is left out and counted, by reason.
"""

import stat
from collections import Counter
from pathlib import Path, PurePosixPath

from elite.config import DataConfig
from elite.data.documents import Document, Reading
from elite.data.filters import LFS_REASON, content_skip_reason, path_skip_reason
from elite.data.git import SUBMODULE, SYMLINK, tracked_files
from elite.errors import DataError

PROJECTS = Path("~/projects")
SUBMODULE_REASON = "submodule"
PICK = "data.repo=PATH names a git repository, or a folder whose direct children are git repositories"


def enclosing_repository(folder: Path) -> Path | None:
    """The top level of the git repository that `folder` lies in, or None. A worktree's or submodule's `.git` is a file."""
    return next((parent for parent in (folder, *folder.parents) if (parent / ".git").exists()), None)


def child_repositories(folder: Path) -> list[Path]:
    """Direct children of `folder` that are git repositories, by name; none where the folder is missing or unreadable."""
    try:
        return sorted(child for child in folder.iterdir() if (child / ".git").exists())
    except OSError:
        return []


def find_repositories(start: Path) -> list[Path]:
    """Repositories to take when none is named: the one around `start`, else those directly in it, in its parent, in ~/projects.

    The first of these places that has any decides; its repositories are returned by name.
    """
    start = start.resolve()
    enclosing = enclosing_repository(start)
    if enclosing:
        return [enclosing]
    places = (start, start.parent, PROJECTS.expanduser())
    return next((found for found in map(child_repositories, places) if found), [])


def repository_documents(cfg: DataConfig, start: Path | None = None) -> Reading:
    """Documents of the repository or repositories that `cfg.repo` names; unset: of the first that `find_repositories(start)` finds.

    Raises:
        DataError: the folder is missing, is not git, or git tracks nothing there.
    """
    roots, notes = _roots(cfg, start or Path.cwd())
    skipped: Counter[str] = Counter()
    documents: list[Document] = []
    for root in roots:
        documents += _read_repository(root, cfg, skipped)
    origin = str(roots[0] if len(roots) == 1 else roots[0].parent)
    if not documents and not skipped:
        raise DataError(f"{origin}: git tracks no files there, so there is nothing to train on", "git add your files, or " + PICK)
    return Reading(origin, tuple(documents), dict(skipped), (*notes, *_absent(skipped)))


def _absent(skipped: Counter[str]) -> tuple[str, ...]:
    """What of the repository is not here, and how it would be."""
    found = []
    if modules := skipped[SUBMODULE_REASON]:
        found.append(f"{modules:,} git submodule(s) skipped: data.repo=FOLDER/SUBMODULE takes one as a repository of its own")
    if pointers := skipped[LFS_REASON]:
        found.append(f"{pointers:,} git-lfs pointer(s) skipped: their contents are not text of this repository")
    return tuple(found)


def _roots(cfg: DataConfig, start: Path) -> tuple[list[Path], tuple[str, ...]]:
    """Top levels of the repositories to read, and what to tell the user about the choice."""
    if cfg.repo is None:
        found = find_repositories(start)
        if not found:
            raise DataError(f"no git repository in {start.resolve()}, its parent or {PROJECTS}", PICK)
        if len(found) == 1:
            return found, (f"repository found: {found[0]}; data.repo=PATH picks another",)
        names = ", ".join(path.name for path in found)
        return found[:1], (f"several repositories found: {names}; taking {found[0]}; data.repo=PATH picks another",)
    folder = Path(cfg.repo).expanduser().resolve()
    if not folder.is_dir():
        raise DataError(f"data.repo={cfg.repo}: there is no such folder", PICK)
    enclosing = enclosing_repository(folder)
    roots = [enclosing] if enclosing else child_repositories(folder)
    if not roots:
        raise DataError(f"data.repo={cfg.repo}: neither a git repository nor a folder of them", f"git init && git add . there, or {PICK}")
    return roots, ()


def _read_repository(root: Path, cfg: DataConfig, skipped: Counter[str]) -> list[Document]:
    """Tracked files of one repository that pass the filters; adds the others to `skipped`."""
    documents = []
    for path, mode in tracked_files(root, PICK).items():
        content = _read_tracked(root, path, mode, cfg)
        if isinstance(content, str):
            skipped[content] += 1
            continue
        reason = content_skip_reason(path, content)
        if reason:
            skipped[reason] += 1
            continue
        documents.append(Document(root.name, path, content.decode("utf-8-sig")))
    return documents


def _read_tracked(root: Path, path: str, mode: str, cfg: DataConfig) -> bytes | str:
    """The bytes of a tracked file, or the reason (text) it is skipped before it is read."""
    if mode in (SYMLINK, SUBMODULE):
        return "symlink" if mode == SYMLINK else SUBMODULE_REASON
    parts = PurePosixPath(path).parts
    # git adds no such entry; an index that was written by something else may hold any.
    if path.startswith("/") or ".." in parts or ".git" in map(str.casefold, parts):
        return "outside the tree"
    file = root / path
    try:
        status = file.lstat()
        # The working tree may differ from the index: the file, or a folder above it, may have become a link to anywhere.
        if stat.S_ISLNK(status.st_mode) or not file.resolve().is_relative_to(root.resolve()):
            return "symlink"
        if not stat.S_ISREG(status.st_mode):
            return "not a file"
        return path_skip_reason(path, status.st_size, cfg.max_file_bytes, cfg.exclude) or file.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return "missing"
    except OSError:
        return "unreadable"
