"""Names of others reach the terminal as text: neither markup nor control sequences of theirs."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from elite import compose, console, modes, worker
from elite.errors import EliteError
from elite.printable import lines, one_line
from tests.conftest import make_repository

EVIL = "[bold red]x[/] \x1b]0;owned\x07\x9b2J\u202etxt"


def test_what_steers_is_spelled_out() -> None:
    assert one_line("a\x1b[31m\r\nb\udcff\u2028\x85") == r"a\x1b[31m\r\nb\udcff\u2028\x85"
    assert one_line("def f():\tü ∑ 日本 [bold]") == "def f():\tü ∑ 日本 [bold]"
    assert lines("a\r\nb\x1b\n\nc") == "a\nb\\x1b\n\nc"


def test_an_error_is_short_and_plain_whatever_it_quotes(capsys: pytest.CaptureFixture[str]) -> None:
    error = EliteError(f"{EVIL}\n\n\nmore\udcff {'y' * 10_000}", "do\nthis")
    assert len(str(error).splitlines()) == 2 and len(str(error)) < 1200
    compose.show(error)
    said = capsys.readouterr().err
    assert "[bold red]x[/]" in said and not any(steers in said for steers in ("\x1b", "\x07", "\x9b", "\u202e"))


def test_a_log_line_is_plain() -> None:
    record = logging.LogRecord("elite", logging.WARNING, "", 0, "checkpoint %s", (EVIL,), None)
    assert console._fit_to_show(record) and "\x1b" not in record.getMessage() and "[bold red]" in record.getMessage()


def test_a_repository_with_an_evil_name_is_planned(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_repository(tmp_path / EVIL)
    monkeypatch.chdir(root)
    modes.run(compose.from_overrides("debug=tiny", "mode=plan", "hardware=rtx3090", f"output.cache={cache}"))
    said = capsys.readouterr().out
    assert "repository found" in said and "[bold red]x[/]" in said and "\\x1b]0;owned\\x07" in said
    assert not any(steers in said for steers in ("\x1b", "\x07", "\x9b", "\u202e"))


def test_a_completion_is_shown_as_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "completion.json"
    file.write_text(json.dumps({"path": EVIL, "prompt_end": EVIL, "reference": f"a\n{EVIL}", "after": "[/nonsense]"}))
    shown = cast(Any, SimpleNamespace(_example=object(), _file=file))
    worker._Completion.show(shown)
    said = capsys.readouterr().out
    assert "[/nonsense]" in said and "[bold red]x[/]" in said and not any(steers in said for steers in ("\x1b", "\x07", "\u202e"))
