"""Timings against the torch code that a step replaces: ``python -m benchmarks``, or ``make bench``."""
