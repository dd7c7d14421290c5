"""Rows of values as rows of bytes: with 8 bits a value, and with 4.5 in a Golomb–Rice code."""
