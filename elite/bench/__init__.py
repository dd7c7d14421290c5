"""Measurements on the machine at hand: random tokens, no corpus, no run folder. Results are JSON files for `docs/measurements`."""
