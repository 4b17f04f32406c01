"""fused_warmup: the whole optimizer stage of a PyTorch training step in one call, and the warmup it needs."""

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
from .schedules.adaptive import AdaptiveSchedule, register

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

# modules that are imported when they are first asked for, with the names that they bring
_FROM_SHARPNESS = ("SharpnessProbe", "SharpnessReading")
_FROM_TUNING = ("AutoWU", "PersistentCatapult")


def __getattr__(name: str) -> Any:
    # "from . import sharpness" would ask this function again
    if name == "sharpness" or name in _FROM_SHARPNESS:
        import fused_warmup.sharpness as sharpness

        return sharpness if name == "sharpness" else getattr(sharpness, name)
    if name == "tuning" or name in _FROM_TUNING:
        import fused_warmup.tuning as tuning

        return tuning if name == "tuning" else getattr(tuning, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), "sharpness", "tuning", *_FROM_SHARPNESS, *_FROM_TUNING})


def _autowu() -> type[AdaptiveSchedule]:
    from .tuning import AutoWU

    return AutoWU


register("fused_warmup.autowu", _autowu)
