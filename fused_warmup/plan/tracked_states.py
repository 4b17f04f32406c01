"""Optimizer states that note when somebody outside of the package reads or changes them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from functools import wraps
from typing import Any


class Access:
    """Record of whether states were read or changed since the last comparison of them.

    Attributes:
        noted: True after any access.
        replaced: True after a change of the dictionary that has the state of each parameter.
    """

    def __init__(self) -> None:
        self.noted = self.replaced = False


def _noting(method: Callable[..., Any], *, replaces: bool = False) -> Callable[..., Any]:
    """Return a method of a dictionary that notes the access, and whether it replaces, before it runs."""

    @wraps(method)
    def noting(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.access.noted = True
        if replaces:
            self.access.replaced = True
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

    def add(self, key: Any, entries: Mapping[str, Any]) -> None:
        """Set or complete the state of a parameter without noting an access."""
        own = dict.get(self, key)
        if own is None:
            dict.__setitem__(self, key, TrackedState(self.access, entries))
        else:
            dict.update(own, entries)

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


def peek(states: Mapping[Any, Any], key: Any) -> dict[str, Any] | None:
    """Return the state of a parameter, or None without one; ``dict.get`` of it notes no access."""
    own = dict.get(states, key) if isinstance(states, dict) else states.get(key)
    return own if isinstance(own, dict) else None


_READING = ("__getitem__", "__or__", "__ror__", "get", "items", "values")
_WRITING = ("__setitem__", "__delitem__", "__ior__", "pop", "popitem", "setdefault", "update", "clear")
for _name in (*_READING, *_WRITING):
    setattr(TrackedState, _name, _noting(getattr(TrackedState, _name)))
    _method = _noting(getattr(TrackedStates, _name), replaces=_name in _WRITING)
    setattr(TrackedStates, _name, _method)
