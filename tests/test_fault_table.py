"""Every test that the table of faults names is there."""

import ast
import re

from elite.config import CONF_DIR

ROOT = CONF_DIR.parent
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(test_\w+)`")


def test_each_row_is_shown_by_a_test() -> None:
    rows = [line for line in (ROOT / "docs" / "faults.md").read_text().splitlines() if line.startswith("| ") and "| test |" not in line]
    assert len(rows) > 30 and all(NAMED.search(row) for row in rows)
    named = {(file, name) for row in rows for file, name in NAMED.findall(row)}
    trees = {file: ast.parse((ROOT / file).read_text()) for file, _ in named}
    there = {(file, node.name) for file, tree in trees.items() for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    assert named <= there
