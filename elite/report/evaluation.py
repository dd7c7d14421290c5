"""What `mode=evaluate` found, as the terminal shows it."""

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from elite.report.markdown import NONE


def render(found: dict[str, Any]) -> RenderableType:
    """The contents of `evaluation.json`."""
    worth = found["val_loss_alone"] - found["val_loss"]
    losses = f"{found['val_loss']:.4f} with context, {found['val_loss_alone']:.4f} alone: context is worth {worth:+.4f}"
    head = Text(f"\n{found['model']}, weights: {found['weights']}\nvalidation loss  {losses}\n")
    parts: list[RenderableType] = [head, _positions(found["by_position"])]
    completions = found["completions"]
    if completions is not None:
        parts += [_completions(completions), Text(_words(completions))]
    return Group(*parts)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", overflow="fold")
    return table


def _number(value: float | None, digits: int) -> str:
    return NONE if value is None else f"{value:.{digits}f}"


def _positions(buckets: list[dict[str, Any]]) -> Table:
    table = _table("Loss by position, held-out text alone", "positions", "tokens", "loss")
    for bucket in buckets:
        table.add_row(f"{bucket['first']:,} – {bucket['end'] - 1:,}", f"{bucket['tokens']:,}", _number(bucket["loss"], 4))
    return table


def _completions(completions: dict[str, Any]) -> Table:
    title = f"\nThe next line, {completions['count']} times of {completions['tokens']} tokens"
    table = _table(title, "file", "prompt", "exact", "similarity")
    for file in completions["files"]:
        exact, similar = ([score[name] for score in file["scores"]] for name in ("exact", "similarity"))
        hits = f"{int(sum(exact))} of {len(exact)}"
        table.add_row(file["path"], f"{file['prompt_tokens']:,}", hits, _number(sum(similar) / len(similar), 3))
    table.add_row("mean", "", _number(completions["exact"], 3), _number(completions["similarity"], 3))
    return table


def _words(completions: dict[str, Any]) -> str:
    if not completions["files"]:
        return "no held-out file is long enough to be continued"
    lines = [f"{name} is inactive: {reason}" for name, reason in completions["inactive"].items()]
    pages = [file["pages"] for file in completions["files"] if file["pages"]]
    if pages:
        shared, own = (sum(page[name] for page in pages) for name in ("shared", "own"))
        alone = own + shared * completions["count"]
        held = f"{shared + own:,} pages of {pages[0]['tokens']} tokens, {shared:,} of them shared"
        lines.append(f"keys and values: {held}; {alone:,} without sharing")
    return "\n".join(lines)
