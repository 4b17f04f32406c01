"""Published ways to choose a learning rate and its warmup."""

from .autowu import AutoWU
from .catapult import PersistentCatapult
from .initial import initial_lr, reach_steps, saved_steps

__all__ = ["AutoWU", "PersistentCatapult", "initial_lr", "reach_steps", "saved_steps"]
