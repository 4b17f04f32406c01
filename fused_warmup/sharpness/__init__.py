"""Sharpness, the edge of stability and the critical learning rate, measured during training."""

from .directional_sharpness import directional
from .estimators import spectral_density, trace
from .hessian_operator import HessianOperator, PreconditionedOperator
from .line_search import critical_lr
from .measure import preconditioned, threshold, top_eigenvalue
from .probe import SharpnessProbe
from .result import DirectionalReading, RateSearch, SharpnessReading, SpectralDensity, TraceEstimate

__all__ = [
    "DirectionalReading",
    "HessianOperator",
    "PreconditionedOperator",
    "RateSearch",
    "SharpnessProbe",
    "SharpnessReading",
    "SpectralDensity",
    "TraceEstimate",
    "critical_lr",
    "directional",
    "preconditioned",
    "spectral_density",
    "threshold",
    "top_eigenvalue",
    "trace",
]
