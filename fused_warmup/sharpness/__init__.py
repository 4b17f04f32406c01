"""Sharpness, the edge of stability and the critical learning rate, measured during training."""

from .estimators import spectral_density, trace
from .hessian_operator import HessianOperator, PreconditionedOperator
from .line_search import critical_lr
from .measure import preconditioned, threshold, top_eigenvalue
from .probe import SharpnessProbe
from .result import RateSearch, SharpnessReading, SpectralDensity, TraceEstimate

__all__ = [
    "HessianOperator",
    "PreconditionedOperator",
    "RateSearch",
    "SharpnessProbe",
    "SharpnessReading",
    "SpectralDensity",
    "TraceEstimate",
    "critical_lr",
    "preconditioned",
    "spectral_density",
    "threshold",
    "top_eigenvalue",
    "trace",
]
