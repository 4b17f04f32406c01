"""fused_warmup: the whole optimizer stage of a PyTorch training step in one call, and the warmup it needs."""

import importlib
from collections.abc import Mapping
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
from .schedules.adaptive import AdaptiveSchedule, register_format

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


def _load_autowu(state: Mapping[str, Any]) -> AdaptiveSchedule:
    from .tuning import AutoWU

    return AutoWU.from_state_dict(state)


# states of optimizers may hold one before anyone has imported tuning
register_format("fused_warmup.autowu", _load_autowu)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
