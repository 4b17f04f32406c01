"""Find the modules and random generators that a closure refers to."""

from __future__ import annotations

import contextlib
import functools
import itertools
import sys
import types
from collections import OrderedDict, deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .randomness import KINDS

# limits of the search from one function or module: a closure may refer to a whole data set
_MOST_ITEMS, _DEEPEST, _LONGEST = 2000, 6, 64
_OURS = __name__.partition(".")[0]
# packages whose functions and classes hold no references to objects of the user
_FOREIGN = {"builtins", "torch", "numpy", _OURS}
_WANTED = (torch.nn.Module, *KINDS)
_CONTAINERS = {dict, list, tuple, set, frozenset, deque, OrderedDict}
_LEAVES = (Tensor, np.ndarray, str, bytes, int, float, complex, types.NoneType, types.ModuleType)
_CALLABLES = (
    types.FunctionType,
    types.MethodType,
    types.BuiltinFunctionType,
    functools.partial,
    staticmethod,
    classmethod,
    property,
)
# attributes of a callable that hold the function or object that it wraps
_WRAPPED = ("__wrapped__", "_torchdynamo_orig_callable", "__self__", "__func__", "func", "fget")


class Search:
    """Finds modules and random generators, each of them once over all calls."""

    def __init__(self) -> None:
        # holds the objects themselves, because the id of a deleted object may be given to another
        self._visited: dict[int, Any] = {}
        self._slots: dict[type, list[Any] | None] = {}

    def __contains__(self, item: object) -> bool:
        return id(item) in self._visited

    def __call__(self, root: Any) -> Iterator[Any]:
        """Yield the modules and generators reachable from a function, a module or another object.

        The search follows cells, defaults, attributes, containers, and the globals that code names, including
        the code of nested functions and of the methods of objects. Modules inside modules are found at any
        depth; other objects up to a depth of 6, in the first 64 items of a container, among the first 2000
        objects from the root and from each module. Attributes and globals whose names are computed at run
        time are not found, nor are objects inside a C extension or another process.
        """
        roots = deque([root])
        while roots:
            waiting, left = deque([(roots.popleft(), 0)]), _MOST_ITEMS
            while waiting and left:
                item, depth = waiting.popleft()
                slots = self._slots_of(item)
                if item in self or slots is None:
                    continue
                if isinstance(item, torch.nn.Module) and depth:
                    roots.append(item)
                    continue
                self._visited[id(item)] = item
                left -= 1
                if isinstance(item, _WANTED):
                    yield item
                if depth < _DEEPEST:
                    inside = [x for x in _inside(item, slots) if self._slots_of(x) is not None]
                    waiting.extend((x, depth + 1) for x in inside)

    def _slots_of(self, item: Any) -> list[Any] | None:
        """Return the descriptors of an object's slots, or None if the search should skip the object."""
        cls = type(item)
        if cls not in self._slots:
            self._slots[cls] = _slots(cls)
        try:
            foreign = isinstance(item, type) and _package(item.__module__) in _FOREIGN
        except Exception:
            # a proxy of a deleted object may raise any exception
            return None
        return None if foreign or (cls in _CONTAINERS and not item) else self._slots[cls]


def _slots(cls: type) -> list[Any] | None:
    """Return the descriptors of the slots of a class, or None if the search should skip its objects."""
    if issubclass(cls, _LEAVES):
        return None
    # skips optimizers, and probes, whose generator must advance from one reading to the next
    ours = any(_package(base.__module__) == _OURS for base in cls.__mro__)
    if ours and not issubclass(cls, torch.nn.Module):
        return None
    own = [base for base in cls.__mro__ if _package(base.__module__) not in _FOREIGN]
    return [v for base in own for v in vars(base).values() if isinstance(v, types.MemberDescriptorType)]


def _package(module: object) -> str:
    """Return the top-level package of a module's name; ``__module__`` of a class may be any object."""
    return str(module).partition(".")[0]


def _inside(item: Any, slots: list[Any]) -> Iterator[Any]:
    """Yield the objects that a function, container, module, class or other object refers to."""
    if isinstance(item, torch.nn.Module):
        yield from item.children()
    elif isinstance(item, types.FunctionType):
        yield from _captured(item)
    elif isinstance(item, functools.partial):
        yield from (*item.args, *item.keywords.values())
    elif isinstance(item, (list, tuple, set, frozenset, deque)):
        yield from list(itertools.islice(item, _LONGEST))
    elif isinstance(item, (dict, types.MappingProxyType)):
        yield from list(itertools.islice(item.values(), _LONGEST))
    elif isinstance(item, types.GeneratorType) and item.gi_frame is not None:
        # restoring the random generator that a stream draws from makes the stream repeat its numbers
        yield from list(item.gi_frame.f_locals.values())
    elif isinstance(item, type):
        yield from item.__mro__
    if isinstance(item, _CALLABLES):
        yield from (getattr(item, name, None) for name in _WRAPPED)
    # some objects have no attributes, and some raise
    with contextlib.suppress(Exception):
        yield from list(vars(item).values())
    for slot in slots:
        # an unassigned slot raises
        with contextlib.suppress(AttributeError):
            yield slot.__get__(item)
    # the class has the methods
    yield type(item)


def _captured(function: types.FunctionType) -> Iterator[Any]:
    """Yield the objects in a function's cells and defaults, and the globals that its code names."""
    for cell in function.__closure__ or ():
        # a cell whose variable is unassigned raises
        with contextlib.suppress(ValueError):
            yield cell.cell_contents
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    if _package(function.__globals__.get("__name__")) in _FOREIGN:
        return
    names = list(dict.fromkeys(_names(function.__code__)))
    # modules imported inside the function are not among its globals
    imported = [name for name in names if sys.modules.get(name) and _package(name) not in _FOREIGN]
    waiting = deque([function.__globals__, *(vars(sys.modules[name]) for name in imported)])
    visited: set[int] = set()
    while waiting:
        space = waiting.popleft()
        if id(space) in visited:
            continue
        visited.add(id(space))
        for value in [space[name] for name in names if name in space]:
            if not isinstance(value, types.ModuleType):
                yield value
            elif _package(value.__name__) not in _FOREIGN:
                # the names of a.b.c are looked up in the modules a and a.b
                waiting.append(vars(value))


def _names(code: types.CodeType) -> Iterator[str]:
    """Yield the global and attribute names in code, including nested functions and comprehensions."""
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from _names(inner)
