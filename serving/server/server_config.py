"""Bounds and times of the HTTP server."""

from __future__ import annotations

from dataclasses import dataclass

from tenure.checked import Count, Positive, verify
from tenure.documents import DocumentLimits


@dataclass(frozen=True)
class ServerConfig:
    """Bounds of what a client may send, and times of connections.

    Attributes:
        max_body_bytes: of a request's body; longer ones get status 413.
        max_yaml_bytes: of a workflow in YAML, which is read at about a hundredth of JSON's speed.
        max_header_bytes: of a request's line and headers together.
        max_depth: levels of lists and objects inside one another in a body. A level of a JSON schema needs two or
            three, so that tools of ten levels, as OpenAI allows, can be declared.
        max_choices: answers to one request: its prompts times `n`.
        default_max_tokens: of an answer to a chat that does not give a number; less where the context ends before.
        default_completion_tokens: of an answer to a completion that does not give a number, as OpenAI has it.
        max_client_requests: answers of one client that are being computed or wait; more get status 429.
        max_client_bodies: bodies of one client, without keys of one address, that are being received or read; more get
            status 429.
        max_connections: connections at once. Requests on further ones get status 503; from twice as many on, new ones
            are closed at once.
        head_timeout_s: seconds in which the line and headers of a request must arrive.
        body_timeout_s: seconds in which a body must arrive; after an answer that did not wait for it, its rest.
        send_timeout_s: seconds for which a reader may take (almost) nothing before its connection is given up.
        ping_s: seconds without an event after which a stream gets an SSE comment, so that nothing on the way closes it.
        keep_alive_s: seconds for which an idle connection stays open.
        drain_s: seconds in which the requests in progress may finish when the server is stopped.
        close_s: further seconds in which the readers of answers that were cut short may take their last event.
        retry_after_s: whole seconds that a client is asked to wait after status 429 or 503.
        state_wait_s: seconds that the live page waits for the end of a step; then it gets the last state again.
        max_metric_clients: clients that have metrics of their own; further ones are added up.
        max_warned_fields: unknown fields of bodies that are remembered; beyond, there are no further warnings.

    Raises:
        ValueError: a value of another type or out of range.
    """

    max_body_bytes: Count = 4 << 20
    max_yaml_bytes: Count = 64 << 10
    max_header_bytes: Count = 32 << 10
    max_depth: Count = 48
    max_choices: Count = 32
    default_max_tokens: Count = 1024
    default_completion_tokens: Count = 16
    max_client_requests: Count = 512
    max_client_bodies: Count = 64
    max_connections: Count = 2048
    head_timeout_s: Positive = 30.0
    body_timeout_s: Positive = 30.0
    send_timeout_s: Positive = 60.0
    ping_s: Positive = 5.0
    keep_alive_s: Count = 30
    drain_s: Positive = 30.0
    close_s: Positive = 5.0
    retry_after_s: Count = 1
    state_wait_s: Positive = 2.0
    max_metric_clients: Count = 200
    max_warned_fields: Count = 1000

    def __post_init__(self) -> None:
        verify(self)

    @property
    def body_limits(self) -> DocumentLimits:
        """Bounds of the values in a body; a prompt may be a list of token ids, or one long text."""
        return DocumentLimits(
            json_characters=self.max_body_bytes, depth=self.max_depth, items=self.max_body_bytes,
            text=self.max_body_bytes, values=self.max_body_bytes,
        )  # fmt: skip
