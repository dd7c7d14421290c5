"""Compose one run, plan it, launch it: `python train.py tier=tier9 hardware=rtx3090`."""

import hydra
from omegaconf import DictConfig

from elite import compose, modes


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(composed: DictConfig) -> None:
    """One run, or one job of a multirun."""
    modes.run(compose.from_hydra(composed))


if __name__ == "__main__":
    compose.at_the_edge(main)
