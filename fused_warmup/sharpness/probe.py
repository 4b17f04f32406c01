"""Sharpness during training: warm-started searches that end where a bound is met."""

from __future__ import annotations

import math
import time
from collections import deque
from dataclasses import fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _checks as check
from ..optim.base import FusedOptimizer
from .directional_sharpness import secant
from .hvp import METHODS, Hessian
from .lanczos import Spectrum, lanczos, random_overlap
from .loss_evaluator import Loss, LossEvaluator
from .measure import make_reading
from .operators import Operator, evaluator_of, random_vector, step_operators
from .pending_step import PendingStep
from .result import Flags, SharpnessReading

_AUDIT_EVERY = 20
# length of the noise in a warm start, weight of the past in the batch error, readings kept for poll()
_ADMIXTURE, _MEMORY, _WAITING = 1.0, 0.9, 64
# distance from double backward, and spread over it, of differences that show that it leaves out a part
_MISSED = 0.1
# readings that a plan looks back on, and products that it adds
_RECENT, _MORE = 4, 2


class SharpnessProbe:
    """Measures the pre-conditioned sharpness while a model trains, without affecting the training.

    A measurement takes products until ``err_krylov``, beyond which there is no larger eigenvalue for 19
    of 20 random starts, is at most ``tolerance`` times the value; the flag ``unconverged`` is set if
    ``max_products`` did not suffice. A warm start is the product with the vector of the previous reading,
    which also shows what this vector is worth on the new batch, plus noise of the same length: without
    noise there is no bound, and the iteration can lock on to an eigenvalue that is no longer the largest.
    The first start, and a second one in every 20th reading, an audit, is noise alone; of an audit the
    larger of both results is kept. ``every`` and ``budget`` set how often is measured, not how well. On
    the CPU the bound is looked at after each product. Elsewhere nothing waits: the number of products
    comes from the bounds of earlier readings that are on the host already, and is ``max_products`` before
    there is one, and where ranks measure together.

    Call ``measure`` between ``backward()`` and ``step()``. The telemetry records the largest Ritz value in
    the column ``sharpness``, in the row of the step that follows.

    Args:
        optimizer: As for ``fused_warmup.sharpness.preconditioned``.
        loss_fn: Loss closure for calls of ``measure`` without one. Its random generators are found and
            restored as described for ``fused_warmup.sharpness.top_eigenvalue``.
        every: Calls of ``measure`` from one measurement to the next.
        budget: Fraction of the training time that measurements may take, instead of ``every``: the first
            measurement is made at once, each further one as soon as it fits into the budget.
        steps: Fewest products of a search, >= 2.
        method: ``"auto"``: double backward, which is right for kinks and 16 bits too, and differences of
            gradients where an operation has no second derivative, or has one that differences contradict at
            the first measurement; ``"difference"`` or ``"autograd"`` for one of them.
        use_grad: As for ``preconditioned``.
        seed: Seed of the random vectors.
        reduce: As for ``preconditioned``; not with ``budget``, because the clocks of ranks differ. DTensors
            take no ``budget`` either.
        tolerance: Relative error of Lanczos, > 0, at which a measurement ends.
        max_products: Most products of a search, at least ``steps``. On a GPU each takes a vector of memory.
        directional: Measure ``fused_warmup.sharpness.directional`` too, by two more gradients; finding the
            step waits for the device.

    Raises:
        TypeError: If the rule of the optimizer is not known, or an argument has a wrong type.
        ValueError: If an argument is out of range.

    Example:
        >>> probe = fw.SharpnessProbe(opt, every=2400)
        >>> loss.backward()
        >>> probe.measure(lambda: loss_fn(model(x[:8]), y[:8]))
        >>> opt.step()
        >>> if (reading := probe.poll()) is not None:
        ...     print(reading.asdict())

    Source: the two bounds ``E[v' H_B v] <= sharpness <= E[sharpness of a batch]`` follow from convexity; they
    hold for a ``v`` that does not depend on the batch, such as one from earlier batches.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        loss_fn: Loss | None = None,
        every: int = 2400,
        budget: float | None = None,
        *,
        steps: int = 3,
        method: str = "auto",
        use_grad: bool = True,
        seed: int = 0,
        reduce: bool = False,
        tolerance: float = 0.05,
        max_products: int = 24,
        directional: bool = False,
    ) -> None:
        name = type(self).__name__
        self.loss_fn = loss_fn
        self.every = check.whole(name, "every", every, 1)
        self.budget = None if budget is None else check.number(name, "budget", budget, 0.0, 1.0, ends="()")
        self._steps = check.whole(name, "steps", steps, 2)
        self._tolerance = check.number(name, "tolerance", tolerance, 0.0, ends="()")
        self._most = check.whole(name, "max_products", max_products, self._steps)
        self._method = check.one_of(name, "method", method, METHODS)
        self._use_grad = check.flag(name, "use_grad", use_grad)
        self._reduce = check.flag(name, "reduce", reduce)
        self._directional = check.flag(name, "directional", directional)
        if self._reduce and self.budget is not None:
            check.fail(name, "budget", "be None where reduce is True", budget)
        # raises for an optimizer without a known rule, now rather than at the first measurement
        pending = PendingStep(name, optimizer, use_grad=False)
        self._method = pending.shards.check_method(self._method)
        if pending.shards.is_placed and self.budget is not None:
            check.fail(name, "budget", "be None for DTensors", budget, "The clocks of ranks differ.")
        self.optimizer, self._device = pending.optimizer, pending.params[0].device
        self._generator = torch.Generator(self._device).manual_seed(check.whole(name, "seed", seed))
        self._clock = _Clock(self._device)
        self._calls = self._measured = 0
        self._vectors: list[Tensor | None] = [None, None]
        # elements of the vectors in all processes
        self._length = 0
        self._gap: Tensor | None = None
        self._relative_error: Tensor | None = None
        self._stretch: Tensor | float = 1.0
        # where the bound after a product is known on the host at no cost
        self._looks = self._device.type == "cpu"
        self._together = self._reduce or pending.shards.is_placed
        # products of a search, and their readings
        self._recent: deque[tuple[int, _Copy]] = deque(maxlen=_RECENT)
        self._pending: deque[tuple[SharpnessReading, _Copy]] = deque(maxlen=_WAITING)

    def measure(self, loss_fn: Loss | None = None) -> bool:
        """Measure if a measurement is due.

        Args:
            loss_fn: Returns the loss of the batch whose gradient is in ``.grad``, or of a part of that batch.

        Returns:
            Whether a measurement was made.

        Raises:
            TypeError: If there is no closure.
        """
        self._calls += 1
        self._clock.call()
        loss_fn = self.loss_fn if loss_fn is None else loss_fn
        if not self._is_due():
            return False
        if loss_fn is None:
            check.fail(type(self).__name__, "loss_fn", "be given here or to the probe", None, error=TypeError)
        self._clock.begin()
        try:
            products, reading = self._measure(loss_fn)
        finally:
            self._clock.end()
        self._measured += 1
        if isinstance(self.optimizer, FusedOptimizer):
            self.optimizer.record_sharpness(reading.value)
        copy = _Copy(reading)
        self._pending.append((reading, copy))
        self._recent.append((products, copy))
        return True

    def poll(self) -> SharpnessReading | None:
        """Return the oldest finished reading not returned before, with CPU tensors; never waits.

        At most the last 64 readings are kept.
        """
        if not self._pending or not self._pending[0][1].is_ready():
            return None
        return self._pending.popleft()[1].reading()

    @property
    def overhead(self) -> float:
        """Time spent on measurements so far over the time spent on training; NaN before the second call."""
        return self._clock.spent / self._clock.trained if self._clock.trained > 0.0 else float("nan")

    def _is_due(self) -> bool:
        if self.budget is None:
            return (self._calls - 1) % self.every == 0
        if not self._measured:
            return True
        return self._clock.spent + self._clock.last <= self.budget * self._clock.trained

    def _measure(self, loss_fn: Loss) -> tuple[int, SharpnessReading]:
        """Return the products that a search was allowed, and the reading."""
        pending = PendingStep(type(self).__name__, self.optimizer, self._use_grad)
        most = self._planned()
        with evaluator_of(pending, loss_fn, self._reduce) as evaluator:
            cold = not self._is_warm(evaluator)
            reading = self._reading_by(self._method, pending, evaluator, most, cold)
            if self._measured == 0 and self._leaves_out(reading, pending, evaluator):
                self._vectors, self._relative_error = [None, None], None
                reading = self._reading_by("difference", pending, evaluator, most, cold)
        if reading.method == "difference":
            self._method = "difference"
        return most, reading

    def _reading_by(
        self, method: str, pending: PendingStep, evaluator: LossEvaluator, most: int, cold: bool
    ) -> SharpnessReading:
        """Return the reading by products of a method."""
        audit = self._measured > 0 and self._measured % _AUDIT_EVERY == 0
        hessian = Hessian(evaluator, method, pending.sign, self._stretch)
        operators = step_operators(pending, hessian)
        search = self._search(0, operators.plain, evaluator, most, audit)
        plain, scaled = search.spectrum, None
        if operators.scaled is not None:
            scaled = self._search(1, operators.scaled, evaluator, most, audit).spectrum
        err_fd = self._calibrate(operators.plain, plain, shorten=not hessian.in_16_bits)
        err_batch = self._batch_error(plain.largest, search.earlier)
        step = self._calls - 1 if isinstance(pending.made, int) else pending.made
        flags: dict[str, Tensor | bool] = {
            "unconverged": ~self._is_converged(plain.largest, plain.unseen) & plain.largest.isfinite(),
            "cold": cold,
            "audit": audit,
            "locked": search.locked,
        }
        directional = secant(pending, hessian).value if self._directional else math.nan
        edge_ratio = operators.edge_ratio(plain, scaled)
        reading = make_reading(plain, err_fd, err_batch, edge_ratio, hessian, step, **flags)
        return replace(reading, directional=directional)

    def _leaves_out(self, reading: SharpnessReading, pending: PendingStep, evaluator: LossEvaluator) -> bool:
        """Return whether double backward, unlike differences, leaves out a part; waits for the device.

        So does a backward pass that keeps no graph, as of a kernel outside torch. Differences along the Ritz
        vector then agree with each other but not with the value. Kinks make them differ between steps.
        """
        vector = self._vectors[0]
        if self._method != "auto" or reading.method != "autograd" or vector is None:
            return False
        hessian = Hessian(evaluator, "difference", pending.sign)
        operator = step_operators(pending, hessian).plain
        # rounding to 16 bits asks for longer steps
        first = 4.0 if hessian.in_16_bits else 1.0
        found = torch.stack([operator.quotient(vector, times * first) for times in (1.0, 2.0, 4.0)])
        missed = (found - reading.value).abs().min()
        spread = found.max() - found.min()
        return bool((missed > _MISSED * found.abs().max()) & (spread < _MISSED * missed))

    def _is_converged(self, largest: Tensor, unseen: Tensor) -> Tensor:
        return unseen <= self._tolerance * largest.abs()

    def _planned(self) -> int:
        """Return the most products of a search: what recent readings on the host would have needed."""
        known = [(n, copy.reading()) for n, copy in self._recent if copy.is_ready()]
        if self._looks or self._together or not known:
            return self._most
        return min(max(self._needed(*pair) for pair in known), self._most)

    def _needed(self, products: int, reading: SharpnessReading) -> int:
        """Return the products that a reading asks for, in the light of its bound."""
        # of a copy on the host, so that nothing waits
        found = reading.asdict()
        share = found["err_krylov"] / (self._tolerance * abs(found["value"]) or 1.0)
        if not share <= 1.0:
            return products + _MORE
        # the bound falls to about a half with each product; two more are for batches that need them
        spare = int(-math.log2(share)) if share > 0.0 else products
        return max(products - max(spare - _MORE, 0), self._steps)

    def _is_warm(self, evaluator: LossEvaluator) -> bool:
        """Return whether the previous Ritz vector fits the parameters; forget both vectors if not."""
        vector = self._vectors[0]
        vectors = evaluator.vectors
        known = (self._length, vectors.dtype)
        fits = vector is not None and (vectors.length, vector.dtype) == known
        self._length = vectors.length
        if not fits:
            self._vectors = [None, None]
        return fits

    def _search(
        self, which: int, operator: Operator, evaluator: LossEvaluator, most: int, audit: bool
    ) -> _Search:
        """Search for the largest eigenvalue, and keep its vector for the next search."""
        vectors, old = evaluator.vectors, self._vectors[which]
        noise = self._noise(evaluator)
        earlier: Tensor | None = None
        locked: Tensor | bool = False
        if old is None:
            spectrum = self._lanczos(operator, evaluator, noise, most, 1.0)
        else:
            moved, earlier = operator.image(old)
            start = moved + _ADMIXTURE * noise
            spectrum = self._lanczos(operator, evaluator, start, most, _ADMIXTURE / vectors.norm(start))
        if audit and old is not None:
            cold = self._lanczos(operator, evaluator, self._noise(evaluator), most, 1.0)
            margin = torch.maximum(spectrum.residual, self._tolerance * spectrum.largest.abs())
            locked = cold.largest > spectrum.largest + margin
            spectrum = _larger(cold, spectrum)
        fine = spectrum.largest.isfinite()
        kept = torch.zeros_like(spectrum.vector) if old is None else old
        # after a non-finite batch the next start is the old vector, or noise alone
        self._vectors[which] = torch.where(fine, spectrum.vector, kept)
        return _Search(spectrum, earlier, locked)

    def _noise(self, evaluator: LossEvaluator) -> Tensor:
        """Return a random unit vector."""
        noise = random_vector(evaluator, self._generator)
        return noise / evaluator.vectors.norm(noise)

    def _lanczos(
        self, operator: Operator, evaluator: LossEvaluator, start: Tensor, most: int, share: Tensor | float
    ) -> Spectrum:
        """Search from a start of which noise is a share."""
        overlap = share * random_overlap(evaluator.vectors.length)

        def enough(largest: Tensor, unseen: Tensor) -> bool:
            # ranks must agree, also where they round differently
            both = torch.stack([largest, unseen])
            evaluator.share(both)
            return bool(self._is_converged(both[0], both[1]))

        looks = enough if self._looks else None
        return lanczos(operator, start, most, overlap=overlap, least=self._steps, enough=looks)

    def _calibrate(self, operator: Operator, spectrum: Spectrum, shorten: bool) -> Tensor:
        """Return the error of finite differences, and shorten the next step if it is too large."""
        error = operator.difference_error(spectrum) / spectrum.largest.abs()
        error = torch.where(spectrum.largest == 0.0, 0.0, error)
        fine = error.isfinite()
        old = error if self._relative_error is None else self._relative_error
        self._relative_error = torch.where(fine, error, old)
        stretch = torch.where(fine & (error > 1e-2), 0.5 if shorten else 1.0, 1.0) * self._stretch
        self._stretch = stretch.clamp(min=2.0**-4)
        return self._relative_error * spectrum.largest.abs()

    def _batch_error(self, largest: Tensor, earlier: Tensor | None) -> Tensor:
        """Return the smoothed excess over the quotient of the previous vector; NaN without one."""
        if earlier is None:
            return torch.full_like(largest, torch.nan)
        gap = (largest - earlier).clamp(min=0.0)
        old = gap if self._gap is None else self._gap
        smooth = torch.where(old.isfinite(), _MEMORY * old + (1.0 - _MEMORY) * gap, gap)
        self._gap = torch.where(gap.isfinite(), smooth, old)
        return self._gap


class _Search(NamedTuple):
    """Result of a search.

    Attributes:
        spectrum: Both ends of the spectrum.
        earlier: Rayleigh quotient of the previous vector, or None without one.
        locked: Whether the warm start had locked on to a smaller eigenvalue.
    """

    spectrum: Spectrum
    earlier: Tensor | None
    locked: Tensor | bool


def _larger(a: Spectrum, b: Spectrum) -> Spectrum:
    """Return the spectrum with the larger top: Ritz values never exceed the largest eigenvalue."""
    better = a.largest > b.largest
    return Spectrum(
        largest=torch.where(better, a.largest, b.largest),
        smallest=torch.minimum(a.smallest, b.smallest),
        residual=torch.where(better, a.residual, b.residual),
        unseen=torch.where(better, a.unseen, b.unseen),
        asymmetry=torch.where(better, a.asymmetry, b.asymmetry),
        vector=torch.where(better, a.vector, b.vector),
    )


class _Copy:
    """Copies the tensors of a reading to the host in one transfer, without waiting for it."""

    def __init__(self, reading: SharpnessReading) -> None:
        self._reading = reading
        self._fields = [f.name for f in fields(reading) if isinstance(getattr(reading, f.name), Tensor)]
        self._flags = [name for name, held in reading.flags.tensors.items() if isinstance(held, Tensor)]
        tensors = [getattr(reading, name) for name in self._fields]
        tensors += [reading.flags.tensors[name] for name in self._flags]
        packed = torch.stack([t.to(torch.float64) for t in tensors])
        self._event: Any = None
        if packed.is_cuda:
            pinned = torch.empty(packed.shape, dtype=packed.dtype, device="cpu", pin_memory=True)
            packed = pinned.copy_(packed, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()
        self._packed = packed

    def is_ready(self) -> bool:
        """Return whether the copy is complete."""
        return self._event is None or bool(self._event.query())

    def reading(self) -> SharpnessReading:
        """Return the reading with CPU tensors."""
        numbers = self._packed.unbind()
        values: dict[str, Any] = dict(zip(self._fields, numbers, strict=False))
        if "step" in values:
            values["step"] = values["step"].to(torch.int64)
        flags = dict(self._reading.flags.tensors)
        for name, number in zip(self._flags, numbers[len(self._fields) :], strict=True):
            flags[name] = number.bool()
        return replace(self._reading, **values, flags=Flags(flags))


class _Clock:
    """Times measurements and the training between them, in seconds, without waiting for the device.

    Attributes:
        spent: Time of all measurements.
        last: Time of the last one.
        trained: Time between calls, without the measurements.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self.spent = self.last = self.trained = 0.0
        self._training_since: Any = None
        self._begun: Any = None
        # whether an interval is a measurement, its begin and its end
        self._intervals: deque[tuple[bool, Any, Any]] = deque()

    def call(self) -> None:
        """Record a call of ``measure``: the time since the last call, or since its end, was training."""
        now = self._mark()
        if self._training_since is not None:
            self._intervals.append((False, self._training_since, now))
        self._training_since = now
        self._collect()

    def begin(self) -> None:
        """Record the beginning of a measurement."""
        self._begun = self._mark()

    def end(self) -> None:
        """Record the end of a measurement."""
        self._training_since = self._mark()
        self._intervals.append((True, self._begun, self._training_since))
        self._collect()

    def _mark(self) -> Any:
        """Return the present time: an event of the device, or seconds on the host."""
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _collect(self) -> None:
        """Add up the intervals whose end the device has reached."""
        while self._intervals and (not self._cuda or self._intervals[0][2].query()):
            is_measurement, begin, end = self._intervals.popleft()
            seconds = begin.elapsed_time(end) / 1e3 if self._cuda else end - begin
            if is_measurement:
                self.last = seconds
                self.spent += seconds
            else:
                self.trained += seconds
