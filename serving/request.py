"""Requests and their outputs, as clients of the scheduler and of the engine see them."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

from .cache_report import CacheReport
from .kvcache.radix_tree import read_token_ids
from .sampling.params import FinishedBy, SamplingParams

if TYPE_CHECKING:
    import numpy as np

MAX_WORKFLOW_NAME = 128  # characters of a workflow's name at the server: inside the graph the client's precedes it
MAX_NAME = 256  # characters of the name of a request, agent, workflow, session or client
MAX_NUMBER = 2**31 - 1  # of the numbers of a request
MAX_NAMESPACE_PARTS = 64  # names, numbers and tuples in a namespace, at every depth together


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


def check_namespace(namespace: object) -> Hashable:
    """Returns `namespace`; ValueError unless it is a string, a whole number, None, or a tuple of these, all bounded.

    Only these are known to be hashable, and equal only to what is meant to be the same: `True == 1 == 1.0`.
    """
    pending, parts = [namespace], 0
    while pending:
        part = pending.pop()
        parts += len(part) if type(part) is tuple else 0
        fits = (
            part is None
            or (type(part) is str and len(part) <= MAX_NAME)
            or (type(part) is int and abs(part) <= 2**63)
            or type(part) is tuple
        )
        if not fits or parts > MAX_NAMESPACE_PARTS:
            raise ValueError(
                f"got {shown(namespace)} as a namespace; accepted: a string of up to {MAX_NAME} characters, a whole "
                f"number of up to 2^63, None, or a tuple of up to {MAX_NAMESPACE_PARTS} of these"
            )
        if type(part) is tuple:
            pending += part
    return namespace  # pyright: ignore[reportReturnType]


class StorePolicy(Enum):
    """Whether the KV of a request's suffix and answer is stored in the cache; its fixed prompt always is."""

    NEUTRAL = "neutral"  # stored, so that the conversation can be continued
    DISCARD = "discard"  # not stored


@dataclass(frozen=True, eq=False)
class Request:
    """A prompt to be answered.

    Attributes:
        id: the client's label. The scheduler never looks at it: several requests may have the same one, at the same
            time or one after the other (`Scheduler.submit` returns the number that a request is known by).
        prompt: token ids, one row: a list, an array or a tensor in CPU memory; at least one. The request keeps a
            read-only copy, int32 `(tokens,)`.
        max_new_tokens: upper bound on the answer, in tokens.
        workflow, agent: names of the step graph.
        fixed_tokens: length of the agent's fixed prompt at the beginning of `prompt` (rounded down to whole pages);
            0: unknown, and learned from the agent's calls.
        session: groups the calls of one conversation where no workflow is declared.
        client: the account that tokens are charged to; fairness and quotas apply to clients first.
        namespace: separates prefix trees; equal prompts in different namespaces share nothing. A string, a whole
            number, None, or a tuple of these.
        priority: 0 to 1, larger is sooner; only compared with requests of the same workflow.
        timeout_s: seconds from arrival until the request ends unanswered; None: `SchedulerConfig.timeout_s`.
        store_policy: whether suffix and answer are stored.
        bytes_per_token: bytes of KV per computed token; None: the scheduler's value.
        expected_tokens: expected length of the answer, charged by the fair queue until the real length is known;
            None: `max_new_tokens`.
        sampling: how an engine chooses the answer's tokens, and what ends it; greedy by default.
        explain_cache: its output tells what of the prompt was reused, and why the rest was not (`RequestOutput.cache`).

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
    sampling: SamplingParams = field(default_factory=SamplingParams)
    explain_cache: bool = False

    def __post_init__(self) -> None:
        check_name(self.id, "a request")
        for name, what in ((self.workflow, "a workflow"), (self.agent, "an agent"), (self.session, "a session")):
            if name is not None:
                check_name(name, what)
        if not (isinstance(self.client, str) and self.client == ""):
            check_name(self.client, "a client")
        check_namespace(self.namespace)
        for key, low in (("max_new_tokens", 1), ("fixed_tokens", 0), ("bytes_per_token", 1), ("expected_tokens", 1)):
            value = getattr(self, key)
            if value is None and key in ("bytes_per_token", "expected_tokens"):
                continue
            if type(value) is not int or not low <= value <= MAX_NUMBER:
                raise ValueError(
                    f"got {key}={shown(value)} for a request; accepted: a whole number from {low} up to {MAX_NUMBER}"
                )
        if not _is_number(self.priority) or not 0 <= self.priority <= 1:
            raise ValueError(f"got priority={shown(self.priority)} for a request; accepted: 0 to 1")
        if self.timeout_s is not None and not (_is_number(self.timeout_s) and 0 < self.timeout_s < math.inf):
            raise ValueError(f"got timeout_s={shown(self.timeout_s)} for a request; accepted: seconds above 0")
        if not isinstance(self.store_policy, StorePolicy):
            raise ValueError(f"got store_policy={shown(self.store_policy)} for a request; accepted: a StorePolicy")
        if not isinstance(self.sampling, SamplingParams):
            raise ValueError(f"got sampling={shown(self.sampling)} for a request; accepted: SamplingParams")
        if not isinstance(self.explain_cache, bool):
            raise ValueError(f"got explain_cache={shown(self.explain_cache)} for a request; accepted: True or False")
        prompt = read_token_ids(self.prompt)
        if not len(prompt):
            raise ValueError(f"the request {self.id!r} has an empty prompt; accepted: one token or more")
        object.__setattr__(self, "prompt", prompt)  # the dataclass is frozen


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


class FinishReason(Enum):
    """How a request ended."""

    ANSWERED = "answered"
    LENGTH = "length"  # the answer was cut short: prompt and answer fill the device's memory
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
        number: what `Scheduler.submit` returned.
        error: why it was not answered, or not to its end, as a sentence; None if it was.
        tokens: the answer as far as the driver reported its tokens; partial if the request was cut short.
        num_output_tokens: length of the answer, reported or not.
        stalled_s: seconds spent waiting for loads.
        cached_tokens: prompt tokens whose KV was found in the cache, in whatever tier, and used.
        loaded_tokens: tokens that were loaded to the device for this request.
        recomputed_tokens: tokens that were cached below the device but recomputed, as that was faster than loading.
        num_preemptions: how often its memory was given to other requests, and it was computed anew later.
        finished_by: how the answer ended by itself; None: it did not, e.g. it has `max_new_tokens`.
        cache: what of the prompt was reused, and why the rest was computed; None unless the request asked for it
            (`explain_cache`) and was admitted.
    """

    request: Request
    number: int
    finish_reason: FinishReason
    error: str | None
    tokens: list[int]
    num_output_tokens: int
    times: RequestTimes
    stalled_s: float
    cached_tokens: int
    loaded_tokens: int
    recomputed_tokens: int
    num_preemptions: int
    finished_by: FinishedBy | None = None
    cache: CacheReport | None = None
