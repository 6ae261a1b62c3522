"""Records made by hand, for tests of what is done with records."""

from __future__ import annotations

from typing import Any

from tenure.eval import Record

VALUES: dict[str, Any] = {
    "task": "vt", "length": 256, "index": 0, "seed": 0, "depth": 0.5, "policy": "knorm", "scope": "head", "budget": 0.2,
    "correct": True, "answer": "12345", "prediction": "12345", "kl": 0.25, "top1": 0.5, "entries": 100,
    "bytes": 2_000_000, "kept_share": 0.2, "seconds": 1.0, "compress_seconds": 0.25, "read_seconds": 0.75,
    "score": 1.0, "aware": False,
}  # fmt: skip


def made(**values: Any) -> Record:
    """A record with these values; `correct` follows from the score."""
    found = VALUES | values
    return Record(**found | {"correct": found["score"] == 1.0})
