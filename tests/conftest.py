"""Fixtures and habits for all tests: fixed seeds, poisoned empty memory, two threads."""

import sys

import pytest
import torch

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
