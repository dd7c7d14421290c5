"""The shape of the code: imports point one way, nothing grows without bound, every YAML has a reader."""

import ast
import dataclasses
from functools import cache
from pathlib import Path
from typing import Any, TypeGuard

import pytest

from elite import config, curriculum, mode_options, retention, stability, vigilance

ROOT = config.CONF_DIR.parent
# Each layer may import the layers before it, and its own.
LAYERS = (
    {"errors", "facts", "console", "streaming", "chunks", "zigzag", "revolve", "scaling", "curriculum", "kernels", "mode_options"}
    | {"stability", "retention", "vigilance", "printable", "jsonfile", "durable", "loss_tiles"},
    {"optimizations", "losses", "ablation"},
    {"config"},
    {"schema", "jobs", "compose", "hardware", "geometry", "model_folder", "pretrained", "attention", "streamable"},
    {"plan"},
    {"model", "data"},
    {"executor", "distributed"},
    {"checkpoint"},
    {"training"},
    {"callbacks", "continued", "redealt", "runfolder", "report"},
    {"prepared", "rehearsal", "uptraining", "worker", "evaluation"},
    {"bench"},
    {"modes"},
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
SOURCES = sorted((ROOT / "elite").rglob("*.py"))
OWN = [*SOURCES, ROOT / "train.py", *sorted((ROOT / "tests").rglob("*.py"))]


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def part(path: Path) -> str:
    return path.relative_to(ROOT / "elite").parts[0].removesuffix(".py")


def imports(path: Path) -> list[str]:
    names = []
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.ImportFrom) and node.module:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return names


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_layers(path: Path) -> None:
    for name in imports(path):
        pieces = name.split(".")
        if pieces[0] == "elite" and len(pieces) > 1 and pieces[1] in LEVEL and part(path) in LEVEL:
            # Optimizations name the functions they switch to; those are imported where they act.
            lazy = part(path) == "optimizations" and pieces[1] == "attention"
            assert lazy or LEVEL[pieces[1]] <= LEVEL[part(path)], f"{path.name} imports {name}, a later layer"


def test_every_module_has_a_layer() -> None:
    assert {part(path) for path in SOURCES} - {"__init__"} == set(LEVEL)


def test_only_the_edge_knows_hydra() -> None:
    users = {
        str(path.relative_to(ROOT))
        for path in [*SOURCES, ROOT / "train.py"]
        if any(name.split(".")[0] == "hydra" for name in imports(path))
    }
    assert users == {"train.py", "elite/compose.py", "elite/report/multirun.py"}


@pytest.mark.parametrize("path", OWN, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_small(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= 400
    for node in ast.walk(parsed(path)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno is not None and node.end_lineno - node.lineno < 60, node.name


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_module_says_what_it_is(path: Path) -> None:
    assert ast.get_docstring(parsed(path))


def _interpolates(node: ast.AST) -> TypeGuard[Any]:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "II"


def test_every_field_of_the_configuration_is_read() -> None:
    """A field that nothing reads is a switch that does nothing."""
    nodes = [node for path in SOURCES for node in ast.walk(parsed(path))]
    read = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    # Defaults that are another field's value: II("tier.lora_rank").
    read |= {str(node.args[0].value).split(".")[-1] for node in nodes if _interpolates(node)}
    declared = tuple(module.__name__ for module in (config, curriculum, mode_options, retention, stability, vigilance))
    fields = {
        f"{kind.__name__}.{field.name}": field.name
        for kind in vars(config).values()
        if isinstance(kind, type) and dataclasses.is_dataclass(kind) and kind.__module__ in declared
        for field in dataclasses.fields(kind)
    }
    assert {name for name, field in fields.items() if field not in read} == set()
