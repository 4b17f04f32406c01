"""The optimizers: ``torch.optim`` signatures over one fused step."""

from .adam import Adam, AdamW, GIAdam
from .adamp import SGDP, AdamP
from .averaging import EMA, SWA
from .base import FusedOptimizer
from .lamb import LAMB
from .radam import RAdam
from .sgd import SGD

__all__ = ["EMA", "LAMB", "SGD", "SGDP", "SWA", "Adam", "AdamP", "AdamW", "FusedOptimizer", "GIAdam", "RAdam"]
