"""API keys: which client a request is from. Only digests are kept, and all of them are compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
import re
from dataclasses import dataclass
from pathlib import Path

from .api_errors import ApiError

MIN_KEY, MAX_KEY = 16, 512  # characters
MAX_FILE_BYTES = 1 << 20
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_KEY = re.compile(r"[!-~]+")  # printable ASCII without spaces, as headers carry it


@dataclass(frozen=True)
class Caller:
    """The sender of a request.

    Attributes:
        client: the account; "" where no keys are asked for. Agents, workflows, sessions and prompts are its own.
        admin: may read the metrics and flush the cache.
    """

    client: str
    admin: bool


class ApiKeys:
    """The keys that are accepted.

    Args:
        callers: by key; None: no key is asked for, and everybody is the same caller, an admin.
    """

    def __init__(self, callers: dict[str, Caller] | None = None) -> None:
        self._callers = None if callers is None else [(_digest(key), caller) for key, caller in callers.items()]

    @property
    def required(self) -> bool:
        """Whether a request needs a key."""
        return self._callers is not None

    @classmethod
    def from_file(cls, path: str | Path) -> ApiKeys:
        """Reads a file with a line `CLIENT KEY` for each key, or `CLIENT KEY admin`; a client may have several.

        Empty lines, and lines that begin with `#`, are skipped.

        Raises:
            ValueError: a line of another form, a key twice, or no key. Messages give the line's number, never a key.
            OSError: the file cannot be read.
        """
        file = Path(path)
        if file.stat().st_size > MAX_FILE_BYTES:
            raise ValueError(f"got {file.stat().st_size} bytes in {file}; accepted: up to {MAX_FILE_BYTES}")
        callers: dict[str, Caller] = {}
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            words = line.split()
            if not words or words[0].startswith("#"):
                continue
            client, key, role = (*words, "", "")[:3]
            if len(words) > 3 or role not in ("", "admin") or not _NAME.fullmatch(client) or not _fits(key):
                raise ValueError(
                    f"got another form in line {number} of {file}; accepted: CLIENT KEY, or CLIENT KEY admin, with a "
                    f"name of up to 64 letters, digits and . _ -, and a key of {MIN_KEY} to {MAX_KEY} characters"
                )
            if key in callers:
                raise ValueError(f"got a key in line {number} of {file} that an earlier line has; accepted: keys once")
            callers[key] = Caller(client, role == "admin")
        if not callers:
            raise ValueError(f"got no key in {file}; accepted: a line CLIENT KEY for each")
        return cls(callers)

    def caller(self, authorization: str | None) -> Caller:
        """The sender of a request with this `Authorization` header.

        Raises:
            ApiError: 401, no key or one that is not accepted.
        """
        if self._callers is None:
            return Caller("", True)
        scheme, _, key = (authorization or "").partition(" ")
        given, found = _digest(key.strip()[: MAX_KEY + 1]), None
        for digest, caller in self._callers:  # all of them: the time does not depend on which one it is
            if hmac.compare_digest(digest, given):
                found = caller
        if found is None or scheme.lower() != "bearer":
            raise ApiError(
                401, "got no API key that is known; accepted: the header `Authorization: Bearer KEY`",
                "authentication_error", code="invalid_api_key",
            )  # fmt: skip
        return found

    def require_admin(self, authorization: str | None) -> Caller:
        """As `caller`, for what concerns all clients.

        Raises:
            ApiError: 401 as there; 403, the key is not an admin's.
        """
        caller = self.caller(authorization)
        if not caller.admin:
            raise ApiError(
                403, "got a client's key; accepted: the key of an admin", "permission_error", code="no_admin"
            )
        return caller


def _fits(key: str) -> bool:
    return MIN_KEY <= len(key) <= MAX_KEY and _KEY.fullmatch(key) is not None


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
