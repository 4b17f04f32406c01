"""Rows that hold every pair of values: what ``make test`` runs of tests marked ``pairwise``.

A fault that needs one value or two together shows in such rows; one that needs three shows in all of them, which
``make test-all`` runs. ``PRODUCTS`` chooses: nothing for the pairs, ``all``, or a part of the rest such as ``2/3``.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Hashable, Sequence
from typing import Any

import pytest


def pairwise(*lists: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Return rows of the product of the lists, few of them, that hold every pair of values of two lists."""
    rows = list(itertools.product(*(range(len(values)) for values in lists)))
    return [tuple(values[i] for values, i in zip(lists, rows[k], strict=True)) for k in covering(rows)]


def covering(rows: Sequence[tuple[Hashable, ...]]) -> list[int]:
    """Return the places of rows that hold every value and every pair of values that any row holds, in order.

    Always the row with most pairs that are not held yet, the first of equals.
    """
    pairs = [{*enumerate(row), *itertools.combinations(enumerate(row), 2)} for row in rows]
    missing, chosen = set().union(*pairs), []
    while missing:
        best = max(range(len(rows)), key=lambda k: (len(pairs[k] & missing), -k))
        chosen.append(best)
        missing -= pairs[best]
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


def left_out(items: Sequence[pytest.Item]) -> set[str]:
    """Return the node ids of items marked ``pairwise`` whose pairs other items of the same test hold."""
    tests: dict[str, list[pytest.Function]] = {}
    for item in items:
        if hasattr(item, "callspec") and item.get_closest_marker("pairwise"):
            tests.setdefault(item.nodeid.partition("[")[0], []).append(item)
    dropped = set()
    for rows in tests.values():
        kept = set(covering([values_of(row) for row in rows]))
        dropped |= {row.nodeid for k, row in enumerate(rows) if k not in kept}
    return dropped


def select(items: list[pytest.Item], products: str) -> list[pytest.Item]:
    """Take the items out of the list that ``products`` does not ask for, and return them."""
    if products == "all":
        return []
    rest = left_out(items)
    if products:
        part, parts = (int(number) for number in products.split("/"))
        wanted = {name for name in rest if zlib.crc32(name.encode()) % parts == part - 1}
    else:
        wanted = {item.nodeid for item in items} - rest
    dropped = [item for item in items if item.nodeid not in wanted]
    items[:] = [item for item in items if item.nodeid in wanted]
    return dropped
