"""Triton kernels, each beside a plain torch reference. They know nothing of the rest of the project.

Not a package of its own: the name `kernels` belongs to a library that transformers and bitsandbytes import.
"""
