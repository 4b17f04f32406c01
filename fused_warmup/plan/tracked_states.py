"""Optimizer states that note when somebody outside of the package reads or replaces them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, ItemsView, Iterable, Iterator, Mapping, ValuesView
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
    """Return a method of a dictionary that notes the access, and whether it replaces, after it has run."""

    @wraps(method)
    def noting(self: Any, *args: Any, **kwargs: Any) -> Any:
        # a step of another thread that takes the note before the method returns would find no holder
        try:
            return method(self, *args, **kwargs)
        finally:
            if replaces:
                self.access.replaced = True
            self.access.noted = True

    return noting


def _note_each(access: Access, entries: Iterable[Any]) -> Iterator[Any]:
    """Yield entries, each of which is an access: an iterator may be held while steps are made."""
    for entry in entries:
        access.noted = True
        yield entry


class _Values(ValuesView[Any]):
    """View of the states; each one that it yields is noted."""

    _mapping: TrackedStates

    def __iter__(self) -> Iterator[Any]:
        """Iterate over the states."""
        return _note_each(self._mapping.access, dict.values(self._mapping))

    def __reversed__(self) -> Iterator[Any]:
        """Iterate over the states, the last one first."""
        return _note_each(self._mapping.access, reversed(dict.values(self._mapping)))


class _Items(ItemsView[Any, Any]):
    """View of the parameters with their states; each one that it yields is noted."""

    _mapping: TrackedStates

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        """Iterate over pairs of a parameter and its state."""
        return _note_each(self._mapping.access, dict.items(self._mapping))

    def __reversed__(self) -> Iterator[tuple[Any, Any]]:
        """Iterate over the pairs, the last one first."""
        return _note_each(self._mapping.access, reversed(dict.items(self._mapping)))

    def __contains__(self, pair: Any) -> bool:
        """Return whether a parameter has a state; that of ``ItemsView`` would add a missing one."""
        return pair in dict.items(self._mapping)


class TrackedStates(defaultdict[Any, Any]):
    """States by parameter, as ``torch.optim`` keeps them, that note each access.

    The state of a parameter is a plain dictionary. Code that holds one may change it at any time, so the
    references to it are counted.
    """

    def __init__(self, access: Access, entries: Mapping[Any, Any]) -> None:
        super().__init__(dict, entries)
        self.access = access

    def __missing__(self, key: Any) -> dict[str, Any]:
        """Return a new empty state, as a ``defaultdict(dict)`` does."""
        state: dict[str, Any] = {}
        self[key] = state
        return state

    def add(self, key: Any, entries: dict[str, Any]) -> None:
        """Set or complete the state of a parameter without noting an access."""
        own = dict.setdefault(self, key, entries)
        if own is not entries:
            own.update(entries)

    def __iter__(self) -> Iterator[Any]:
        """Iterate over the parameters; defined so that ``dict(states)`` goes through ``__getitem__``."""
        return super().__iter__()

    def values(self) -> ValuesView[Any]:  # type: ignore[override]
        """Return a view of the states, which may be held while steps are made."""
        return _Values(self)

    def items(self) -> ItemsView[Any, Any]:  # type: ignore[override]
        """Return a view of the parameters with their states, which may be held while steps are made."""
        return _Items(self)

    def copy(self) -> defaultdict[Any, Any]:  # type: ignore[override]
        """Return a plain ``defaultdict`` of the same states."""
        return defaultdict(dict, dict(self))

    def __or__(self, other: Any) -> defaultdict[Any, Any]:  # type: ignore[override]
        """Return a plain ``defaultdict`` with the entries of both."""
        merged: defaultdict[Any, Any] = self.copy() | other
        return merged

    def __ror__(self, other: Any) -> Any:
        """Return a plain dictionary with the entries of both."""
        return other | self.copy()

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


def entries_of(states: Mapping[Any, Any]) -> list[tuple[Any, Any]]:
    """Return the keys with their states; all of them together are one access."""
    if not isinstance(states, TrackedStates):
        return list(states.items())
    # the list holds the states before the access is noted, see _noting()
    entries = list(dict.items(states))
    states.access.noted = True
    return entries


_READING = ("__getitem__", "get")
_WRITING = ("__setitem__", "__delitem__", "__ior__", "pop", "popitem", "setdefault", "update", "clear")
for _name in (*_READING, *_WRITING):
    _method = _noting(getattr(TrackedStates, _name), replaces=_name in _WRITING)
    setattr(TrackedStates, _name, _method)
