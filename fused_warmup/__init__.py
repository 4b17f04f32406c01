"""fused_warmup: the whole optimizer stage of a PyTorch training step in one call, and the warmup it needs."""

import importlib
from typing import TYPE_CHECKING, Any

from . import schedules
from ._version import __version__
from .backends import available_backends
from .optim.adam import Adam, AdamW, GIAdam
from .optim.adamp import SGDP, AdamP
from .optim.averaging import EMA, SWA
from .optim.base import FusedOptimizer
from .optim.lamb import LAMB
from .optim.radam import RAdam
from .optim.sgd import SGD

if TYPE_CHECKING:
    from . import sharpness, tuning
    from .sharpness import SharpnessProbe
    from .sharpness import SharpnessReading as SharpnessReading
    from .tuning import AutoWU, PersistentCatapult

__all__ = [
    "EMA",
    "LAMB",
    "SGD",
    "SGDP",
    "SWA",
    "Adam",
    "AdamP",
    "AdamW",
    "AutoWU",
    "FusedOptimizer",
    "GIAdam",
    "PersistentCatapult",
    "RAdam",
    "SharpnessProbe",
    "__version__",
    "available_backends",
    "schedules",
    "sharpness",
    "tuning",
]

# imported when they are first asked for
_LATER = {
    "sharpness": "sharpness",
    "tuning": "tuning",
    "SharpnessProbe": "sharpness",
    "SharpnessReading": "sharpness",
    "PersistentCatapult": "tuning",
    "AutoWU": "tuning",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f".{_LATER[name]}", __name__)
    return module if name == _LATER[name] else getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
