"""Published ways to choose a learning rate and its warmup."""

from .autowu import AutoWU
from .bounds import best_scale, last_iterate_bound, refined_bound
from .catapult import PersistentCatapult
from .initial import initial_lr, reach_steps, saved_steps
from .refine import Refinement, fit_polynomial, refine_groups, refine_schedule, refinement

__all__ = [
    "AutoWU",
    "PersistentCatapult",
    "Refinement",
    "best_scale",
    "fit_polynomial",
    "initial_lr",
    "last_iterate_bound",
    "reach_steps",
    "refine_groups",
    "refine_schedule",
    "refined_bound",
    "refinement",
    "saved_steps",
]
