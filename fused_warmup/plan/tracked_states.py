"""Optimizer states that note when somebody outside of the package reads or changes them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from functools import wraps
from typing import Any


class Access:
    """Record of whether states were read or changed since the last check of them.

    Attributes:
        noted: True after any access.
    """

    def __init__(self) -> None:
        self.noted = False


def _noting(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method of a dictionary that notes the access before it runs."""

    @wraps(method)
    def noting(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.access.noted = True
        return method(self, *args, **kwargs)

    return noting


class TrackedState(dict[str, Any]):
    """State of one parameter: a dictionary of tensors that notes each access."""

    __slots__ = ("access",)

    def __init__(self, access: Access, entries: Mapping[str, Any]) -> None:
        super().__init__(entries)
        self.access = access

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names; defined so that ``dict(state)`` goes through ``__getitem__``."""
        return super().__iter__()

    def copy(self) -> dict[str, Any]:
        """Return a plain dictionary."""
        return dict(self)

    def __reduce__(self) -> Any:
        """Return a plain dictionary to pickle and deepcopy."""
        return dict, (dict(self),)


class TrackedStates(defaultdict[Any, Any]):
    """States by parameter, as ``torch.optim`` keeps them, that note each access."""

    def __init__(self, access: Access, entries: Mapping[Any, Any]) -> None:
        super().__init__(dict)
        self.access = access
        for key, value in entries.items():
            self[key] = TrackedState(access, value) if type(value) is dict else value

    def __missing__(self, key: Any) -> TrackedState:
        """Return a new empty state, as a ``defaultdict(dict)`` does."""
        state = TrackedState(self.access, {})
        self[key] = state
        return state

    def __iter__(self) -> Iterator[Any]:
        """Iterate over the parameters; defined so that ``dict(states)`` goes through ``__getitem__``."""
        return super().__iter__()

    def copy(self) -> defaultdict[Any, Any]:  # type: ignore[override]
        """Return a plain ``defaultdict`` of the same states."""
        return defaultdict(dict, dict(self))

    def __copy__(self) -> defaultdict[Any, Any]:  # type: ignore[override]
        """Return a plain ``defaultdict`` of the same states."""
        return self.copy()

    def __reduce__(self) -> Any:
        """Return a plain ``defaultdict`` to pickle and deepcopy."""
        return defaultdict, (dict, dict(self))


# every method that hands out a value or changes the dictionary
for _name in (
    *("__getitem__", "__setitem__", "__delitem__", "__or__", "__ror__", "__ior__", "get", "items", "values"),
    *("pop", "popitem", "setdefault", "update", "clear"),
):
    setattr(TrackedState, _name, _noting(getattr(TrackedState, _name)))
    setattr(TrackedStates, _name, _noting(getattr(TrackedStates, _name)))
