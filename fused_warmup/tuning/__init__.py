"""Published ways to choose a learning rate and its warmup."""

from .autowu import AutoWU
from .bounds import best_rates, best_scale, last_iterate_bound, refined_bound
from .catapult import PersistentCatapult
from .geometry import angular_distance, average_states, frequency_bands, linear_barrier
from .initial import initial_lr, reach_steps, saved_steps
from .large_lr import pretrain_finetune, relative_rate
from .refine import Refinement, fit_polynomial, refine_groups, refine_schedule, refinement
from .regimes import Regimes, Trial, find_regimes

__all__ = [
    "AutoWU",
    "PersistentCatapult",
    "Refinement",
    "Regimes",
    "Trial",
    "angular_distance",
    "average_states",
    "best_rates",
    "best_scale",
    "find_regimes",
    "fit_polynomial",
    "frequency_bands",
    "initial_lr",
    "last_iterate_bound",
    "linear_barrier",
    "pretrain_finetune",
    "reach_steps",
    "refine_groups",
    "refine_schedule",
    "refined_bound",
    "refinement",
    "relative_rate",
    "saved_steps",
]
