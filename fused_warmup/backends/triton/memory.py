"""Loads and stores of the kernels: structs of ``csrc/table.h`` as named tuples, blocks of tensors as numbers.

Offsets come from the numpy dtypes of ``plan/structs.py``; storage types are those of ``csrc/dtypes.h``.
"""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import torch
import triton
import triton.language as tl

from ...plan.structs import DTYPES, STRUCTS

# a constexpr, so that the layout is part of the key in the cache of compiled kernels
LAYOUT = tl.constexpr({
    name: (dtype.itemsize, [(field, at[1], at[0].str[1:]) for field, at in (dtype.fields or {}).items()])
    for name, dtype in STRUCTS.items()
})
BFLOAT16 = tl.constexpr(DTYPES[torch.bfloat16])
# bytes of the widest access of a thread
VECTOR = tl.constexpr(16)

# addresses are signed integers in address arithmetic
_FIELD_TYPES = {"u8": tl.int64, "i8": tl.int64, "i4": tl.int32, "f8": tl.float64}
# bfloat16 is moved and rounded as an integer, because the interpreter has no correct rounding to it
_STORAGE = {
    DTYPES[torch.float32]: tl.float32,
    DTYPES[torch.float64]: tl.float64,
    DTYPES[torch.bfloat16]: tl.uint16,
    DTYPES[torch.float16]: tl.float16,
}


def _struct(name: str) -> Any:
    """Return the named tuple of a struct.

    An instance is made from another one and the fields that differ, or from fields alone; the others are 0.
    """
    base: Any = namedtuple(name, STRUCTS[name].names or ())  # type: ignore[misc]

    def new(cls: Any, *values: Any, **fields: Any) -> Any:
        if len(values) == 1:
            fields = {**{field: getattr(values[0], field) for field in cls._fields}, **fields}
        elif values:
            fields = dict(zip(cls._fields, values, strict=True))
        return base.__new__(cls, *(fields.get(field, 0) for field in cls._fields))

    return type(name, (base,), {"__new__": new})


Row = _struct("Row")
Spread = _struct("Spread")
Chunk = _struct("Chunk")
Hyper = _struct("Hyper")
Segment = _struct("Segment")
Rates = _struct("Rates")
Scalars = _struct("Scalars")
LayerProjection = _struct("LayerProjection")
Sphere = _struct("Sphere")
Partial = _struct("Partial")
Counters = _struct("Counters")
RowCounters = _struct("RowCounters")
PendingScalars = _struct("PendingScalars")
Telemetry = _struct("Telemetry")
StepDecision = _struct("StepDecision")
Step = _struct("Step")
TensorSlice = _struct("TensorSlice")
VectorOp = _struct("VectorOp")
PreconditionerOp = _struct("PreconditionerOp")


# kernels name a struct by a string: not all supported versions take a class as an argument
_CLASSES = {
    struct.__name__: struct
    for struct in (
        Row, Spread, Chunk, Hyper, Segment, Rates, Scalars, LayerProjection, Sphere, Partial, Counters,
        RowCounters, PendingScalars, Telemetry, StepDecision, Step, TensorSlice, VectorOp, PreconditionerOp,
    )
}  # fmt: skip


@triton.constexpr_function
def class_of(struct: str) -> Any:
    """Named tuple of a struct."""
    return _CLASSES[struct]


@triton.constexpr_function
def size_of(layout: Any, struct: str) -> int:
    """Size of a struct in bytes."""
    return int(layout[struct][0])


@triton.constexpr_function
def n_fields(layout: Any, struct: str) -> int:
    """Number of the fields of a struct."""
    return len(layout[struct][1])


@triton.constexpr_function
def offset_of(layout: Any, struct: str, i: int) -> int:
    """Offset of a field in its struct."""
    return int(layout[struct][1][i][1])


@triton.constexpr_function
def pointer_of(layout: Any, struct: str, i: int) -> Any:
    """Type of a pointer to a field."""
    return tl.pointer_type(_FIELD_TYPES[layout[struct][1][i][2]])


@triton.constexpr_function
def storage(dtype: int) -> Any:
    """Type in memory of elements of a code of enum DType."""
    return _STORAGE[dtype]


@triton.constexpr_function
def item_size(dtype: int) -> int:
    """Size of an element in bytes."""
    return int(_STORAGE[dtype].primitive_bitwidth // 8)


@triton.constexpr_function
def arithmetic(dtype: int) -> Any:
    """Type of the arithmetic for parameters of a dtype code."""
    return tl.float64 if dtype == DTYPES[torch.float64] else tl.float32


@triton.constexpr_function
def average_dtype(dtype: int) -> int:
    """Dtype code of the averages of parameters of a dtype code."""
    return DTYPES[torch.float64 if dtype == DTYPES[torch.float64] else torch.float32]


@triton.constexpr_function
def position(layout: Any, struct: str, name: str) -> int:
    """Index of a field in its struct."""
    return [field for field, _, _ in layout[struct][1]].index(name)


@triton.jit
def field(column, index, STRUCT: tl.constexpr, NAME: tl.constexpr):
    """Pointer to a field of struct number ``index`` in a column."""
    place = column + index * size_of(LAYOUT, STRUCT)
    i: tl.constexpr = position(LAYOUT, STRUCT, NAME)
    return (place + offset_of(LAYOUT, STRUCT, i)).to(pointer_of(LAYOUT, STRUCT, i))


@triton.jit
def load_struct(column, index, STRUCT: tl.constexpr, mask=None):
    """Load a struct from a column, or a block of structs with zeros where the mask is off."""
    place = column + index * size_of(LAYOUT, STRUCT)
    fields = ()
    for i in tl.static_range(n_fields(LAYOUT, STRUCT)):
        pointer = (place + offset_of(LAYOUT, STRUCT, i)).to(pointer_of(LAYOUT, STRUCT, i))
        fields = fields + (tl.load(pointer, mask=mask, other=None if mask is None else 0),)
    return class_of(STRUCT)(*fields)


@triton.jit
def store_struct(column, index, value, STRUCT: tl.constexpr, mask=None):
    """Write a struct to a column, or a block of structs."""
    place = column + index * size_of(LAYOUT, STRUCT)
    for i in tl.static_range(n_fields(LAYOUT, STRUCT)):
        pointer = (place + offset_of(LAYOUT, STRUCT, i)).to(pointer_of(LAYOUT, STRUCT, i))
        tl.store(pointer, tl.cast(value[i], pointer.dtype.element_ty), mask=mask)


@triton.jit
def pointers(address, lanes, TYPE: tl.constexpr, WHOLE: tl.constexpr):
    """Pointers to a block; a whole block promises alignment, without which accesses are not vectorised."""
    pointer = address.to(tl.pointer_type(TYPE))
    if WHOLE:
        pointer = tl.multiple_of(pointer, VECTOR)
    return pointer + lanes


@triton.jit
def load_stored(address, places, mask, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Load elements at any places of a tensor; without a mask all of them, else zeros where it is off."""
    pointer = pointers(address, places, TYPE, ALIGNED)
    return tl.load(pointer, mask=mask, other=None if mask is None else 0)


@triton.jit
def store_stored(address, places, mask, value, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Write stored values to any places of a tensor, see ``load_stored``."""
    tl.store(pointers(address, places, TYPE, ALIGNED), value, mask=mask)


@triton.jit
def load_tile(address, places, mask, DTYPE: tl.constexpr, C: tl.constexpr, ALIGNED: tl.constexpr):
    """Load elements in the type of the arithmetic, see ``load_stored``."""
    return widen(load_stored(address, places, mask, storage(DTYPE), ALIGNED), DTYPE).to(C)


@triton.jit
def store_tile(address, places, mask, value, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Write a tile of stored values to a tensor."""
    store_stored(address, places, mask, value, storage(DTYPE), ALIGNED)


@triton.jit
def load_block(address, lanes, mask, DTYPE: tl.constexpr, C: tl.constexpr, WHOLE: tl.constexpr):
    """Load a block of a tensor in the type of the arithmetic; all of it if it is whole."""
    return load_tile(address, lanes, None if WHOLE else mask, DTYPE, C, WHOLE)


@triton.jit
def store_block(address, lanes, mask, value, DTYPE: tl.constexpr, WHOLE: tl.constexpr):
    """Write a block of stored values to a tensor."""
    store_tile(address, lanes, None if WHOLE else mask, value, DTYPE, WHOLE)


@triton.jit
def widen(stored, DTYPE: tl.constexpr):
    """Convert stored elements to numbers."""
    if DTYPE == BFLOAT16:
        return (stored.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return stored


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """Round numbers to the storage type, ties to even."""
    if DTYPE == BFLOAT16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(x == x, rounded, 0x7FC0).to(tl.uint16)
    else:
        return x.to(storage(DTYPE))


@triton.jit
def as_mask(condition):
    """Condition of a scalar for a mask, where the interpreter of Triton 3.9.0 would take it for a number."""
    return tl.full((), True, tl.int1) & condition


@triton.jit
def grad_of(step, row):
    """Pointers to the gradient addresses of rows."""
    return (step.grads + row * 8).to(tl.pointer_type(tl.int64))


@triton.jit
def scalars_of(s, C: tl.constexpr):
    """Round the scalars of one row to the type of the arithmetic."""
    rounded = ()
    for i in tl.static_range(len(s)):
        rounded = rounded + (s[i].to(C),)
    return Scalars(*rounded)


@triton.jit
def arrives_last(finished):
    """True for the last program to finish, which sees the writes of all others."""
    tl.debug_barrier()
    arrived = tl.atomic_add(finished, 1)
    return arrived == tl.num_programs(0) - 1
