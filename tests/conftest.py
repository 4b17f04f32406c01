"""Fixtures and habits for all tests: fixed seeds, poisoned empty memory, two threads; which tests run, and when."""

import itertools
import os
import sys

import pytest
import torch
from pairwise import select

_REAL = {name: getattr(torch, name) for name in ("empty", "empty_like", "empty_strided")}


def _poisoned(name):
    def make(*args, **kwargs):
        tensor = _REAL[name](*args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.startswith("fused_warmup") and tensor.is_floating_point():
            tensor.fill_(torch.nan)
        return tensor

    return make


@pytest.fixture(autouse=True)
def poison_empty(monkeypatch):
    """Memory that the package did not write must not look like zeros."""
    for name in _REAL:
        monkeypatch.setattr(torch, name, _poisoned(name))


@pytest.fixture(autouse=True)
def seed_and_threads():
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def one_thread(seed_and_threads):
    """Use one thread: matrices are small, and on a busy machine two threads mostly wait for each other."""
    torch.set_num_threads(1)


def long_first(items, n_workers):
    """Order tests so that each worker of xdist, which gets a stretch of the list, begins with slow ones.

    Those are the tests marked slow and those of commands; of one file they stay together, so that what they share
    is made once.
    """
    is_slow = [bool(item.get_closest_marker("slow")) or item.path.parent.name == "cli" for item in items]
    files = itertools.groupby(itertools.compress(items, is_slow), key=lambda item: item.path)
    slow = [[] for _ in range(n_workers)]
    for _, group in files:
        min(slow, key=len).extend(group)
    others = [item for item, first in zip(items, is_slow, strict=True) if not first]
    ordered = []
    for i, own in enumerate(slow):
        # as many as xdist hands out at first
        n_others = max(0, (len(items) - len(ordered)) // (n_workers - i) - len(own))
        ordered += [*own, *others[:n_others]]
        del others[:n_others]
    return ordered + others


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    dropped = select(items, os.environ.get("PRODUCTS", ""))
    if dropped:
        config.hook.pytest_deselected(items=dropped)
    items[:] = long_first(items, getattr(config, "workerinput", {}).get("workercount", 1))
