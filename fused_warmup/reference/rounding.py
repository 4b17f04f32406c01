"""Rounding of 16-bit parameters and states, and residues; the statements of ``csrc/rounding.h``.

A mode is two functions around an update: ``load`` returns the value of a parameter, float32, and ``store``
rounds an updated value. ``"nearest"`` and ``"stochastic"`` keep nothing besides the parameter; ``"kahan"``
keeps a bfloat16 compensation, ``"split"`` what the upper 16 bits of the value lack, ``"master"`` the value.
States of 16 bits are rounded stochastically.

Stochastic rounding: Gupta et al. 2015, arXiv:1502.02551. Compensation: Kahan 1965; for bfloat16 training
Zamirai et al. 2020, arXiv:2010.06192. Random bits: Philox, Salmon et al. 2011.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# in the order of enum Rounding
MODES = ("nearest", "stochastic", "kahan", "split", "master")
# The state that a mode keeps for each parameter, and its dtype. A remainder is an int16 in the memory of a
# bfloat16: no backend of torch.distributed gathers int16, and torch casts states to the dtype of parameters.
RESIDUES = {
    "kahan": ("kahan_comp", torch.bfloat16),
    "split": ("remainder", torch.bfloat16),
    "master": ("master_param", torch.float32),
}
MODE_OF_RESIDUE = {name: mode for mode, (name, _) in RESIDUES.items()}
SIXTEEN_BITS = (torch.bfloat16, torch.float16)
# of the states beside parameters of no more bits than 32; those of bfloat16 are rounded stochastically
STATE_DTYPES = (torch.float32, torch.bfloat16)
# the passes of a step that round: the update, its states one by one, and the return to a sphere
UPDATE_PASS, STATE_PASSES, SPHERE_PASS = 0, (1, 2, 3), 8
# of the second word of a counter; the bits below are those of the element
_PASS_BIT = 28

# 7 rounds pass all tests of BigCrush; 10 are the usual choice where bits are kept secret or tested further
ROUNDS = 7
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def philox(counter: Tensor, key: tuple[int, int], rounds: int = ROUNDS) -> Tensor:
    """Return the output of Philox4x32.

    Args:
        counter: Four words, int64 of ``[4, n]``, each in [0, 2**32).
        key: Two words.
        rounds: Number of rounds.

    Returns:
        Four words, int64 of ``[4, n]``.
    """
    a, b, c, d = counter
    for i in range(rounds):
        k, m = ((word + i * step) % 2**32 for word, step in zip(key, _WEYL, strict=True))
        # products wrap at 2**64, which leaves their words as they are
        first, second = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b, c, d = (second >> 32 & _LOW) ^ b ^ k, second & _LOW, (first >> 32 & _LOW) ^ d ^ m, first & _LOW
    return torch.stack([a, b, c, d])


def random_bits(elements: Tensor, seed: int, number: int, step: int, stage: int) -> Tensor:
    """Return 16 random bits for each element of a parameter, int32.

    Args:
        elements: Numbers of the elements in the whole tensor, int64.
        seed: Seed, below 2**64.
        number: Position of the parameter among all of the optimizer.
        step: Updates that the optimizer has made.
        stage: ``UPDATE_PASS``, one of ``STATE_PASSES`` or ``SPHERE_PASS``.
    """
    # eight elements share the four words of one counter
    blocks, places = torch.unique(elements >> 3, return_inverse=True)
    counter = torch.stack([
        blocks & _LOW,
        blocks >> 32 | stage << _PASS_BIT,
        torch.full_like(blocks, number),
        torch.full_like(blocks, step % 2**32),
    ])
    words = philox(counter, (seed % 2**32, seed >> 32))
    chosen = words[(elements & 7) >> 1, places]
    return (chosen >> 16 * (elements & 1) & 0xFFFF).to(torch.int32)


@dataclass(frozen=True)
class Rounding:
    """Rounding of one parameter at one step.

    Attributes:
        mode: One of ``MODES``.
        seed: Seed of the random bits.
        number: Position of the parameter.
        step: Updates that the optimizer has made.
        elements: Numbers of its elements in the whole tensor, int64 of ``[numel]`` in the order of memory;
            None for bits that are 0.
        stage: The pass that rounds.
    """

    mode: str
    seed: int = 0
    number: int = 0
    step: int = 0
    elements: Tensor | None = None
    stage: int = UPDATE_PASS

    def bits(self, like: Tensor) -> Tensor:
        """Return the random bits of all elements, int32 in the shape and on the device of a tensor."""
        if self.elements is None:
            return torch.zeros_like(like, dtype=torch.int32)
        drawn = random_bits(self.elements, self.seed, self.number, self.step, self.stage)
        bits = torch.empty_like(like, dtype=torch.int32)
        in_memory(bits).copy_(drawn)
        return bits


def in_memory(tensor: Tensor) -> Tensor:
    """Return the elements of a dense tensor in the order of memory, a view."""
    return tensor.as_strided((tensor.numel(),), (1,))


def mode_for(mode: str, dtype: torch.dtype) -> str:
    """Return the mode of a parameter in a group: dtypes of more than 16 bits are rounded as ever."""
    return mode if dtype in SIXTEEN_BITS else "nearest"


def load(mode: str, param: Tensor, residue: Tensor | None) -> Tensor:
    """Return the value of a 16-bit parameter, float32.

    A parameter that was written from outside since the last step has its new value, a compensated or split
    one to half of its last digit: what would round to another parameter is not used.

    Args:
        mode: One of ``MODES``.
        param: bfloat16 or float16.
        residue: The state of the mode, of the same shape; None if it keeps none.
    """
    plain = param.to(torch.float32)
    if mode not in RESIDUES:
        return plain
    assert residue is not None
    if mode == "split":
        # nothing rounds to 0 from below
        remainder = residue.view(torch.int16)
        own = torch.where((plain == 0.0) & (remainder < 0), 0, remainder.to(torch.int32))
        return (plain.view(torch.int32) + own).view(torch.float32)
    value = residue if mode == "master" else plain + residue.to(torch.float32)
    return torch.where(value.to(param.dtype) == param, value, plain)


def store(value: Tensor, dtype: torch.dtype, rounding: Rounding) -> tuple[Tensor, Tensor | None]:
    """Return a value rounded to a 16-bit dtype, and the residue of the mode or None.

    Args:
        value: float32.
        dtype: bfloat16 or float16.
        rounding: Mode and random bits.
    """
    mode = rounding.mode
    if mode == "stochastic":
        return round_stochastically(value, dtype, rounding.bits(value)), None
    if mode == "split":
        return split(value)
    param = value.to(dtype)
    if mode == "kahan":
        return param, compensation(value, param, rounding.bits(value))
    return param, value.clone() if mode == "master" else None


def compensation(value: Tensor, param: Tensor, bits: Tensor) -> Tensor:
    """Return what a rounded parameter lacks of its value, bfloat16.

    It is rounded stochastically, so that updates below its own last digit are not lost either, unless the sum
    would round to another parameter.
    """
    plain = param.to(torch.float32)
    lacking = torch.where(plain.isfinite(), value - plain, 0.0)
    rounded = round_stochastically(lacking, torch.bfloat16, bits)
    fits = (plain + rounded.to(torch.float32)).to(param.dtype) == param
    return torch.where(fits, rounded, round_stochastically(lacking, torch.bfloat16, torch.zeros_like(bits)))


def split(value: Tensor) -> tuple[Tensor, Tensor]:
    """Return the bfloat16 nearest to a float32, halves away from 0, and the 16 bits that it lacks."""
    bits = value.view(torch.int32)
    param = ((bits + 0x8000) >> 16).to(torch.int16)
    remainder = (bits - (param.to(torch.int32) << 16)).to(torch.int16)
    param = torch.where(value.isnan(), torch.tensor(0x7FC0, dtype=torch.int16, device=value.device), param)
    remainder = torch.where(value.isnan(), 0, remainder)
    return param.view(torch.bfloat16), remainder.view(torch.bfloat16)


def round_stochastically(value: Tensor, dtype: torch.dtype, bits: Tensor) -> Tensor:
    """Return float32 numbers rounded up in magnitude with the probability of the fraction that is dropped.

    Beyond the largest finite number the result is the nearest one. Below the smallest normal float16 the
    probability is resolved to 2**-16.

    Args:
        value: float32.
        dtype: bfloat16 or float16.
        bits: 16 random bits per element, int32.
    """
    pattern = value.view(torch.int32)
    sign, magnitude = pattern & ~0x7FFFFFFF, pattern & 0x7FFFFFFF
    if dtype == torch.bfloat16:
        rounded = (sign | ((magnitude + bits) & ~0xFFFF)).view(torch.float32)
        largest = 0x7F7F0000
    else:
        normal = (magnitude + (bits & 0x1FFF)) & ~0x1FFF
        # in units of 2**-40, of which the smallest float16 has 2**16
        units = (magnitude.view(torch.float32) * 2.0**40).clamp(max=2.0**27).to(torch.int32)
        small = (((units + bits) >> 16).to(torch.float32) * 2.0**-24).view(torch.int32)
        rounded = (sign | torch.where(magnitude < 0x38800000, small, normal)).view(torch.float32)
        largest = 0x477FE000
    return torch.where(magnitude < largest, rounded.to(dtype), value.to(dtype))
