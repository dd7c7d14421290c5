"""The search over settings: it minimises the validation loss that a run returns, and a trial that fails is none."""

import importlib.metadata
import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from elite.runfolder import RunFolder
from tests.conftest import Program

INSTALLED = any(found.name == "hydra-optuna-sweeper" for found in importlib.metadata.distributions())


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason="hydra-optuna-sweeper is not installed: pip install hydra-optuna-sweeper")
def test_the_best_of_its_trials_is_the_least_validation_loss(program: Program, tmp_path: Path) -> None:
    trials = ("hydra.sweeper.n_trials=3", "training.learning_rate=-1,1e-2", "hydra.sweep.dir=search", "training.completion_tokens=0")
    done = program("-m", "hparams_search=optuna", "debug=tiny", *trials)
    assert "Traceback" not in done.stderr, done.stderr
    folders = [RunFolder(tmp_path / "search" / number) for number in "012"]
    best = {
        json.loads(folder.summary.read_text())["best_val_loss"]: OmegaConf.load(folder.config).training.learning_rate
        for folder in folders
        if folder.finished
    }
    found = OmegaConf.load(tmp_path / "search" / "optimization_results.yaml")
    assert best and found.best_value == min(best) and found.best_params["training.learning_rate"] == best[min(best)] == 1e-2
    assert (done.returncode == 2) == (len(best) < 3)


@pytest.mark.skipif(INSTALLED, reason="hydra-optuna-sweeper is installed")
def test_without_the_sweeper_it_says_what_to_install(program: Program) -> None:
    done = program("-m", "hparams_search=optuna", "debug=tiny")
    assert done.returncode == 2 and "pip install hydra-optuna-sweeper" in done.stderr and "Traceback" not in done.stderr
