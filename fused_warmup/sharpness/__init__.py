"""Sharpness, the edge of stability and the critical learning rate, during training."""

from .line_search import critical_lr
from .operators import preconditioned, threshold, top_eigenvalue
from .probe import SharpnessProbe
from .result import RateSearch, SharpnessReading

__all__ = [
    "RateSearch",
    "SharpnessProbe",
    "SharpnessReading",
    "critical_lr",
    "preconditioned",
    "threshold",
    "top_eigenvalue",
]
