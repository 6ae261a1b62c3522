"""Requests and their outputs, as clients of the scheduler and of the engine see them."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

MAX_NAME = 256  # characters of the name of a request, agent, workflow, session or client


def shown(value: object) -> str:
    """The first 60 characters of a `repr` that looks at a few items and two levels only, whatever a client sent.

    A short YAML document with aliases can stand for a list of billions of items.
    """
    short = reprlib.Repr()
    short.maxlevel, short.maxstring, short.maxother = 2, 60, 60
    return short.repr(value)[:60]


def check_name(name: object, what: str) -> str:
    """Returns `name`, a name of `what` ("an agent"); ValueError unless it is a string of 1 to `MAX_NAME` characters."""
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME:
        given = f"one of {len(name)} characters" if isinstance(name, str) else shown(name)
        raise ValueError(f"got {given} as the name of {what}; accepted: a string of 1 to {MAX_NAME} characters")
    return name


class StorePolicy(Enum):
    """Whether the KV of a request's suffix and answer is stored in the cache; its fixed prompt always is."""

    NEUTRAL = "neutral"  # stored, so that the conversation can be continued
    DISCARD = "discard"  # not stored


@dataclass(frozen=True, eq=False)
class Request:
    """A prompt to be answered.

    Attributes:
        id: unique among all unfinished requests.
        prompt: token ids, one row: a list, an array or a tensor in CPU memory; at least one.
        max_new_tokens: upper bound on the answer, in tokens; memory for all of them is reserved at admission.
        workflow, agent: names of the step graph.
        fixed_tokens: length of the agent's fixed prompt at the beginning of `prompt` (rounded down to whole pages);
            0: unknown, and learned from the agent's calls.
        session: groups the calls of one conversation where no workflow is declared.
        client: the account that tokens are charged to; fairness and quotas apply to clients first.
        namespace: separates prefix trees; equal prompts in different namespaces share nothing.
        priority: 0 to 1, larger is sooner; only compared with requests of the same workflow.
        timeout_s: seconds from arrival until the request ends unanswered; None: `SchedulerConfig.timeout_s`.
        store_policy: whether suffix and answer are stored.
        bytes_per_token: bytes of KV per computed token; None: the scheduler's value.
        expected_tokens: expected length of the answer, charged by the fair queue until the real length is known;
            None: `max_new_tokens`.

    Raises:
        ValueError: a field is outside these ranges.
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
    store_policy: StorePolicy = StorePolicy.NEUTRAL
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


class FinishReason(Enum):
    """How a request ended."""

    ANSWERED = "answered"
    FAILED = "failed"
    CANCELLED = "cancelled"
    TIMED_OUT = "timed out"


@dataclass
class RequestTimes:
    """Moments of a request's life, in seconds on the scheduler's clock; None for what did not happen.

    Attributes:
        arrived: `Scheduler.submit` was called.
        admitted: its memory was reserved and its cached prefix was on the device.
        first_token: the first token of the answer was computed.
        finished: it ended, for whatever reason.
    """

    arrived: float
    admitted: float | None = None
    first_token: float | None = None
    finished: float | None = None


@dataclass(frozen=True)
class RequestOutput:
    """The result of a request; every request gets exactly one.

    Attributes:
        error: why it was not answered, as a sentence; None if it was.
        tokens: the answer as far as the driver reported its tokens; partial if the request was cut short.
        num_output_tokens: length of the answer, reported or not.
        stalled_s: seconds spent waiting for loads.
        cached_tokens: prompt tokens whose KV was found in the cache, in whatever tier, and used.
        loaded_tokens: of these, the tokens that were loaded to the device for this request.
        recomputed_tokens: tokens that were cached below the device but recomputed, as that was faster than loading.
    """

    request: Request
    finish_reason: FinishReason
    error: str | None
    tokens: list[int]
    num_output_tokens: int
    times: RequestTimes
    stalled_s: float
    cached_tokens: int
    loaded_tokens: int
    recomputed_tokens: int
