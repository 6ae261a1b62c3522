"""Errors as OpenAI's clients read them: a status, and an object with message, type, parameter and code."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from ..errors import BadRequest, Draining, EngineDead, Gone, QueueFull, ServingError, TooLarge
from ..request import FinishReason
from ..sampling.grammar_masks import MaskTooSlow

INVALID, SERVER = "invalid_request_error", "server_error"


class ApiError(Exception):
    """A request that is not answered, with the HTTP status that says why.

    Attributes:
        status: of HTTP; 499 where the client has gone.
        kind: `type` of the object, as OpenAI names them.
        param: the field of the request that is the reason, if it is one.
        code: a word for programs.
        retry_after_s: seconds after which sending the request again is of use; None: the server's usual ones.
        more_headers: of the response.
    """

    retry_after_s: float | None = None
    more_headers: Mapping[str, str] = {}

    def __init__(
        self, status: int, message: str, kind: str = INVALID, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.kind, self.param, self.code = status, kind, param, code

    def document(self) -> dict[str, Any]:
        """The object `{"error": …}`."""
        error = {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}
        return {"error": error}

    def event(self) -> bytes:
        """The object as an event of a stream whose status has been sent."""
        return b"data: " + json.dumps(self.document()).encode() + b"\n\n"

    def headers(self, retry_after_s: int) -> dict[str, str]:
        """`Retry-After` where sending the request again is of use, `WWW-Authenticate` where a key is needed."""
        found = dict(self.more_headers)
        if self.status in (429, 503):
            wait_s = retry_after_s if self.retry_after_s is None else max(1, math.ceil(self.retry_after_s))
            found["Retry-After"] = str(wait_s)
        if self.status == 401:
            found["WWW-Authenticate"] = "Bearer"
        return found


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """Status 400: the request can never be answered as it is."""
    return ApiError(400, message, param=param, code=code)


def not_found(message: str, code: str = "not_found", param: str | None = None) -> ApiError:
    """Status 404."""
    return ApiError(404, message, param=param, code=code)


def too_many(message: str, retry_after_s: float | None = None, headers: Mapping[str, str] | None = None) -> ApiError:
    """Status 429: the same request may be answered later, if known after `retry_after_s` seconds."""
    error = ApiError(429, message, "rate_limit_error", code="rate_limit_exceeded")
    error.retry_after_s, error.more_headers = retry_after_s, headers or {}
    return error


def of_serving_error(error: ServingError) -> ApiError:
    """How a client is answered for an error of the engine; the engine's message is kept where it is about the request.

    The order matters: `TooLarge` is a `BadRequest`.
    """
    message = str(error)
    if isinstance(error, TooLarge):
        return bad_request(message, code="context_length_exceeded")
    if isinstance(error, BadRequest):
        return bad_request(message)
    if isinstance(error, QueueFull):
        return too_many(message)
    if isinstance(error, Draining):
        return ApiError(503, message, SERVER, code="server_draining")
    if isinstance(error, EngineDead):
        return ApiError(503, "the engine has stopped; the operator's log says why", SERVER, code="engine_dead")
    if isinstance(error, Gone):
        timed_out = error.output is not None and error.output.finish_reason is FinishReason.TIMED_OUT
        return ApiError(503, message, SERVER, code="timed_out" if timed_out else "cancelled")
    _, too_slow, reason = message.partition(f"{MaskTooSlow.__name__}: ")
    if too_slow:
        return bad_request(f"{reason}; use a simpler schema, expression or grammar", code="grammar_too_complex")
    return ApiError(500, "computing the answer failed; the operator's log says why", SERVER, code="request_failed")
