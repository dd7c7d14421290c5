"""Executors: how a forward and backward pass over a batch is carried out."""
