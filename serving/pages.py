"""Token ids as bytes, a page at a time: what the prefix tree slices, hashes and compares.

A prompt becomes one `bytes` object of little-endian int32 ids. Slices of it are the keys of children and
`bytes.startswith` compares whole spans, so nothing in the tree looks at single tokens.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np

TOKEN = np.dtype("<i4")
TOKEN_BYTES = TOKEN.itemsize


class Pages(bytes):
    """Whole pages that have been encoded already: what is asked for several times is encoded once."""


def encode(token_ids: Sequence[int] | np.ndarray | Any, page_size: int) -> bytes:
    """The whole pages of `token_ids`; tokens of an unfinished last page are left out.

    Args:
        token_ids: one-dimensional integers in [0, 2^31): a list, an array, or a tensor in CPU memory. `Pages` of this
            page size are returned as they are.
        page_size: tokens a page.
    Raises:
        ValueError: other shapes, other numbers.
    """
    if isinstance(token_ids, Pages):
        return token_ids
    ids = _as_array(token_ids)
    if ids.size == 0:
        return b""
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise ValueError(f"got token ids of shape {ids.shape} and type {ids.dtype}; accepted: one row of integers")
    whole = len(ids) - len(ids) % page_size
    if int(ids.min()) < 0 or int(ids.max()) >= 2**31:
        raise ValueError(f"got token ids from {ids.min()} to {ids.max()}; accepted: 0 to {2**31 - 1}")
    return ids[:whole].astype(TOKEN, copy=False).tobytes()


def _as_array(token_ids: Sequence[int] | np.ndarray | Any) -> np.ndarray:
    if isinstance(token_ids, list | tuple) and token_ids:
        try:
            return np.frombuffer(array("i", token_ids), np.intc)  # twice as fast as numpy with a list
        except (TypeError, OverflowError):
            pass  # said better below
    return np.asarray(token_ids)


def common_pages(left: bytes, right: bytes, at: int, page_bytes: int) -> int:
    """How many whole pages at the beginning of `left` equal those of `right` from byte `at` on."""
    count = min(len(left), len(right) - at) // page_bytes
    shape = (count, page_bytes)
    a = np.frombuffer(left, np.uint8, count * page_bytes).reshape(shape)
    b = np.frombuffer(right, np.uint8, count * page_bytes, at).reshape(shape)
    differing = np.flatnonzero((a != b).any(1))
    return int(differing[0]) if len(differing) else count
