"""Declaration of an update rule: its states, its hyper-parameters and its stability."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..reference.rules import LayerRule, Rule
from .hyper import Hyper
from .structs import MAX_STATES


@dataclass(frozen=True)
class RuleSpec:
    """Declare an update rule to everything outside of the kernels.

    All code that depends on the rule asks its spec. A property that the class in ``reference/rules.py`` does
    not state raises ``TypeError`` with the names of both.

    Attributes:
        rule: Class of the rule in ``reference/rules.py``; the kernels have it under the same name.
        states: Names of all states that the rule can keep, in the order in which the kernels take them; each
            has the shape of its parameter.
        hyper: Validates a parameter group and returns its hyper-parameters; takes the name of the optimizer
            class, for messages, and the group.
        n_states: Returns how many of ``states`` a group keeps; None keeps all of them.
        second_moment: The state that ``Hyper.init`` prepares before the first step; None if no state does.
        first_gradient: The state that the first gradient enters whole, so that one which is allocated late
            starts its count of updates anew; None if no state does.
        takes_sparse: Whether sparse gradients are made dense instead of refused.
        scalar_states: Must be empty: the kernels keep no state of another shape than the parameter.

    Raises:
        TypeError: If the states are not those that the rule takes, or a scalar state is asked for.
    """

    rule: type[Rule] | type[LayerRule]
    states: tuple[str, ...]
    hyper: Callable[[str, Mapping[str, Any]], Hyper]
    n_states: Callable[[Mapping[str, Any]], int] | None = None
    second_moment: str | None = None
    first_gradient: str | None = None
    takes_sparse: bool = False
    scalar_states: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check the states against the rule."""
        if self.scalar_states:
            raise TypeError(
                f"{self.name}: scalar_states must be empty, got {self.scalar_states}. A state has the shape "
                "of its parameter; compute a running scalar from the step count in scalars()."
            )
        if len(self.states) != self.rule.max_states or len(self.states) > MAX_STATES:
            raise TypeError(
                f"{self.name}: states must be the {self.rule.max_states} of the rule, at most "
                f"{MAX_STATES}, got {self.states}."
            )
        for name in (self.second_moment, self.first_gradient):
            if name is not None and name not in self.states:
                raise TypeError(f"{self.name}: {name} must be one of the states {self.states}.")

    @property
    def name(self) -> str:
        """Name of the rule in every language."""
        return self.rule.__name__

    @property
    def is_layerwise(self) -> bool:
        """Whether the update needs sums over a layer."""
        return self.n_sums > 0

    @property
    def n_sums(self) -> int:
        """Number of sums over a layer, or over each of its channels, that the update needs."""
        return int(getattr(self.rule, "n_sums", 0))

    @property
    def by_channel(self) -> bool:
        """Whether the rule needs the sums of each output channel, so that channels must be contiguous."""
        return bool(getattr(self.rule, "projects", False))

    @property
    def optional_states(self) -> tuple[str, ...]:
        """States that only some groups keep."""
        return self.states[self.rule.min_states :]

    def state_names(self, group: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the names of the states that a group keeps."""
        return self.states if self.n_states is None else self.states[: self.n_states(group)]

    @property
    def second_moment_index(self) -> int:
        """Position of the second moment among the states."""
        if self.second_moment is None:
            raise TypeError(f"{self.name}: RuleSpec must name the second_moment, got None.")
        return self.states.index(self.second_moment)

    @property
    def is_preconditioned(self) -> bool:
        """Whether the update divides the first moment by a diagonal, rather than by 1."""
        return bool(self._stated("preconditioned"))

    def has_first_gradient(self, state: Mapping[str, Any]) -> bool:
        """Return whether a state holds the buffer that the first gradient enters, so that a step was made."""
        return self.first_gradient is not None and state.get(self.first_gradient) is not None

    def stability_threshold(self, hyper: Hyper) -> float:
        """Return the largest stable ``lr * eigenvalue`` of the preconditioned Hessian late in training."""
        return float(self._stated("stability_threshold")(hyper))

    def early_stability_threshold(self, hyper: Hyper) -> float:
        """Return the same at the first step, before momentum has built up."""
        return float(self._stated("early_stability_threshold")(hyper))

    @property
    def is_measurable(self) -> bool:
        """Whether the rule states what a measurement of sharpness needs."""
        return all(
            hasattr(self.rule, name)
            for name in ("preconditioned", "stability_threshold", "early_stability_threshold")
        )

    def _stated(self, name: str) -> Any:
        if not hasattr(self.rule, name):
            raise TypeError(f"{self.name}: the class in reference/rules.py must state {name}, got nothing.")
        return getattr(self.rule, name)
