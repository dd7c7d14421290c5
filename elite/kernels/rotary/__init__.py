"""Rotary position embedding of queries and keys, in place, of whole heads or of their first values."""
