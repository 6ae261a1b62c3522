"""API keys: which client a request is from, and what it may use. Only digests of the keys are kept in memory.

All digests are compared in constant time.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tenure.documents import file_bytes

from .api_errors import ApiError
from .quotas import NO_LIMITS, ClientLimits

MIN_KEY, MAX_KEY = 16, 512  # characters
MAX_FILE_BYTES = 1 << 20
MAX_QUOTA_DIGITS = 12
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_KEY = re.compile(r"[!-~]+")  # printable ASCII without spaces, as headers carry it
_QUOTA = re.compile(rf"[1-9][0-9]{{0,{MAX_QUOTA_DIGITS - 1}}}")
QUOTAS = ("tokens_per_min", "requests_per_min", "concurrency")


@dataclass(frozen=True)
class Caller:
    """The sender of a request.

    Attributes:
        client: the account; "" where no keys are asked for. Agents, workflows, sessions and prompts are its own.
        admin: may read the metrics and flush the cache.
        share: a group of clients that find each other's prompts; None: nobody else finds this client's.
    """

    client: str
    admin: bool
    share: str | None = None


@dataclass(frozen=True)
class _Known:
    """The content of a file of keys; replaced as a whole."""

    callers: list[tuple[bytes, Caller]]
    limits: Mapping[str, ClientLimits]


class ApiKeys:
    """The keys that are accepted.

    Args:
        callers: by key; None: no key is asked for, and everybody is the same caller, an admin.
        limits: quotas by client; a client without an entry has none.
    """

    def __init__(
        self, callers: Mapping[str, Caller] | None = None, limits: Mapping[str, ClientLimits] | None = None
    ) -> None:
        self._known = None if callers is None else _known(callers, limits or {})
        self._path: Path | None = None

    @property
    def required(self) -> bool:
        """Whether a request needs a key."""
        return self._known is not None

    def limits(self, client: str) -> ClientLimits:
        """The quotas of a client."""
        return NO_LIMITS if self._known is None else self._known.limits.get(client, NO_LIMITS)

    @classmethod
    def from_file(cls, path: str | Path) -> ApiKeys:
        """Reads a file with a line for each key; a client may have several.

        A line is `CLIENT KEY`, followed by any of `admin`, `share=GROUP`, `tokens_per_min=N`, `requests_per_min=N` and
        `concurrency=N`. `admin` belongs to the key, the others to the client, on whichever of its lines they are. Empty
        lines, and lines that begin with `#`, are skipped.

        Raises:
            ValueError: a line of another form, a key twice, two values of one option for a client, or no key. Messages
                give the line's number, never a key.
            OSError: the file cannot be read.
        """
        keys = cls()
        keys._path = Path(path)
        keys.reload()
        return keys

    def reload(self) -> None:
        """Reads the file again; requests in progress continue.

        Raises:
            ValueError, OSError: as `from_file`; then the keys stay as they were. ValueError also without a file.
        """
        if self._path is None:
            raise ValueError("got keys without a file to read again; accepted: those of `from_file`")
        self._known = _known(*_read_file(self._path))

    def caller(self, authorization: str | None) -> Caller:
        """The sender of a request with this `Authorization` header.

        Raises:
            ApiError: 401, no key or one that is not accepted.
        """
        if self._known is None:
            return Caller("", True)
        scheme, _, key = (authorization or "").partition(" ")
        given, found = _digest(key.strip()[: MAX_KEY + 1]), None
        for digest, caller in self._known.callers:  # all of them: the time does not depend on which one it is
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


def _known(callers: Mapping[str, Caller], limits: Mapping[str, ClientLimits]) -> _Known:
    return _Known([(_digest(key), caller) for key, caller in callers.items()], dict(limits))


def _read_file(path: Path) -> tuple[dict[str, Caller], dict[str, ClientLimits]]:
    """Callers by key, and quotas by client; raises as `ApiKeys.from_file`."""
    text = file_bytes(path, MAX_FILE_BYTES).decode("utf-8")
    admins: dict[str, tuple[str, bool]] = {}  # client and role by key
    options: dict[str, dict[str, Any]] = {}  # by client
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        client, key, *rest = (*words, "")[: max(2, len(words))]
        given = _options([word for word in rest if word != "admin"])
        if given is None or rest.count("admin") > 1 or not _NAME.fullmatch(client) or not _fits(key):
            raise ValueError(
                f"got another form in line {number} of {path}; accepted: CLIENT KEY, and any of admin, share=GROUP, "
                f"{', '.join(f'{name}=N' for name in QUOTAS)}, with names of up to 64 letters, digits and . _ -, a key "
                f"of {MIN_KEY} to {MAX_KEY} characters, and whole numbers from 1 of up to {MAX_QUOTA_DIGITS} digits"
            )
        if key in admins:
            raise ValueError(f"got a key in line {number} of {path} that an earlier line has; accepted: keys once")
        admins[key] = client, "admin" in rest
        before = options.setdefault(client, {})
        for name, value in given.items():
            if before.setdefault(name, value) != value:
                raise ValueError(
                    f"got {name}={value} in line {number} of {path} after {name}={before[name]} of the same client; "
                    "accepted: one value for all keys of a client"
                )
    if not admins:
        raise ValueError(f"got no key in {path}; accepted: a line CLIENT KEY for each")
    shares = {client: given.pop("share", None) for client, given in options.items()}
    callers = {key: Caller(client, admin, shares[client]) for key, (client, admin) in admins.items()}
    return callers, {client: ClientLimits(**given) for client, given in options.items() if given}


def _options(words: list[str]) -> dict[str, Any] | None:
    """The options of a line; None if one is of another form, or there twice."""
    found: dict[str, Any] = {}
    for word in words:
        name, _, value = word.partition("=")
        if name == "share" and _NAME.fullmatch(value):
            option: Any = value
        elif name in QUOTAS and _QUOTA.fullmatch(value):
            option = int(value)
        else:
            return None
        if name in found:
            return None
        found[name] = option
    return found


def _fits(key: str) -> bool:
    return MIN_KEY <= len(key) <= MAX_KEY and _KEY.fullmatch(key) is not None


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
