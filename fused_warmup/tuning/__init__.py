"""Published ways to choose a learning rate and its warmup."""

from .autowu.schedule import AutoWU
from .large_lr.geometry import angular_distance, average_states, frequency_bands, linear_barrier
from .large_lr.pretrain_finetune import pretrain_finetune, relative_rate
from .large_lr.regimes import Regimes, Trial, find_regimes
from .refinement.bounds import best_rates, best_scale, last_iterate_bound, refined_bound
from .refinement.refine import Refinement, fit_polynomial, refine_groups, refine_schedule, refinement
from .warmup.initial_lr import initial_lr, reach_steps, saved_steps
from .warmup.persistent_catapult import PersistentCatapult

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
