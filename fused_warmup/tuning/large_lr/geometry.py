"""Geometry of solutions: angles, loss barriers on the straight line, means, and frequency bands of images."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ... import _checks as check
from ...optim.losses import loss_value

State = Mapping[str, Tensor]
Weights = nn.Module | State | Iterable[Tensor]


@dataclass(frozen=True)
class Barrier:
    """The error on the straight line between two solutions.

    Attributes:
        value: Largest excess of the error over linear interpolation between the ends, >= 0.
        alphas: Positions on the line, 0 for the first solution and 1 for the second.
        errors: Error at each position.
    """

    value: float
    alphas: tuple[float, ...]
    errors: tuple[float, ...]


def angular_distance(a: Weights, b: Weights) -> float:
    """Return the angle between two sets of weights at the origin.

    Args:
        a: Weights as a module (its parameters that require gradients), a mapping of names to tensors, or
            tensors. The direction is meaningful only for scale-invariant weights, those before a
            normalisation: leave out statistics of batch norms and the last layer.
        b: As many tensors of the same shapes.

    Returns:
        The angle in radians, in [0, pi]; NaN if one of them is zero.

    Raises:
        ValueError: If names or shapes differ, or there are no weights.

    Source: Sadrtdinov et al. 2024, arXiv:2410.22113, section 4; their arccos loses small angles, so this is
    ``2 atan2(|u - v|, |u + v|)`` of the unit vectors.
    """
    owner = "angular_distance"
    u, v = _flat(owner, "a", a), _flat(owner, "b", b)
    if [t.shape for t in u] != [t.shape for t in v]:
        check.fail(
            owner, "b", f"have the shapes {[tuple(t.shape) for t in u]} of a", [tuple(t.shape) for t in v]
        )
    if isinstance(a, Mapping) and isinstance(b, Mapping) and list(a) != list(b):
        check.fail(owner, "b", f"have the names {list(a)} of a", list(b))
    first, second = (torch.cat([t.flatten() for t in tensors]) for tensors in (u, v))
    first, second = first / first.norm(), second / second.norm()
    return 2.0 * math.atan2(float((first - second).norm()), float((first + second).norm()))


def _flat(owner: str, name: str, weights: Weights) -> list[Tensor]:
    """Return weights as float64 tensors on the CPU."""
    if isinstance(weights, nn.Module):
        weights = [p for p in weights.parameters() if p.requires_grad]
    elif isinstance(weights, Mapping):
        weights = list(weights.values())
    found = [t.detach().to("cpu", torch.float64) for t in weights]
    if not found:
        check.fail(owner, name, "hold weights", "none")
    return found


def linear_barrier(
    model: nn.Module,
    a: State,
    b: State,
    error: Callable[[], float],
    *,
    points: int = 21,
    prepare: Callable[[], None] | None = None,
) -> Barrier:
    """Measure the error on the straight line between two states of a model.

    Args:
        model: Loads the states one after the other; its own state is restored, also after an exception.
        a: State dict of the first solution.
        b: State dict of the second; entries that are not floating-point come from ``a``.
        error: Returns the error of the model in its present state, as a fraction for example.
        points: Positions on the line, >= 2; the paper takes 21 or fewer.
        prepare: Called before each evaluation, for example to project the weights back to their sphere or to
            recompute the statistics of batch norms.

    Returns:
        The barrier.

    Raises:
        TypeError: If ``error`` returns no number.
        ValueError: If names or shapes differ, or ``points`` is below 2.

    Source: Sadrtdinov et al. 2024, arXiv:2410.22113, section 4.
    """
    owner = "linear_barrier"
    check.whole(owner, "points", points, 2)
    _check_alike(owner, [a, b])
    kept = copied_state(model.state_dict())
    alphas = [i / (points - 1) for i in range(points)]
    errors = []
    try:
        for alpha in alphas:
            model.load_state_dict({name: _between(a[name], b[name], alpha) for name in a})
            if prepare is not None:
                prepare()
            errors.append(loss_value(owner, "error", error(), returned=True))
    finally:
        model.load_state_dict(kept)
    first, last = errors[0], errors[-1]
    excess = [e - (1.0 - x) * first - x * last for x, e in zip(alphas, errors, strict=True)]
    return Barrier(max(0.0, *excess), tuple(alphas), tuple(errors))


def _between(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """Return the linear interpolation of two tensors, exact at both ends."""
    return a.detach().lerp(b.detach(), alpha) if a.is_floating_point() else a


def average_states(states: Sequence[State]) -> dict[str, Tensor]:
    """Return the unweighted mean of state dicts, computed in float64.

    Args:
        states: At least one; entries that are not floating-point come from the last one.

    Returns:
        A state dict. Statistics of batch norms are averaged too and should be recomputed.

    Raises:
        ValueError: If there is none, or names or shapes differ.
    """
    _check_alike("average_states", states)
    mean = {}
    for name, last in states[-1].items():
        if last.is_floating_point():
            total = torch.stack([state[name].detach().double() for state in states]).mean(0)
            mean[name] = total.to(last.dtype)
        else:
            mean[name] = last.clone()
    return mean


def frequency_bands(images: Tensor, bounds: Sequence[int] | None = None) -> Tensor:
    """Split images into bands of spatial frequencies, to test which frequencies a model has learned to use.

    The frequency of a Fourier coefficient is ``|k| + |l|``, its distance in steps from the centre of the
    spectrum. The bands add up to the images and are mutually orthogonal.

    Args:
        images: Floating-point tensor of ``[..., height, width]``.
        bounds: Highest frequency of each band but the last, which takes the rest: increasing integers. None
            takes 0, a quarter and three quarters of the highest frequency, ``height // 2 + width // 2``: for
            sides of 32 the paper's {0}, [1, 8], [9, 24] and [25, 32].

    Returns:
        The bands, ``[len(bounds) + 1, ..., height, width]`` in the dtype of the images; computed in float32
        for narrower ones.

    Raises:
        TypeError: If the images are not a floating-point tensor, or a bound is no integer.
        ValueError: If the images have no height or width, or the bounds do not rise from 0 or more.

    Source: Sadrtdinov et al. 2024, arXiv:2410.22113, the experiments on images.
    """
    owner = "frequency_bands"
    if not isinstance(images, Tensor) or not images.is_floating_point():
        got = images.dtype if isinstance(images, Tensor) else type(images)
        check.fail(owner, "images", "be a floating-point tensor", got, error=TypeError)
    if images.ndim < 2 or 0 in images.shape[-2:]:
        check.fail(owner, "images", "have the shape [..., height, width]", tuple(images.shape))
    # frequencies above half of a side alias to their mirror images
    rows, columns = (
        torch.tensor([min(i, n - i) for i in range(n)], device=images.device) for n in images.shape[-2:]
    )
    if bounds is None:
        highest = int(rows.max() + columns.max())
        bounds = (0, highest // 4, 3 * highest // 4)
    edges = [check.whole(owner, f"bounds[{i}]", bound) for i, bound in enumerate(bounds)]
    if edges != sorted(set(edges)):
        check.fail(owner, "bounds", "rise", edges)
    band = torch.bucketize(rows[:, None] + columns, torch.tensor(edges, device=images.device))
    wide = images.float() if images.element_size() < 4 else images
    spectrum = torch.fft.fft2(wide)
    found = [torch.fft.ifft2(spectrum.where(band == i, 0.0)).real for i in range(len(edges) + 1)]
    return torch.stack(found).to(images.dtype)


def _check_alike(owner: str, states: Sequence[State]) -> None:
    """Raise ``ValueError`` if the names or shapes of state dicts differ from those of the first one."""
    if not states:
        check.fail(owner, "states", "hold at least one state dict", states)
    shapes = [{name: tuple(t.shape) for name, t in state.items()} for state in states]
    for i, other in enumerate(shapes):
        if other != shapes[0]:
            check.fail(owner, f"states[{i}]", f"have the names and shapes {shapes[0]}", other)


def copied_state(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return a deep copy of a state dict."""
    return {name: tensor.detach().clone() for name, tensor in state.items()}
