"""A process group for decisions that all processes share, and a check that they decide on the same thing."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch

from .groups import world_size

# how long a process waits for the others
TIMEOUT = timedelta(minutes=10)

# the default process group, and the one for decisions that was made beside it
_made: list[tuple[Any, Any]] = []


def agreed_group(owner: str, facts: Mapping[str, object], hint: str) -> Any:
    """Return the process group for decisions, after a check that all processes decide on the same facts.

    The group has all processes of the default one. Every process makes this call equally often and in the
    same order; the first call makes the group. It is one of gloo, on the host, also beside nccl: a missing
    process then raises an error here, where it would abort this process in the default group.

    Args:
        owner: Name of the caller, for messages.
        facts: What the processes must have in common; plain values by their names.
        hint: What to do where they differ.

    Returns:
        The group, None for a single process.

    Raises:
        ValueError: If a fact differs; all processes raise this.
        RuntimeError: If a process does not make the call within ``TIMEOUT``.
    """
    if world_size() == 1:
        return None
    dist = torch.distributed
    try:
        group = _group()
        own = torch.tensor([_digest(owner, facts)])
        digests = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
        dist.all_gather(digests, own, group=group)
        if all(torch.equal(digest, own) for digest in digests):
            return group
        found: list[Any] = [None] * len(digests)
        dist.all_gather_object(found, {"caller": owner, **facts}, group=group)
    except RuntimeError as error:
        # the classes of torch's errors derive from this one
        raise RuntimeError(
            f"{owner}: all {world_size()} ranks must make this call, each of them equally often; another "
            f"rank has not made it within {TIMEOUT.total_seconds():g} s. {hint}"
        ) from error
    raise ValueError(f"{owner}: {_difference(found)} {hint}")


def _group() -> Any:
    """Return the process group for decisions beside the present default group."""
    dist = torch.distributed
    if not _made or _made[0][0] is not dist.group.WORLD:
        _made[:] = [(dist.group.WORLD, dist.new_group(backend="gloo", timeout=TIMEOUT))]
    return _made[0][1]


def _digest(owner: str, facts: Mapping[str, object]) -> int:
    """Return a hash of facts that is the same in all processes, in the range of int64."""
    digest = hashlib.sha256(repr((owner, dict(facts))).encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def _difference(found: list[dict[str, object]]) -> str:
    """Return a sentence that names the first fact in which another process differs from the first one."""
    for rank, other in enumerate(found):
        for name, value in found[0].items():
            if repr(other.get(name)) != repr(value):
                got = f"{value!r} on rank 0 and {other.get(name)!r} on rank {rank}"
                return f"{name} must be the same on all ranks, got {got}."
    raise AssertionError
