"""Errors that clients of the engine can tell apart; each says in one sentence what was wrong.

All are `ServingError`. The ones that a client can avoid are a `ValueError` as well, the others a `RuntimeError`.
"""

from __future__ import annotations

from .request import RequestOutput


class ServingError(Exception):
    """The base of all errors of requests and of the engine."""


class BadRequest(ServingError, ValueError):
    """A field of a request, hint or workflow is outside what is accepted; sending it again is of no use."""


class TooLarge(BadRequest):
    """The request needs more tokens or memory than the model or the device has, whatever else runs."""


class QueueFull(ServingError, ValueError):
    """Too many requests or messages wait; the same request may be accepted later."""


class Draining(ServingError, ValueError):
    """No new requests are taken: the engine finishes those it has, or was closed."""


class RequestEnded(ServingError, RuntimeError):
    """A request ended without a whole answer.

    Attributes:
        output: what there is of it; None if the engine has not returned any.
    """

    def __init__(self, message: str, output: RequestOutput | None = None) -> None:
        super().__init__(message)
        self.output = output


class Gone(RequestEnded):
    """The request was cancelled, timed out, or was dropped by a flush or when the engine was closed."""


class RequestFailed(RequestEnded):
    """Computing the request failed; others go on."""


class EngineDead(ServingError, RuntimeError):
    """The engine's thread has ended by an exception, which is the cause of this one; nothing is answered any more."""
