"""Quotas of clients: answers at once, requests and tokens a minute, and the headers that tell a client about them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from tenure.checked import Count, verify

from ..request import Request, RequestOutput
from .api_errors import bad_request, too_many

MINUTE_S = 60.0


@dataclass(frozen=True)
class ClientLimits:
    """The quotas of a client; None: no limit.

    Attributes:
        tokens_per_min: of prompts and answers together.
        requests_per_min: HTTP requests for answers.
        concurrency: answers that are being computed or wait.

    Raises:
        ValueError: a number below 1.
    """

    tokens_per_min: Count | None = None
    requests_per_min: Count | None = None
    concurrency: Count | None = None

    def __post_init__(self) -> None:
        verify(self)


NO_LIMITS = ClientLimits()


class TokenBucket:
    """A quota a minute: holds a minute's worth when it is full, and is refilled continuously.

    Attributes:
        per_min: the quota, which is the capacity, too.
    """

    def __init__(self, per_min: int, clock: Callable[[], float]) -> None:
        self.per_min, self._clock = per_min, clock
        self._level, self._seen_s = float(per_min), clock()

    def level(self) -> float:
        """Units that may be taken now; below 0 if more was used than had been taken."""
        now = self._clock()
        self._level = min(self.per_min, self._level + (now - self._seen_s) * self.per_min / MINUTE_S)
        self._seen_s = now
        return self._level

    def add(self, units: float) -> None:
        """Returns units that were taken and not used; negative ones are taken."""
        self._level = min(self.per_min, self.level() + units)

    def wait_s(self, units: float) -> float:
        """Seconds until it holds `units`, if nothing else is taken meanwhile."""
        return max(0.0, units - self.level()) * MINUTE_S / self.per_min

    def resize(self, per_min: int) -> None:
        """Changes the quota; what has been used counts on."""
        used = self.per_min - self.level()
        self.per_min, self._level = per_min, float(per_min) - used


@dataclass
class Admission:
    """The share of its client's quotas that an admitted HTTP request takes.

    Attributes:
        headers: `x-ratelimit-…`, as of the admission.
        prompt_tokens: of its prompts, each of which counts once for its answers; 0 once it is known that nothing was
            computed.
        answer_tokens: computed so far, by choice.
    """

    headers: dict[str, str] = field(default_factory=dict)
    prompt_tokens: int = 0
    answer_tokens: dict[int, int] = field(default_factory=dict)

    def computed(self, choice: int, num_tokens: int, output: RequestOutput | None) -> None:
        """Further tokens of an answer, with its end if it has ended."""
        before = self.answer_tokens.get(choice, 0)
        self.answer_tokens[choice] = before + num_tokens if output is None else output.num_output_tokens

    def refused(self) -> None:
        """The engine has refused the request, or ended it before its first token."""
        if not any(self.answer_tokens.values()):
            self.prompt_tokens = 0

    @property
    def tokens(self) -> int:
        """All tokens that count."""
        return self.prompt_tokens + sum(self.answer_tokens.values())


class ClientLoads:
    """Counts what each client has in progress; used by the event loop alone.

    Args:
        limit: of one client.
        what: is counted, in the plural.
    """

    def __init__(self, limit: int, what: str) -> None:
        self._limit, self._what = limit, what
        self._counts: dict[str, int] = {}

    @contextmanager
    def admitted(self, client: str, count: int, limit: int | None = None) -> Iterator[None]:
        """Counts `count` more until the block is left.

        Args:
            limit: of this client, if it has a smaller one.

        Raises:
            ApiError: 429, with these the client would have too many.
        """
        others, limit = self._counts.get(client, 0), min(self._limit, limit or self._limit)
        if count > limit:
            raise bad_request(f"got {count} {self._what}; accepted: up to {limit} at once")
        if others + count > limit:
            raise too_many(f"got {count} {self._what} while {others} are in progress; accepted: up to {limit} at once")
        self._counts[client] = others + count
        try:
            yield
        finally:
            self._counts[client] -= count
            if not self._counts[client]:
                del self._counts[client]


class Quotas:
    """Admits requests within their clients' quotas; used by the event loop alone.

    A request takes its prompt and the most tokens that it may be answered with from its client's bucket, and at its end
    gets back what it has not used. A prompt that its client has given up counts; one that the engine has refused does
    not.

    Args:
        limits: of a client; asked at every request, so that they may change.
        max_answers: at once, of a client without a limit of its own.
        clock: seconds.
    """

    def __init__(
        self, limits: Callable[[str], ClientLimits], max_answers: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.limits, self._clock = limits, clock
        self._answers = ClientLoads(max_answers, "answers")
        self._buckets: dict[tuple[str, str], TokenBucket] = {}  # by client and kind

    def _bucket(self, client: str, kind: str, per_min: int | None) -> TokenBucket | None:
        if per_min is None:
            self._buckets.pop((client, kind), None)
            return None
        bucket = self._buckets.get((client, kind))
        if bucket is None:
            bucket = self._buckets[client, kind] = TokenBucket(per_min, self._clock)
        elif bucket.per_min != per_min:
            bucket.resize(per_min)
        return bucket

    @contextmanager
    def admitted(self, requests: Sequence[Request]) -> Iterator[Admission]:
        """Admits the requests of one HTTP request, one for each answer, until the block is left.

        Raises:
            ApiError: 429 with `Retry-After`, a quota is used up; 400, it could never be admitted.
        """
        client = requests[0].client
        limits = self.limits(client)
        prompts = {request.id: len(request.prompt) for request in requests}  # the answers to one prompt share its id
        reserved = sum(prompts.values()) + sum(request.max_new_tokens for request in requests)
        wanted = {
            "requests": (1, self._bucket(client, "requests", limits.requests_per_min)),
            "tokens": (reserved, self._bucket(client, "tokens", limits.tokens_per_min)),
        }
        with self._answers.admitted(client, len(requests), limits.concurrency):
            for kind, (units, bucket) in wanted.items():
                if bucket is None:
                    continue
                if units > bucket.per_min:
                    raise bad_request(
                        f"got a request that may take {units} {kind}, with its prompt and answers; accepted: up to "
                        f"{bucket.per_min}, the client's quota a minute", "max_tokens", "quota_exceeded",
                    )  # fmt: skip
                if (wait_s := bucket.wait_s(units)) > 0:
                    left, again_s = max(0, int(bucket.level())), max(1, math.ceil(wait_s))
                    raise too_many(
                        f"got a request that may take {units} {kind} while {left} are left; accepted: "
                        f"{bucket.per_min} a minute, so again in {again_s} s",
                        wait_s, self._headers(client),
                    )  # fmt: skip
            for units, bucket in wanted.values():
                if bucket is not None:
                    bucket.add(-units)
            admission = Admission(self._headers(client), sum(prompts.values()))
            try:
                yield admission
            finally:
                tokens = wanted["tokens"][1]
                if tokens is not None:
                    tokens.add(reserved - admission.tokens)

    def _headers(self, client: str) -> dict[str, str]:
        """The state of the client's buckets, as OpenAI's headers have it."""
        found: dict[str, str] = {}
        for kind in ("requests", "tokens"):
            bucket = self._buckets.get((client, kind))
            if bucket is not None:
                found[f"x-ratelimit-limit-{kind}"] = str(bucket.per_min)
                found[f"x-ratelimit-remaining-{kind}"] = str(max(0, int(bucket.level())))
                found[f"x-ratelimit-reset-{kind}"] = duration_text(bucket.wait_s(bucket.per_min))
        return found


def duration_text(seconds: float) -> str:
    """A duration as OpenAI's headers have it: `250ms`, `12s`, `6m0s`."""
    milliseconds = math.ceil(seconds * 1000)
    if milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, rest = divmod(math.ceil(seconds), 60)
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"
