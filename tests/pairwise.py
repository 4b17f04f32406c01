"""Rows of products of parameters that hold every pair of values, or every value.

``make test`` leaves out tests marked ``rest``, and runs the rows with every pair of tests marked ``pairwise``: a fault that needs one value or two
together shows in them, one that needs three shows in the rest, which ``make test-all`` runs. ``PRODUCTS`` chooses:
nothing for the pairs, ``all``, a part of the rest such as ``2/3``, or ``values``, which thins the tests without the mark
to rows with every value.
"""

from __future__ import annotations

import itertools
import random
import zlib
from collections.abc import Hashable, Sequence
from typing import Any

import pytest


def pairwise(*lists: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Return rows of the product of the lists, few of them, that hold every pair of values of two lists."""
    rows = list(itertools.product(*(range(len(values)) for values in lists)))
    return [tuple(values[i] for values, i in zip(lists, rows[k], strict=True)) for k in covering(rows)]


def singly(*lists: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Return as many rows as the longest list has values, which hold every value of each list."""
    return list(
        zip(*(itertools.islice(itertools.cycle(x), max(map(len, lists))) for x in lists), strict=True)
    )


def covering(rows: Sequence[tuple[Hashable, ...]], strength: int = 2, seed: str = "") -> list[int]:
    """Return the places of rows that hold each value, and each pair if strength is 2, that any row holds.

    Always the row with most of them that are not held yet; the seed chooses among equals.
    """
    held = [
        {found for n in range(1, strength + 1) for found in itertools.combinations(enumerate(row), n)}
        for row in rows
    ]
    order = random.Random(seed).sample(range(len(rows)), len(rows))
    missing, chosen = set().union(*held), []
    while missing:
        best = max(range(len(rows)), key=lambda k: (len(held[k] & missing), order[k]))
        chosen.append(best)
        missing -= held[best]
    return sorted(chosen)


def values_of(item: pytest.Function) -> tuple[Hashable, ...]:
    """Return what an item got from each ``parametrize`` and each fixture with parameters, by identity."""
    params = item.callspec.params
    groups = []
    for mark in item.iter_markers("parametrize"):
        names = mark.args[0]
        groups.append([n.strip() for n in names.split(",")] if isinstance(names, str) else list(names))
    named = {name for names in groups for name in names}
    groups += [[name] for name in params if name not in named]
    return tuple(tuple(id(params[name]) for name in names) for names in groups)


def left_out(items: Sequence[pytest.Item], also_unmarked: bool = False) -> set[str]:
    """Return the node ids of items marked ``rest``, and of those whose pairs other items of the same test hold.

    With ``also_unmarked`` tests without the mark ``pairwise`` are thinned to rows with every value.
    """
    tests: dict[str, list[pytest.Function]] = {}
    for item in items:
        if hasattr(item, "callspec") and (also_unmarked or item.get_closest_marker("pairwise")):
            tests.setdefault(item.nodeid.partition("[")[0], []).append(item)
    dropped = {item.nodeid for item in items if item.get_closest_marker("rest")}
    for name, rows in tests.items():
        strength = 2 if rows[0].get_closest_marker("pairwise") else 1
        kept = set(covering([values_of(row) for row in rows], strength, name))
        dropped |= {row.nodeid for k, row in enumerate(rows) if k not in kept}
    return dropped


def select(items: list[pytest.Item], products: str) -> list[pytest.Item]:
    """Take the items out of the list that ``products`` does not ask for, and return them."""
    if products == "all":
        return []
    rest = left_out(items, products == "values")
    if products in ("", "values"):
        wanted = {item.nodeid for item in items} - rest
    else:
        part, parts = (int(number) for number in products.split("/"))
        wanted = {name for name in rest if zlib.crc32(name.encode()) % parts == part - 1}
    dropped = [item for item in items if item.nodeid not in wanted]
    items[:] = [item for item in items if item.nodeid in wanted]
    return dropped
