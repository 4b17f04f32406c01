"""Sharpness, the edge of stability and the critical learning rate, measured during training."""

from .line_search import critical_lr
from .measure import preconditioned, threshold, top_eigenvalue
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
