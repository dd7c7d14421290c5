"""mode=interactive on a terminal, by the defaults it offers."""

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from elite.runfolder import RunFolder
from tests.conftest import ROOT, Program


@pytest.mark.slow
def test_the_defaults_train(tmp_path: Path, repository: Path, cache: Path) -> None:
    mine, theirs = pty.openpty()
    command = [sys.executable, str(ROOT / "train.py"), "mode=interactive", "debug=tiny", f"data.repo={repository}", f"output.cache={cache}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm", "COLUMNS": "200"}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    os.write(mine, b"\n" * 4 + b"asked\n" + b"\n")
    shown = b""
    while True:
        try:
            piece = os.read(mine, 4096)
        except OSError:  # the other side has closed
            break
        if not piece:
            break
        shown += piece
    assert process.wait(timeout=60) == 0, shown.decode()
    for question in (b"Repository", b"Model", b"Hardware", b"Context", b"Name of the run", b"Output folder"):
        assert question in shown
    (identity,) = (tmp_path / "runs").glob("*/*_asked/run.json")
    assert RunFolder(identity.parent).finished


def test_without_a_terminal_it_says_what_to_do(program: Program) -> None:
    done = program("mode=interactive", "debug=tiny")
    assert done.returncode == 2 and "needs a terminal" in done.stderr
