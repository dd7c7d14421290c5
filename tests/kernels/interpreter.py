"""Triton kernels on a CPU."""

import importlib
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from functools import cache


def run_interpreted(module: str, check: str) -> None:
    """Call `check("cpu")` of a test module where Triton interprets: it decides so when it is imported."""
    _interpreter().submit(_call, module, check).result()


@cache
def _interpreter() -> ProcessPoolExecutor:
    """One process for all checks of this one, for what they import takes longer than most of them."""
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _interpret)


def _interpret() -> None:
    os.environ["TRITON_INTERPRET"] = "1"


def _call(module: str, check: str) -> None:
    getattr(importlib.import_module(module), check)("cpu")
