"""Compose one run, plan it, launch it: `python train.py tier=tier9 hardware=rtx3090`."""

import hydra
from omegaconf import DictConfig

from elite import compose


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(composed: DictConfig) -> float | None:
    """One run, or one job of a multirun; returns its best validation loss, for searches over settings."""
    # Imported here, so that --help and tab completion need not wait for torch.
    from elite import modes

    return compose.as_job(modes.run, composed)


if __name__ == "__main__":
    compose.at_the_edge(main)
