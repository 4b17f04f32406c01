"""fused_warmup: the whole optimizer stage of a PyTorch training step in one call, and the warmup it needs."""

from . import schedules
from ._version import __version__
from .averaging import EMA, SWA
from .backends import available_backends
from .optimizer import FusedOptimizer
from .optimizers import SGD, Adam, AdamW, GIAdam, RAdam

__all__ = [
    "EMA",
    "SGD",
    "SWA",
    "Adam",
    "AdamW",
    "FusedOptimizer",
    "GIAdam",
    "RAdam",
    "__version__",
    "available_backends",
    "schedules",
]
