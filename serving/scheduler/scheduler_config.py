"""Budgets and tuning of a `Scheduler`."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class SchedulerConfig:
    """Budgets of a `Scheduler`; memory itself is bounded by the device pool.

    Attributes:
        max_num_batched_tokens: tokens computed in one batch. A decoding request counts 1, prefills share the rest.
        prefill_chunk_size: tokens of one request's prefill in one batch; None: up to `max_num_batched_tokens`.
        max_num_seqs: requests computed at once. Loading requests do not count: once loaded they wait for a place with
            their memory reserved, and precede requests that have not been admitted.
        max_concurrent_loads: requests whose KV is being loaded to the device at once. Requests beyond that are
            deferred until a load ends; those that need no load pass them.
        max_queued_requests: requests waiting to be admitted; `submit` refuses more.
        timeout_s: seconds from arrival to the end of a request that sets no timeout of its own.
        allocation_patience_s: seconds for which a request that finds no memory may be passed by others; after that it
            is admitted next.
        load_timeout_factor: a load is given up, and the prompt computed, once it has taken this many times its
            estimate (or that of computing, whichever is longer).
        max_refusals_per_step: requests without memory that one admission looks at before it stops.
        max_load_failures: failed loads of a request after which its prompt is computed.
        output_token_weight: charge of an answer's token in the fair queue, relative to a prompt's token (Sheng et al.
            2024, section 5.1).
        priority_window_s: a request of priority 1 precedes one of priority 0 that arrived up to this many seconds
            earlier; the bound keeps a workflow's requests from starving.
        max_idle_branches: idle clients (and workflows of each) whose counters the fair queue remembers.

    Raises:
        ValueError: a value that is not finite and above 0, or no more batched tokens than sequences.
    """

    max_num_batched_tokens: int = 2048
    prefill_chunk_size: int | None = None
    max_num_seqs: int = 64
    max_concurrent_loads: int = 16
    max_queued_requests: int = 10_000
    timeout_s: float = 600.0
    allocation_patience_s: float = 5.0
    load_timeout_factor: float = 2.0
    max_refusals_per_step: int = 4
    max_load_failures: int = 2
    output_token_weight: float = 2
    priority_window_s: float = 10.0
    max_idle_branches: int = 10_000

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"got {each.name}={value}; accepted: a finite number above 0")
        if self.max_num_batched_tokens <= self.max_num_seqs:
            raise ValueError(
                f"got max_num_batched_tokens={self.max_num_batched_tokens} and max_num_seqs={self.max_num_seqs}; "
                "accepted: more tokens than sequences, as a full batch of decodes would leave no room for a prefill"
            )
