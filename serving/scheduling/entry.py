"""What the scheduler keeps of a request until it is over."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from ..keep import Keep
from ..pages import TOKEN_BYTES, Pages, encode
from .request import Ended, Request, RequestOutcome, Times

if TYPE_CHECKING:
    from ..lease import Lease
    from .work import Decode


class State(Enum):
    WAITING = "it was waiting to be admitted"
    LOADING = "its KV was on its way"
    LOADED = "its KV had come, and it was waiting for a place in the batch"
    PREFILL = "its prompt was being computed"
    DECODE = "its answer was being computed"
    ENDED = "it was over"


@dataclass(eq=False)
class Entry:
    """A request inside the scheduler, which alone changes it.

    Attributes:
        key: the whole pages of the prompt; `lookup`: of all its tokens but the last, which must be computed.
        tail: tokens behind the last whole page. size: tokens of the prompt. fixed: of these, whole pages of the agent's
            fixed prompt.
        byte_rate: bytes of KV a token.
        done: tokens of the prompt whose KV is there.
        reserved: bytes it has reserved in the device pool.
        computed: tokens of the prompt that were computed; `charged`: what its workflow has been charged for it.
        agent: whose call it is; None where the request names another client's. order: of arrival.
        opened: its prompt has been looked up. started: a workflow counts it. waits: the outlook does.
        failures: of its loads. compute: its prompt is computed as far as it is not on the device.
        aside: it waits for a load to end, as it needs one and as many as may be are under way.
        refused_at: when it first found no room. load_began, give_up_at: of the load under way.
        working: it is in the work that is out. doomed: how it is to end once that is back.
    """

    request: Request
    key: Pages
    lookup: Pages
    tail: list[int]
    size: int
    fixed: int
    byte_rate: int
    page_size: int
    times: Times
    state: State = State.WAITING
    lease: Lease | None = None
    done: int = 0
    reserved: int = 0
    computed: int = 0
    charged: float = 0.0
    failures: int = 0
    compute: bool = False
    agent: str | None = None
    order: int = 0
    opened: bool = False
    started: bool = False
    waits: bool = False
    aside: bool = False
    refused_at: float | None = None
    load_began: float = 0.0
    give_up_at: float = math.inf
    working: bool = False
    doomed: tuple[RequestOutcome, str | None] | None = None
    decode: Decode | None = None
    tokens: list[int] = field(default_factory=list)
    told: bool = True
    produced: int = 0
    stalled_s: float = 0.0
    cached: int = 0
    loaded: int = 0
    recomputed: int = 0

    @property
    def path(self) -> tuple[str, str]:
        """Whom it is charged to."""
        return self.request.client, self.request.workflow or self.request.session or ""

    def storable(self, produced: int) -> int:
        """Up to which token of prompt and answer the KV is to be kept, with so many tokens of the answer."""
        if self.request.keep is Keep.DISCARD:
            return self.fixed
        whole = self.size + max(0, produced - 1)
        return whole - whole % self.page_size

    @property
    def needed(self) -> int:
        """Bytes of KV that are computed outside the tree until the request ends, beside its lease."""
        covered = 0 if self.lease is None else self.lease.length
        return (self.size + self.request.max_new_tokens - covered) * self.byte_rate

    def ended(self, outcome: RequestOutcome, error: str | None) -> Ended:
        """What is told of it once it is over."""
        return Ended(
            self.request,
            outcome,
            error,
            self.tokens,
            self.produced,
            self.times,
            self.stalled_s,
            self.cached,
            self.loaded,
            self.recomputed,
        )


def new_entry(request: Request, page_size: int, bytes_per_token: int, now: float) -> Entry:
    """The entry of a request that has just come.

    Raises:
        ValueError: its prompt is empty, or no row of token ids.
    """
    size, key = len(request.prompt), Pages(encode(request.prompt, page_size))
    if size == 0:
        raise ValueError(f"the request {request.id!r} has an empty prompt; accepted: one token or more")
    whole, fixed = len(key) // TOKEN_BYTES, min(request.fixed_tokens, size)
    return Entry(
        request,
        key=key,
        lookup=key if size > whole else Pages(key[: -page_size * TOKEN_BYTES]),
        tail=[int(token) for token in request.prompt[whole:]] if size > whole else [],
        size=size,
        fixed=fixed - fixed % page_size,
        byte_rate=request.bytes_per_token or bytes_per_token,
        page_size=page_size,
        times=Times(now),
    )
