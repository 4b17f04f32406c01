"""Benchmarks of the step against the torch code it replaces: ``python -m benchmarks`` or ``make bench``."""
