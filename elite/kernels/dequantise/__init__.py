"""Weights of four bits made whole again, their scales with them."""
