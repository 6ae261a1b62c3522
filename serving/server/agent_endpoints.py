"""The endpoints of workflows and sessions, each client's own."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from tenure.checked import NotNegative, read

from ..client import EngineClient
from ..errors import ServingError
from ..hints.hint import NEUTRAL, SESSION, ActionKind, Hint, HintAction, HintConfig, SessionAction, session_agent
from ..request import check_name, shown
from ..system import System
from ..workflow.loaders import workflow_from_json, workflow_from_yaml
from ..workflow.spec import WorkflowSpec
from ..workflow.workflow import Workflow
from .api_errors import ApiError, bad_request, not_found
from .api_keys import Caller
from .api_requests import UnknownFields, decode_body, parse_body, require_whole_characters
from .call_context import workflow_key
from .server_config import ServerConfig

T = TypeVar("T")
PAGE, MAX_PAGE = 100, 1000  # workflows in one list


@dataclass(frozen=True)
class SessionKeep:
    """The body of `PUT /v1/sessions/{id}`.

    Attributes:
        ttl_s: seconds for which the session's conversation is kept if there is room; None: `HintConfig.default_ttl_s`.
    """

    ttl_s: NotNegative | None = None


class Reader(Protocol):
    """How requests are checked and their bodies read."""

    def caller(self, request: Request) -> Caller:
        """The sender; ApiError 401 or 403."""
        ...

    def read_body(self, request: Request, caller: Caller, work: Callable[[bytes], T]) -> Awaitable[T]:
        """The result of `work`, which reads the body in a thread; ApiError 400 for a ValueError."""
        ...


class AgentEndpoints:
    """The handlers of workflows and sessions.

    What they read of the engine's state belongs to the caller; it is read under the cache's lock, in a thread.
    """

    def __init__(
        self, client: EngineClient, system: System, reader: Reader, config: ServerConfig, hints: HintConfig,
        unknown_fields: UnknownFields,
    ) -> None:  # fmt: skip
        self._client, self._system, self._reader, self._config, self._hints = client, system, reader, config, hints
        self._unknown_fields = unknown_fields

    # Workflows --------------------------------------------------------------------------------------------------

    async def add_workflow(self, request: Request) -> Response:
        """Declares a workflow of the client, in JSON or YAML."""
        caller = self._reader.caller(request)
        spec = await self._read_workflow(request, caller)
        await self._declare(self._client.add_workflow, spec, caller)
        return _declared(spec, added=True)

    async def replace_workflow(self, request: Request) -> Response:
        """Declares or changes a workflow of the client; agents and edges that it had before keep their state."""
        caller, name = self._reader.caller(request), request.path_params["name"]
        spec = await self._read_workflow(request, caller)
        if spec.name != name:
            raise bad_request(f"got the workflow {shown(spec.name)} for {shown(name)}; accepted: the name in the path")
        added = await self._declare(self._client.replace_workflow, spec, caller)
        return _declared(spec, added)

    async def workflow(self, request: Request) -> Response:
        """A workflow of the client: its agents, with their calls in progress and steps to the next, and its edges."""
        caller, name = self._reader.caller(request), request.path_params["name"]
        key, graph = _key(name, caller), self._system.graph

        def find() -> dict[str, Any] | None:
            with graph.lock:
                if key not in graph or graph[key].persistent:
                    return None
                return _document(name, graph[key])

        document = await asyncio.to_thread(find)
        if document is None:
            raise not_found(f"got {shown(name)} as a workflow; accepted: one that was declared and has not ended")
        return JSONResponse(document)

    async def workflows(self, request: Request) -> Response:
        """The workflows of the client by name, at most `limit` of those behind `after`."""
        caller = self._reader.caller(request)
        limit, after = _limit(request), request.query_params.get("after", "")
        graph, prefix = self._system.graph, f"{caller.client}/" if caller.client else ""

        def find() -> list[dict[str, Any]]:
            with graph.lock:
                own = {
                    workflow.name.removeprefix(prefix): workflow
                    for workflow in graph
                    if workflow.name.startswith(prefix) and not workflow.persistent
                }
                names = sorted(name for name in own if name > after)[: limit + 1]
                return [
                    {"id": name, "object": "workflow", "agents": list(own[name].declared_names().values()),
                     "running": _running(own[name])}
                    for name in names
                ]  # fmt: skip

        found = await asyncio.to_thread(find)
        return JSONResponse({"object": "list", "data": found[:limit], "has_more": len(found) > limit})

    async def end_workflow(self, request: Request) -> Response:
        """Ends a workflow of the client."""
        caller, name = self._reader.caller(request), request.path_params["name"]
        key = _key(name, caller)
        try:
            await asyncio.wrap_future(self._client.remove_workflow(key))
        except ValueError as error:
            if isinstance(error, ServingError):
                raise
            raise not_found(f"got {shown(name)} as a workflow to end; accepted: one that was declared") from None
        return JSONResponse({"id": name, "object": "workflow", "deleted": True})

    async def _declare(self, method: Callable[..., Future[Any]], spec: WorkflowSpec, caller: Caller) -> Any:
        """The result of the engine's `method` for a workflow of the caller.

        Raises:
            ApiError: 400, the step graph does not accept the workflow.
        """
        name = _key(spec.name, caller)
        try:
            return await asyncio.wrap_future(method(spec, name, caller.client))
        except ValueError as error:
            if isinstance(error, ServingError):
                raise
            raise bad_request(str(error).replace(name, spec.name)) from None

    async def _read_workflow(self, request: Request, caller: Caller) -> WorkflowSpec:
        in_yaml = "yaml" in request.headers.get("content-type", "")

        def parse(raw: bytes) -> WorkflowSpec:
            if in_yaml and len(raw) > self._config.max_yaml_bytes:
                raise ValueError(
                    f"got {len(raw)} bytes of YAML; accepted: up to {self._config.max_yaml_bytes}, or JSON"
                )
            text, ignored = decode_body(raw), set[str]()
            spec = workflow_from_yaml(text, ignored) if in_yaml else workflow_from_json(text, ignored)
            self._unknown_fields.warn({f"workflow.{name}" for name in ignored})
            require_whole_characters(" ".join([spec.name, *(agent.name for agent in spec.agents)]))
            return spec

        return await self._reader.read_body(request, caller, parse)

    # Sessions ---------------------------------------------------------------------------------------------------

    async def session(self, request: Request) -> Response:
        """The cached part of a session of the client, how long it is kept, and its sub-agents."""
        caller, session = self._session(request)
        document = await asyncio.to_thread(self._find_session, caller.client, session)
        if document is None:
            raise not_found(f"got {shown(session)} as a session; accepted: one that has been called or kept lately")
        return JSONResponse(document)

    def _find_session(self, client: str, session: str) -> dict[str, Any] | None:
        key = client, session_agent(session)
        with self._system.tiers.lock:
            predictor = self._system.predictor
            tree, agent = predictor.session_tree, predictor.quotas.key(key[1], client)
            prompt, hint = predictor.conversations.find(key), predictor.hints.current(agent)
            parent, children = tree.parent(key), tree.children(key)
            if prompt is None and hint is None and parent is None and not children:
                return None
            cached = 0 if prompt is None else self._system.tiers.lookup(*prompt).length
            kept_s = None
            if hint is not None and not hint.evict:
                kept_s = max(0.0, hint.expires_s - predictor.clock())
        return {
            "id": session, "object": "session", "cached_tokens": cached,
            "ended": hint is not None and hint.evict, "kept_s": kept_s,
            "parent": None if parent is None else parent[1].removeprefix(SESSION),
            "sub_agents": [child[1].removeprefix(SESSION) for child in children],
        }  # fmt: skip

    async def end_session(self, request: Request) -> Response:
        """The session has ended: what only it has used is evicted first."""
        caller, session = self._session(request)
        await self._hint(Hint("server", caller.client, session=session, session_action=SessionAction.CLOSE))
        return JSONResponse({"id": session, "object": "session", "deleted": True})

    async def keep_session(self, request: Request) -> Response:
        """The session will continue: its conversation is kept, if there is room, for `ttl_s` seconds."""
        caller, session = self._session(request)
        keep = await self._reader.read_body(
            request, caller, lambda raw: read(SessionKeep, parse_body(raw, self._config))
        )
        ttl_s = self._hints.bounded_ttl(keep.ttl_s)
        action = HintAction(ActionKind.RETAIN, session_agent(session), max(NEUTRAL, self._hints.keep_priority), ttl_s)
        await self._hint(Hint("server", caller.client, session=session, ttl_s=ttl_s, actions=(action,)))
        return JSONResponse({"id": session, "object": "session", "ttl_s": ttl_s})

    def _session(self, request: Request) -> tuple[Caller, str]:
        caller, session = self._reader.caller(request), request.path_params["id"]
        try:
            return caller, check_name(session, "a session")
        except ValueError as error:
            raise bad_request(str(error)) from None

    async def _hint(self, hint: Hint) -> None:
        await asyncio.wrap_future(self._client.hint(hint))


def _key(name: str, caller: Caller) -> str:
    """As `workflow_key`; ApiError 400 for an invalid name."""
    try:
        return workflow_key(name, caller)
    except ValueError as error:
        raise bad_request(str(error), "workflow") from None


def _limit(request: Request) -> int:
    """The length of a list that is asked for.

    Raises:
        ApiError: 400, no whole number within the bounds.
    """
    text = request.query_params.get("limit", str(PAGE))
    if not (text.isascii() and text.isdigit() and len(text) <= 6 and 1 <= int(text) <= MAX_PAGE):
        raise ApiError(400, f"got limit={shown(text)}; accepted: a whole number from 1 to {MAX_PAGE}", param="limit")
    return int(text)


def _declared(spec: WorkflowSpec, added: bool) -> Response:
    agents = [agent.name for agent in spec.agents]
    return JSONResponse({"id": spec.name, "object": "workflow", "agents": agents}, 201 if added else 200)


def _running(workflow: Workflow) -> int:
    return sum(map(len, workflow.running.values()))


def _document(name: str, workflow: Workflow) -> dict[str, Any]:
    """A workflow as JSON's values, by the names with which its client has declared its agents."""
    names = workflow.declared_names()
    agents = {}
    for agent, node in workflow.ids.items():
        steps = workflow.next_steps(agent)
        agents[names[agent]] = {
            "join": workflow.join(agent), "running": len(workflow.running.get(node, ())),
            "steps": None if math.isinf(steps) else steps,
        }  # fmt: skip
    edges = [
        {"from": names[edge.source], "to": names[edge.target], "probability": edge.probability}
        for edge in workflow.edges()
    ]
    return {
        "id": name, "object": "workflow", "running": _running(workflow), "agents": agents, "edges": edges,
    }  # fmt: skip
