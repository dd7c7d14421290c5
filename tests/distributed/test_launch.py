"""The launcher: a child's failure is told with its code, and no name server is asked."""

import socket
from pathlib import Path

import pytest

from elite.distributed.launch import WorkerError, launch


def test_a_failed_child_is_told_and_no_name_is_looked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(name: str = "") -> str:
        raise AssertionError("where no name server answers, this takes seconds")

    monkeypatch.setattr(socket, "getfqdn", asked)
    # An empty folder is no run.
    with pytest.raises(WorkerError, match="the training process ended with exit code"):
        launch(tmp_path, 1)
    assert socket.getfqdn is asked, "given back"
