"""What a scheduler may do at once."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class SchedulerConfig:
    """Budgets of a `Scheduler`; memory is bounded by the device pool itself.

    Attributes:
        batch_tokens: of one piece of work; a decoding request counts 1, the rest is for prefills.
        chunk_tokens: of one request's prefill in one piece of work; by default up to `batch_tokens`.
        running: requests that are computed at once. Those that load take no place: they wait for one once their KV is
            there, with their memory, and go before those that have not been admitted.
        loading: requests whose KV is on its way to the device at once. Others that would load wait for one of these to
            end; that is no lack of room, and whoever needs no load goes past them.
        waiting: requests that have not been admitted; more are refused.
        timeout_s: seconds from a request's arrival to its end, where it says nothing else.
        room_patience_s: a request that has been refused room for so long is admitted next, whoever else would fit.
        load_patience: a load that takes so many times what computing would is given up, and the prompt computed.
        looks: how many requests that find no room one admission looks at.
    """

    batch_tokens: int = 2048
    chunk_tokens: int | None = None
    running: int = 64
    loading: int = 16
    waiting: int = 10_000
    timeout_s: float = 600.0
    room_patience_s: float = 5.0
    load_patience: float = 2.0
    looks: int = 4

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"got {each.name}={value}; accepted: a finite number above 0")
        if self.batch_tokens <= self.running:
            raise ValueError(
                f"got batch_tokens={self.batch_tokens} and running={self.running}; accepted: more tokens than "
                "requests, as a full batch of decodes would leave no room for a prefill"
            )
