"""Packed table of a step: rows, chunks, hyper-parameters and addresses for the kernels."""
