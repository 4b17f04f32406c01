"""Save and restore the states of random generators: global ones, and those that a closure owns."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

# kinds of generators whose state can be read and set
KINDS = (torch.Generator, np.random.Generator, np.random.RandomState, np.random.BitGenerator, random.Random)


def restorer(generator: Any) -> Callable[[], object] | None:
    """Return a function that restores a generator's present state, or None if its state cannot be set.

    Args:
        generator: An instance of one of ``KINDS``.
    """
    if isinstance(generator, torch.Generator):
        return partial(generator.set_state, generator.get_state())
    if isinstance(generator, np.random.RandomState):
        # the legacy format only holds the state of MT19937
        return partial(generator.set_state, generator.get_state(legacy=False))
    if isinstance(generator, random.Random):
        # the operating system's generator has no state
        if isinstance(generator, random.SystemRandom):
            return None
        return partial(generator.setstate, generator.getstate())
    bits = generator.bit_generator if isinstance(generator, np.random.Generator) else generator
    return partial(setattr, bits, "state", bits.state)


def random_state(device: torch.device) -> tuple[Any, ...]:
    """Return the states of the global generators of Python, numpy and torch."""
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), device, cuda


def set_random_state(state: tuple[Any, ...]) -> None:
    """Restore a result of ``random_state``."""
    python, numpy, cpu, device, cuda = state
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state(cuda, device)
