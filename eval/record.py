"""What is noted of a cell on a case."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Record:
    """What one cell did on one case.

    Attributes:
        task, length, index, seed, depth: the case.
        policy, scope, budget: the cell, its options and chunks with the policy (`Cell.name`).
        correct: the greedy generation contains the answer, or all of them.
        answer, prediction: what was hidden and what was generated.
        kl: KL to the full cache in nats, the mean over all positions of question and gold answer; of a question-aware
            cell over those of the answer, since the question is read before anything is evicted.
        top1: share of these positions where both have the same most likely token.
        entries: cache entries after compression, all layers and heads.
        bytes: bytes allocated for them. With a retention cell among the compared, every cell's entries carry the
            gates' 4 bytes, since they come from one prompt.
        kept_share: entries as a share of the full cache's.
        seconds: `compress_seconds + read_seconds`, the same work for every cell without chunks.
        compress_seconds: scoring, choosing and moving what stays; of a context read in chunks, reading it too.
        read_seconds: forwards over the question and the gold answer; of cells that were asked together, a cell's part.
        score: how right the generation is, in [0, 1]: the share of the answers it contains.
        aware: whether the question was read before the compression.
    """

    task: str
    length: int
    index: int
    seed: int
    depth: float
    policy: str
    scope: str
    budget: float | int
    correct: bool
    answer: str
    prediction: str
    kl: float
    top1: float
    entries: int
    bytes: int
    kept_share: float
    seconds: float
    compress_seconds: float
    read_seconds: float
    score: float = 0.0
    aware: bool = False

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
