# SPDX-License-Identifier: Apache-2.0
"""What kernels with intervals are given, from the definition: a reading that shares nothing with
`fa4_jax._intervals`.

Ranges are as narrow as they may be, so that whatever a kernel leaves out shows.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from fa4_jax._variants import Variant

ROWS, BLOCK = 128, 64


@dataclasses.dataclass(frozen=True)
class Intervals:
    """Arrays of `fa4_jax._variants.signature`, by their names there."""

    kv_start: np.ndarray
    """[B, R]"""
    kv_end: np.ndarray
    """[B, R]"""
    key_range: np.ndarray
    """[B, M, 4]"""
    query_range: np.ndarray
    """[B, J, 4]"""

    @classmethod
    def of(cls, seen: np.ndarray, broken: tuple[tuple[int, int], ...] = ()) -> Intervals:
        """Of `seen` [B, T, S], whose rows are runs. `broken`: (batch, row) pairs."""
        seen, of_queries = np.array(seen), np.array(seen)
        for batch, row in broken:
            seen[batch, row] = True  # its NaN has to meet every key
            of_queries[batch, row] = False  # and is its own, whatever is visited for it
        batch, seqlen_q, seqlen_k = seen.shape
        start, end = seen.argmax(-1), seqlen_k - seen[:, :, ::-1].argmax(-1)
        empty = ~seen.any(-1)
        assert ((end - start == seen.sum(-1)) | empty).all(), "a row isn't one run of keys"
        # Any empty interval is none, wherever it lies.
        somewhere = np.arange(seqlen_q) % (seqlen_k + 1)
        start, end = np.where(empty, somewhere, start), np.where(empty, somewhere, end)
        kv_start = np.where(np.isin(np.arange(start.size), _flat(broken, seqlen_q)), -1, start.flat)
        padding = ((0, 0), (0, -seqlen_q % ROWS))
        return cls(
            np.pad(kv_start.reshape(start.shape), padding).astype(np.int32),
            np.pad(end, padding).astype(np.int32),
            np.stack([_key_range(of_queries[b], start[b], end[b]) for b in range(batch)]),
            np.stack([_query_range(seen[b]) for b in range(batch)]),
        )

    def operands(self, variant: Variant) -> tuple[np.ndarray, ...]:
        """Those that the row takes, in its order; none for a row without intervals."""
        names = [buffer.name for buffer in variant.signature.operands]
        return tuple(getattr(self, name) for name in names if hasattr(self, name))


def _flat(broken: tuple[tuple[int, int], ...], seqlen_q: int) -> list[int]:
    return [batch * seqlen_q + row for batch, row in broken]


def _key_range(seen: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """[M, 4]: smallest start and largest end of the rows that see something; largest start and
    smallest end of all."""
    ranges = []
    for first in range(0, len(seen), BLOCK):
        block = slice(first, first + BLOCK)
        some = seen[block].any(-1)
        low = start[block][some].min(initial=seen.shape[1])
        high = end[block][some].max(initial=0)
        ranges.append([low, high, start[block].max(), end[block].min()])
    return np.array(ranges, np.int32)


def _query_range(seen: np.ndarray) -> np.ndarray:
    """[J, 4]: blocks of queries around all that see one of a block's keys, and the longest run of
    such as see all of them."""
    seqlen_q, seqlen_k = seen.shape
    starts = range(0, seqlen_q, BLOCK)
    past = len(starts) * BLOCK
    ranges = []
    for first in range(0, seqlen_k, BLOCK):
        keys = seen[:, first : first + BLOCK]
        some = [i for i in starts if keys[i : i + BLOCK].any()]
        begin, end = (some[0], some[-1] + BLOCK) if some else (past, 0)
        ranges.append([begin, end, *_longest_run([keys[i : i + BLOCK].all() for i in starts])])
    return np.array(ranges, np.int32)


def _longest_run(full: list) -> tuple[int, int]:
    """[first, end) in queries, of blocks that are; (past all of them, 0) if none is."""
    best, begin = (len(full), 0), 0
    for i, is_full in enumerate([*full, False]):
        if not is_full:
            if i > begin and i - begin > best[1] - best[0]:
                best = begin, i
            begin = i + 1
    return best[0] * BLOCK, best[1] * BLOCK
