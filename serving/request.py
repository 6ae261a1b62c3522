"""What becomes of what a request has computed.

A request, how it ends, and what the scheduler keeps of it in between.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from .workflow.spec import check_name

if TYPE_CHECKING:
    import numpy as np


class StorePolicy(Enum):
    """Of a request's suffix and answer."""

    NEUTRAL = "neutral"  # stored, for whoever continues the conversation
    DISCARD = "discard"  # not stored


@dataclass(frozen=True, eq=False)
class Request:
    """A prompt to be answered.

    Attributes:
        id: unlike that of any other request that is not over.
        prompt: token ids, one row: a list, an array or a tensor in CPU memory; at least one.
        max_new_tokens: at which the answer ends at the latest; room for all of them is reserved.
        workflow, agent: as in the step graph.
        fixed_tokens: the first so many are the agent's fixed prompt (down to a whole page); 0: unknown, it is then
            learned from the agent's calls.
        session: what calls of one conversation have in common, where no workflow is declared.
        client: who is charged for it; fairness and shares are among clients first.
        namespace: of the prefix tree.
        priority: 0 to 1, larger sooner, among the requests of one workflow only.
        timeout_s: seconds until it ends unanswered; None: as the scheduler's limits say.
        bytes_per_token: KV of a token that is computed; None: as the scheduler has it.
        expected_tokens: of the answer, for fairness until it is known; None: `max_new_tokens`.
    """

    id: str
    prompt: Sequence[int] | np.ndarray | Any
    max_new_tokens: int
    workflow: str | None = None
    agent: str | None = None
    fixed_tokens: int = 0
    session: str | None = None
    client: str = ""
    namespace: Hashable = None
    priority: float = 0.5
    timeout_s: float | None = None
    keep: StorePolicy = StorePolicy.NEUTRAL
    bytes_per_token: int | None = None
    expected_tokens: int | None = None

    def __post_init__(self) -> None:
        check_name(self.id, "a request")
        for name, what in ((self.workflow, "a workflow"), (self.agent, "an agent"), (self.session, "a session")):
            if name is not None:
                check_name(name, what)
        if self.client:
            check_name(self.client, "a client")
        for key, low in (("max_new_tokens", 1), ("fixed_tokens", 0), ("bytes_per_token", 1), ("expected_tokens", 1)):
            value = getattr(self, key)
            if value is None and key in ("bytes_per_token", "expected_tokens"):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise ValueError(f"got {key}={value!r:.60} for a request; accepted: a whole number from {low} up")
        if not _is_number(self.priority) or not 0 <= self.priority <= 1:
            raise ValueError(f"got priority={self.priority!r:.60} for a request; accepted: 0 to 1")
        if self.timeout_s is not None and not (_is_number(self.timeout_s) and 0 < self.timeout_s < math.inf):
            raise ValueError(f"got timeout_s={self.timeout_s!r:.60} for a request; accepted: seconds above 0")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


class RequestOutput(Enum):
    ANSWERED = "answered"
    FAILED = "failed"
    CANCELLED = "cancelled"
    TIMED_OUT = "timed out"


@dataclass
class Times:
    """Seconds on the clock; None for what did not happen."""

    arrived: float
    admitted: float | None = None  # its memory was reserved, and what is cached was on the device
    first_token: float | None = None
    ended: float | None = None


@dataclass(frozen=True)
class Ended:
    """How a request ended; each one does exactly once.

    Attributes:
        error: why it was not answered, in a sentence; None if it was.
        tokens: of the answer, as far as the driver told them; also of one that was cut short.
        produced: how many there were, told or not.
        stalled_s: seconds it waited for copies.
        cached_tokens: of the prompt that were found on the device or below and used.
        loaded_tokens: of these, those that were brought to the device for it.
        recomputed_tokens: that lay below the device and were computed all the same, as that was sooner.
    """

    request: Request
    outcome: RequestOutput
    error: str | None
    tokens: list[int]
    produced: int
    times: Times
    stalled_s: float
    cached_tokens: int
    loaded_tokens: int
    recomputed_tokens: int
