"""Rows cut into chunks, the units of work that threads and blocks share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .structs import STRUCTS

# elements of one chunk: a hundred kilobytes or so of each stream, and enough chunks to share among threads
CHUNK = 1 << 15
# elements of a channel that are summed at a time
PIECE = 1 << 11
# bytes of a tile of a parameter, which a block of the update takes: blocks that run together then read and
# write memory that lies together
TILE_BYTES = 1 << 13
# bytes of a parameter that a thread takes at a time, and the fewest and the most threads of a block that
# takes a chunk: one that waits for memory should not keep places from others
VECTOR_BYTES, WARP, BLOCK_THREADS = 16, 32, 128
# elements that fill vectors of every kind, so that a chunk of whole channels ends where vectors do if it can
_ALIGNED = 16


def threads_for(chunk_bytes: int) -> int:
    """Return the threads of a block for chunks of at most so many bytes of a parameter."""
    warps = -(-chunk_bytes // (VECTOR_BYTES * WARP))
    return WARP * min(max(warps, 1), BLOCK_THREADS // WARP)


def chunks(sizes: Sequence[int] | np.ndarray, channel_sizes: Sequence[int] | np.ndarray) -> np.ndarray:
    """Return the column Chunk: rows cut into pieces, in order.

    Args:
        sizes: Elements of each row.
        channel_sizes: Elements of each channel of a row. Channels of up to ``CHUNK`` elements are not cut,
            others are cut every ``CHUNK`` elements.
    """
    size, channel = np.asarray(sizes, np.int64), np.asarray(channel_sizes, np.int64)
    if ((size == channel) & (size > 0) & (size <= CHUNK)).all():
        # the usual case at a usual cost
        column = np.zeros(len(size), STRUCTS["Chunk"])
        column["row"], column["count"] = np.arange(len(size)), size
        return column
    channel = np.maximum(channel, 1)
    whole = np.maximum(CHUNK // channel, 1)
    grain = _ALIGNED // np.gcd(channel, _ALIGNED)
    whole = np.where(whole >= grain, whole - whole % grain, whole)
    # what is cut together, and the chunks of it
    span = np.where(channel > CHUNK, channel, whole * channel)
    each = -(-span // CHUNK)
    counts = size // span * each + -(-(size % span) // CHUNK)
    row = np.repeat(np.arange(len(size)), counts)
    index = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    begin = index // each[row] * span[row]
    column = np.zeros(len(row), STRUCTS["Chunk"])
    column["row"], column["offset"] = row, begin + index % each[row] * CHUNK
    column["count"] = np.minimum(np.minimum(begin + span[row], size[row]) - column["offset"], CHUNK)
    return column
