"""ELITE: fine-tune a causal language model on your own repositories, at the longest context your GPU can hold."""

__version__ = "0.7.7"
