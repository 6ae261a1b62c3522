"""A client's side of workflows: declares them at a server, and names each call's workflow, agent and session.

Needs neither torch nor the server's extra: it runs in the agents' program.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import quote, urlsplit

from tenure.checked import Positive, verify

from ..request import MAX_NAME, MAX_WORKFLOW_NAME
from ..workflow.loaders import workflow_to_dict
from ..workflow.spec import EdgeSpec, WorkflowSpec

logger = logging.getLogger(__name__)

AGENT_HEADER, WORKFLOW_HEADER, SESSION_HEADER = "X-Tenure-Agent", "X-Tenure-Workflow", "X-Tenure-Session"
DEFAULT_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True)
class WorkflowClientConfig:
    """Times of a `WorkflowClient`.

    Attributes:
        timeout_s: seconds that a declaration may take.
        refresh_s: seconds after which a call has its workflow declared again, in the background: the server may have
            been started, or restarted, in the meantime.

    Raises:
        ValueError: a value that is not above 0.
    """

    timeout_s: Positive = 5.0
    refresh_s: Positive = 60.0

    def __post_init__(self) -> None:
        verify(self)


def name_on_the_wire(name: str, limit: int = MAX_NAME) -> str:
    """A name as headers can carry it: other characters than visible ASCII are percent-encoded, and a name that is too
    long ends in a digest."""
    sent = quote(name, safe="!#$&'()*+,/:;=?@[]^`{|}<>~ ") if name.strip() == name else quote(name)
    if len(sent) <= limit:
        return sent
    digest = hashlib.blake2b(sent.encode(), digest_size=8).hexdigest()
    return f"{sent[: limit - len(digest) - 1]}-{digest}"


def sendable(spec: WorkflowSpec) -> WorkflowSpec:
    """A workflow with the names of `name_on_the_wire`."""
    return WorkflowSpec(
        name_on_the_wire(spec.name, MAX_WORKFLOW_NAME),
        [replace(agent, name=name_on_the_wire(agent.name)) for agent in spec.agents],
        [EdgeSpec(name_on_the_wire(e.source), name_on_the_wire(e.target), e.probability) for e in spec.edges],
        [name_on_the_wire(agent) for agent in spec.start],
    )


class WorkflowClient:
    """Declares workflows at one server, and makes HTTP clients for the `openai` package that name the calls.

    The program runs as well without a server that knows workflows: one warning is logged, and the names are headers
    that other servers ignore. All methods may be called from any thread.

    Args:
        base_url: of the server with its version, as OpenAI's clients take it, such as `http://127.0.0.1:8000/v1`.
            Calls to other addresses are not named.
        api_key: None: the environment's `OPENAI_API_KEY`.

    Raises:
        ValueError: not an address of http or https.
    """

    def __init__(self, base_url: str, api_key: str | None = None, config: WorkflowClientConfig | None = None) -> None:
        address = urlsplit(base_url)
        if address.scheme not in DEFAULT_PORTS or not address.hostname:
            raise ValueError(f"got {base_url!r:.200} as base_url; accepted: such as http://127.0.0.1:8000/v1")
        self.base_url = base_url.rstrip("/")
        self.config = config or WorkflowClientConfig()
        self._api_key = os.environ.get("OPENAI_API_KEY") if api_key is None else api_key
        self._host = address.hostname, address.port or DEFAULT_PORTS[address.scheme]
        self._lock = threading.Lock()
        self._declared: dict[str, dict[str, Any]] = {}  # documents by name
        self._due: dict[str, float] = {}  # when each is to be declared again
        self._warned = False
        self._session: ContextVar[str | None] = ContextVar("tenure_session", default=None)

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Workflows --------------------------------------------------------------------------------------------------

    def declare_spec(self, spec: WorkflowSpec) -> bool:
        """Declares a workflow now, and again in the background while it is called; returns whether the server took it.

        A workflow of that name which has not changed is kept as it is, so that every process of a program may declare
        it.
        """
        document = workflow_to_dict(sendable(spec))
        name = document["workflow"]
        with self._lock:
            self._declared[name] = document
            self._due[name] = time.monotonic() + self.config.refresh_s
        return self._send("PUT", name, document)

    def end(self, name: str) -> None:
        """Ends a workflow: the prompts of its agents are no longer expected. No effect on one that is not declared."""
        name = name_on_the_wire(name, MAX_WORKFLOW_NAME)
        with self._lock:
            known = self._declared.pop(name, None)
            self._due.pop(name, None)
        if known is not None:
            self._send("DELETE", name)

    def close(self) -> None:
        """Ends all workflows that this object has declared."""
        for name in list(self._declared):
            self.end(name)

    def _send(self, method: str, name: str, document: Mapping[str, Any] | None = None) -> bool:
        """Whether the server has accepted the request; the first failure is logged as a warning."""
        headers = {"Content-Type": "application/json"}
        if self._api_key:
            headers["Authorization"] = f"Bearer {self._api_key}"
        url = f"{self.base_url}/workflows/{quote(name, safe='')}"
        body = None if document is None else json.dumps(document).encode()
        try:
            request = urllib.request.Request(url, body, headers, method=method)
            with urllib.request.urlopen(request, timeout=self.config.timeout_s):
                return True
        except urllib.error.HTTPError as error:
            reason = f"status {error.code}{_message(error)}"
        except (OSError, ValueError) as error:  # of the connection; or of an address that urllib refuses
            reason = str(getattr(error, "reason", error))
        if method == "PUT" and not self._warned:
            self._warned = True
            logger.warning(
                "the workflow %r is not known to %s (%s): calls are answered without its predictions, and it is "
                "declared again every %g s", name, self.base_url, reason, self.config.refresh_s,
            )  # fmt: skip
        return False

    def _refresh(self, name: str) -> None:
        """Has a workflow declared again in the background, if it is time."""
        now = time.monotonic()
        with self._lock:
            if now < self._due.get(name, float("inf")):
                return
            self._due[name] = now + self.config.refresh_s
            document = self._declared[name]
        threading.Thread(target=self._send, args=("PUT", name, document), daemon=True).start()

    # Calls ------------------------------------------------------------------------------------------------------

    @contextmanager
    def session(self, session: str) -> Iterator[None]:
        """Calls inside the block belong to this conversation; also those of tasks that are created in it."""
        token = self._session.set(session)
        try:
            yield
        finally:
            self._session.reset(token)

    def http_client(self) -> Any:
        """An HTTP client for `openai.OpenAI(http_client=…)` or `ChatOpenAI(http_client=…)`."""
        from openai import DefaultHttpxClient

        return DefaultHttpxClient(event_hooks={"request": [self._name_request]})

    def http_async_client(self) -> Any:
        """As `http_client`, for `openai.AsyncOpenAI(http_client=…)` or `ChatOpenAI(http_async_client=…)`."""
        from openai import DefaultAsyncHttpxClient

        async def name_request(request: Any) -> None:
            self._name_request(request)

        return DefaultAsyncHttpxClient(event_hooks={"request": [name_request]})

    def running_call(self) -> dict[str, str]:
        """The names of the call that is being made by the running code, by header; frameworks override this."""
        return {}

    def _name_request(self, request: Any) -> None:
        """Adds the names to a request of httpx; never raises, as the call is worth more than its names."""
        url = request.url
        if (url.host, url.port or DEFAULT_PORTS.get(url.scheme)) != self._host:
            return
        try:
            names = self.running_call()
            session = self._session.get()
            if session is not None:
                names[SESSION_HEADER] = session
            for header, name in names.items():
                limit = MAX_WORKFLOW_NAME if header == WORKFLOW_HEADER else MAX_NAME
                request.headers[header] = name_on_the_wire(name, limit)
            self._refresh(request.headers.get(WORKFLOW_HEADER, ""))
        except Exception:
            logger.debug("a call is sent without names", exc_info=True)


def _message(error: urllib.error.HTTPError) -> str:
    """The message of an error in OpenAI's form, shortened; nothing for other bodies."""
    try:
        return f": {str(json.loads(error.read(65536))['error']['message'])[:200]}"
    except (OSError, ValueError, KeyError, TypeError):
        return ""
