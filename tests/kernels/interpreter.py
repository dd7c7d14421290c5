"""Triton kernels on a CPU."""

import os
import subprocess
import sys

from elite.config import CONF_DIR


def run_interpreted(module: str, check: str) -> None:
    """Call `check("cpu")` of a test module where Triton interprets: it decides so when it is imported."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    script = f"from {module} import {check}; {check}('cpu')"
    done = subprocess.run([sys.executable, "-c", script], cwd=CONF_DIR.parent, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
