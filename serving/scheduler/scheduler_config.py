"""Budgets and tuning of a `Scheduler`."""

from __future__ import annotations

from dataclasses import dataclass

from tenure.checked import Count, NotNegative, Positive, verify


@dataclass(frozen=True)
class SchedulerConfig:
    """Budgets of a `Scheduler`; memory itself is bounded by the device pool.

    Attributes:
        max_num_batched_tokens: tokens computed in one batch. A decoding request counts 1, prefills share the rest.
        prefill_chunk_size: tokens of one request's prefill in one batch; None: up to `max_num_batched_tokens`.
        max_prefill_tokens_per_step: tokens of prefills in a batch with decodes, so that no decode waits for more than
            these and the other decodes; None: up to `max_num_batched_tokens`.
        max_num_seqs: requests computed at once. Loading requests do not count: once loaded they wait for a place with
            their memory reserved, and precede requests that have not been admitted.
        max_concurrent_loads: requests whose KV is being loaded to the device at once. Requests beyond that are
            deferred until a load ends; those that need no load pass them.
        reserve_answers: memory for a request's whole answer (`max_new_tokens`) is reserved at admission, and nobody is
            ever preempted. False: memory for `answer_headroom_tokens`, and for further pages as they are needed.
        answer_headroom_tokens: tokens of the answer for which memory is reserved at admission, if the answer may be so
            long; and a request is admitted only if those that are admitted already could continue for as many, so that
            it is not preempted as soon as it has begun.
        page_patience_s: seconds for which a request waits while pages that it needs are being computed for another one
            and no chunk of that one is completed; then it computes them itself. 0: it does so at once.
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
        max_idle_branches: idle clients (and workflows of each) whose counters the fair queue remembers; and clients
            whose namespaces are remembered.
        max_client_namespaces: namespaces of a client in which a prompt that is not found is looked for, for the reason
            that a request asks for (`Request.explain_cache`).

    Raises:
        ValueError: a value of another type or out of range, or no more batched tokens than sequences.
    """

    max_num_batched_tokens: Count = 2048
    prefill_chunk_size: Count | None = None
    max_prefill_tokens_per_step: Count | None = None
    max_num_seqs: Count = 64
    max_concurrent_loads: Count = 16
    reserve_answers: bool = False
    answer_headroom_tokens: Count = 64
    page_patience_s: NotNegative = 10.0
    max_queued_requests: Count = 10_000
    timeout_s: Positive = 600.0
    allocation_patience_s: Positive = 5.0
    load_timeout_factor: Positive = 2.0
    max_refusals_per_step: Count = 4
    max_load_failures: Count = 2
    output_token_weight: Positive = 2
    priority_window_s: Positive = 10.0
    max_idle_branches: Count = 10_000
    max_client_namespaces: Count = 16

    def __post_init__(self) -> None:
        verify(self)
        if self.max_num_batched_tokens <= self.max_num_seqs:
            raise ValueError(
                f"got max_num_batched_tokens={self.max_num_batched_tokens} and max_num_seqs={self.max_num_seqs}; "
                "accepted: more tokens than sequences, as a full batch of decodes would leave no room for a prefill"
            )
