"""The endpoints. Whatever may take long is awaited: the engine computes in its thread, bodies are read in another."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar
from urllib.parse import urlsplit

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from ..client import EngineClient
from ..errors import ServingError
from ..events import AnswerEvent
from ..hints.formats import HintReader
from ..hints.hint import Hint
from ..request import Request as EngineRequest
from ..request import shown
from ..sampling.grammar_compiler import GrammarCompiler
from ..system import System
from .agent_endpoints import AgentEndpoints
from .answer_plan import AnswerPlan, plan_chat, plan_completion
from .answers import PING, AnswerFormat, ChatFormat, CompletionFormat
from .api_errors import SERVER, ApiError, bad_request, not_found, of_serving_error
from .api_keys import ApiKeys, Caller
from .api_requests import (
    ApiBody,
    ChatBody,
    CompletionBody,
    GenerationBody,
    UnknownFields,
    parse_body,
    read_body,
)
from .cache_explanation import is_asked_for
from .call_context import read_context
from .constraint_masks import ConstraintMasks
from .event_stream import EventStream, read_bytes, unless_disconnected
from .generation import Generation
from .http_metrics import HttpMetrics
from .live_page import FILES, LivePage
from .openapi import openapi_document
from .prompts import PromptRenderer, RenderedPrompt
from .quotas import ClientLoads, Quotas
from .responses_body import ResponsesBody
from .responses_format import ResponsesFormat
from .server_config import ServerConfig

logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class Backend:
    """The engine and model behind a server.

    Attributes:
        client: of the engine, which has the model's tokenizer.
        system: of the same engine; its counters are read.
        tokenizer: of transformers.
        model_name: by which clients ask for the model.
        context_tokens: of prompt and answer together, by the model.
        grammars: of the model's vocabulary, for answers of a given form; None: these are refused.
    """

    client: EngineClient
    system: System
    tokenizer: Any
    model_name: str
    context_tokens: int
    grammars: GrammarCompiler | None = None


@dataclass(frozen=True)
class ReadCall:
    """A body, and what the engine is given for it, as the reading thread hands them over.

    Attributes:
        requests: the `n` answers of each prompt follow each other.
        hints: to be passed on before them.
        last_hints: to be passed on when they have ended.
        answers: writes the response.
        plan: of the answers.
    """

    body: GenerationBody
    requests: list[EngineRequest]
    hints: list[Hint]
    last_hints: list[Hint]
    answers: AnswerFormat
    plan: AnswerPlan


class Endpoints:
    """The handlers of all routes; they run in one event loop.

    Bodies are parsed, and prompts rendered and tokenised, one after the other in a thread of their own.
    """

    def __init__(self, backend: Backend, keys: ApiKeys, config: ServerConfig) -> None:
        self.backend, self.keys, self.config = backend, keys, config
        self.renderer = PromptRenderer(backend.tokenizer, backend.system.tiers.page_size)
        self.metrics = HttpMetrics(backend.client, backend.system, config.max_metric_clients)
        self.page = LivePage(backend.client, backend.model_name, keys.required, config.state_wait_s)
        self._hint_reader = HintReader()
        self._unknown_fields = UnknownFields(config.max_warned_fields)
        self._quotas = Quotas(keys.limits, config.max_client_requests)
        self._bodies = ClientLoads(config.max_client_bodies, "bodies")
        self._reader = ThreadPoolExecutor(1, "tenure-reader")
        self._masks = ConstraintMasks(backend.grammars)
        self.agents = AgentEndpoints(
            backend.client, backend.system, self, config, self._hint_reader.config, self._unknown_fields
        )

    # Answers ----------------------------------------------------------------------------------------------------

    async def chat(self, request: Request) -> Response:
        """An answer to a conversation."""
        return await self._generate(request, ChatBody, self._plan_chat, ChatFormat, "chatcmpl-")

    async def response(self, request: Request) -> Response:
        """An answer in the form of OpenAI's responses; nothing is stored."""
        return await self._generate(request, ResponsesBody, self._plan_chat, ResponsesFormat, "resp_")

    async def no_stored_response(self, request: Request) -> Response:
        """404: responses are not stored."""
        self.caller(request)
        id = request.path_params["id"]
        raise not_found(f"got {shown(id)} as a response; accepted: none, as responses are not stored")

    async def completion(self, request: Request) -> Response:
        """The continuation of a text."""
        return await self._generate(request, CompletionBody, self._plan_completion, CompletionFormat, "cmpl-")

    async def _generate(
        self, request: Request, kind: type[ApiBody], plan: Callable[[Any], AnswerPlan],
        format: type[AnswerFormat], prefix: str,
    ) -> Response:  # fmt: skip
        caller = self.caller(request)
        headers, id = dict(request.headers), f"{prefix}{uuid.uuid4().hex}"
        call = await self.read_body(
            request, caller, lambda raw: self._read_call(raw, headers, caller, kind, plan, format, id)
        )
        answers, requests = call.answers, call.requests
        if call.plan.constraint is not None:
            masks = await self._masks.compiled(call.plan.constraint, call.plan.field, caller.client)
            requests = [replace(one, sampling=masks.on(one.sampling)) for one in requests]
        for hint in call.hints:
            self.backend.client.hint(hint)
        generation = Generation(self.backend.client, requests, self._quotas, call.last_hints)
        if call.body.stream:
            events = generation.events(self.config.ping_s)
            # The status is sent after the first event (or ping), so that a refusal by the engine still has its own.
            first = await unless_disconnected(request, anext(events))  # pyright: ignore[reportArgumentType]
            encoded = self._encoded(first, events, generation, answers, call.body)
            headers = {"X-Request-Id": id} | generation.headers
            return EventStream(encoded, self.config.send_timeout_s, headers, events.aclose)
        choices = await unless_disconnected(request, self._collect(generation))
        return JSONResponse(answers.whole(choices, call.body.n or 1), headers={"X-Request-Id": id} | generation.headers)

    async def _collect(self, generation: Generation) -> list[AnswerEvent]:
        """The complete answers by choice."""
        found = [AnswerEvent([], None, "") for _ in generation.requests]
        async for part in generation.events(self.config.ping_s):
            if part is None:
                continue
            whole, event = found[part[0]], part[1]
            whole.tokens += event.tokens
            whole.text = (whole.text or "") + (event.text or "")
            if event.logprobs is not None:
                whole.logprobs = (whole.logprobs or []) + event.logprobs
            if event.output is not None:
                whole.output = event.output
                self.metrics.observe(event.output)
        return found

    async def _encoded(
        self, first: tuple[int, AnswerEvent] | None, events: AsyncGenerator[tuple[int, AnswerEvent] | None, None],
        generation: Generation, answers: AnswerFormat, body: GenerationBody,
    ) -> AsyncGenerator[bytes, None]:  # fmt: skip
        """The events of a stream; an error after the first is its last event, as the status has been sent."""
        part = first
        try:
            while True:
                if part is None:
                    yield PING
                else:
                    yield answers.events(*part)
                    if part[1].output is not None:
                        self.metrics.observe(part[1].output)
                try:
                    part = await anext(events)  # pyright: ignore[reportArgumentType]
                except StopAsyncIteration:
                    break
            outputs = [one for one in generation.outputs if one is not None]
            yield answers.end(outputs, body.n or 1, body.include_usage)
        except ServingError as error:
            yield answers.error(of_serving_error(error))
        except Exception:
            logger.exception("the stream %s has failed", answers.id)
            yield answers.error(internal_error())

    # Reading, in a thread ---------------------------------------------------------------------------------------

    async def read_body(self, request: Request, caller: Caller, work: Callable[[bytes], T]) -> T:
        """Receives a body, and returns the result of `work`, which reads it.

        Raises:
            ApiError: 429, too many bodies of this sender are being read; and as `read_bytes` and `_read`.
        """
        with self._bodies.admitted(self._sender(request, caller), 1):
            raw = await read_bytes(request, self.config)
            return await self._read(lambda: work(raw))

    def _sender(self, request: Request, caller: Caller) -> str:
        """Whose bodies are counted together: the client's or, without keys, where all are one, the address's."""
        if self.keys.required:
            return caller.client
        return request.client.host if request.client is not None else ""

    async def _read(self, work: Callable[[], T]) -> T:
        """The result of `work`, which reads what a client has sent.

        Raises:
            ApiError: 400 for a ValueError.
        """
        try:
            return await asyncio.get_running_loop().run_in_executor(self._reader, work)
        except ValueError as error:
            raise bad_request(str(error)) from None

    def _read_call(
        self, raw: bytes, headers: dict[str, str], caller: Caller, kind: type[ApiBody],
        plan_of: Callable[[Any], AnswerPlan], format: type[AnswerFormat], id: str,
    ) -> ReadCall:  # fmt: skip
        document = parse_body(raw, self.config)
        given, hints = read_body(kind, document, self.config, self._unknown_fields)
        body = given.generation()
        if body.model != self.backend.model_name:
            raise self._no_model(body.model)
        body.sampling()  # its mistakes are found before the work of reading the prompt
        plan = plan_of(body)
        prompts = plan.prompts
        requests: list[EngineRequest] = []
        first: list[Hint] = []
        last: list[Hint] = []
        for prompt in prompts:
            context = read_context(hints, headers, caller, self._hint_reader, prompt.agent, body.cache_salt)
            fields = context.fields | {"explain_cache": is_asked_for(body.explain_cache, headers)}
            requests += self._requests(body, prompt, len(prompts), fields, f"{id}-{len(requests)}")
            first, last = first or context.hints, last or context.last_hints
        answers = format(id, int(time.time()), body.model, self.renderer.token_text, plan.make_parser, given)
        return ReadCall(body, requests, first, last, answers, plan)

    def _requests(
        self, body: GenerationBody, prompt: RenderedPrompt, num_prompts: int, fields: dict[str, Any], id: str
    ) -> list[EngineRequest]:
        """The engine's requests for the answers to one prompt."""
        sampling, config = body.sampling(), self.config
        if num_prompts * sampling.n > config.max_choices:
            given = f"{num_prompts} prompts and n={sampling.n}"
            raise bad_request(f"got {given}; accepted: up to {config.max_choices} answers", "n")
        default = config.default_max_tokens if isinstance(body, ChatBody) else config.default_completion_tokens
        room = max(1, self.backend.context_tokens - len(prompt.ids))
        quota = self.keys.limits(fields["client"]).tokens_per_min
        if quota is not None:  # of which all answers to all prompts have their share
            room = max(1, min(room, (quota // num_prompts - len(prompt.ids)) // sampling.n))
        fields = {"fixed_tokens": prompt.fixed_tokens} | fields
        return [
            EngineRequest(
                id, prompt.ids, body.answer_tokens or min(default, room), sampling=sampling.for_choice(choice), **fields
            )
            for choice in range(sampling.n)
        ]

    def _plan_chat(self, body: ChatBody) -> AnswerPlan:
        return plan_chat(body, self.renderer)

    def _plan_completion(self, body: CompletionBody) -> AnswerPlan:
        return plan_completion(body, self.renderer, self.config.max_choices)

    # Models, health, metrics ------------------------------------------------------------------------------------

    async def models(self, request: Request) -> Response:
        """The models, of which there is one."""
        self.caller(request)
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        """A model by its name."""
        self.caller(request)
        name = request.path_params["name"]
        if name != self.backend.model_name:
            raise self._no_model(name)
        return JSONResponse(self._model())

    def _model(self) -> dict[str, Any]:
        return {
            "id": self.backend.model_name, "object": "model", "created": int(self.metrics.started_s),
            "owned_by": "tenure", "max_model_len": self.backend.context_tokens,
        }  # fmt: skip

    def _no_model(self, name: str) -> ApiError:
        return not_found(f"got {shown(name)} as model; accepted: {self.backend.model_name}", "model_not_found", "model")

    async def health(self) -> Response:
        """200 while requests are accepted; no key is needed, and nothing about clients is said."""
        health = self.backend.client.health()
        status = "ok" if health.accepting else "draining" if health.alive else "dead"
        return JSONResponse({"status": status}, 200 if health.accepting else 503)

    async def metrics_text(self, request: Request) -> Response:
        """Prometheus' metrics, for an admin."""
        self.keys.require_admin(request.headers.get("authorization"))
        text = await asyncio.to_thread(self.metrics.text)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    # The live page ----------------------------------------------------------------------------------------------

    async def page_file(self, request: Request) -> Response:
        """A file of the live page, which needs no key."""
        return self.page.file(request.url.path)

    async def state(self, request: Request) -> Response:
        """The data of the live page, for an admin."""
        self.keys.require_admin(request.headers.get("authorization"))
        self._require_same_origin(request)
        return await self.page.state()

    # Cache ------------------------------------------------------------------------------------------------------

    async def flush(self, request: Request) -> Response:
        """Discards all cached KV, for an admin."""
        self.keys.require_admin(request.headers.get("authorization"))
        self._require_same_origin(request)
        await asyncio.wrap_future(self.backend.client.flush())
        return JSONResponse({"status": "flushed"})

    # Checks -----------------------------------------------------------------------------------------------------

    def caller(self, request: Request) -> Caller:
        """The sender of the request.

        Raises:
            ApiError: 401, no known key; 403, see `_require_same_origin`.
        """
        caller = self.keys.caller(request.headers.get("authorization"))
        request.state.client = caller.client  # for the metrics
        self._require_same_origin(request)
        return caller

    def _require_same_origin(self, request: Request) -> None:
        """A page of another site that is open in a browser must not use a server without keys on that machine."""
        if self.keys.required:  # which such a page does not have
            return
        origin = request.headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != request.headers.get("host"):
            raise ApiError(403, f"got the origin {shown(origin)}; accepted: pages of this server", code="cross_origin")

    def error_response(self, error: ApiError) -> Response:
        """An error as a response."""
        return JSONResponse(error.document(), error.status, error.headers(self.config.retry_after_s))


def internal_error() -> ApiError:
    """Status 500; the reason is in the log and of no concern to a client."""
    return ApiError(500, "the server has failed to answer; the operator's log says why", SERVER, code="internal_error")


class Gateway:
    """ASGI middleware: refuses headers that are too long, and counts requests by route and status."""

    def __init__(self, app: Any, endpoints: Endpoints) -> None:
        self._app, self._endpoints = app, endpoints

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 500

        async def noting(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        config, metrics = self._endpoints.config, self._endpoints.metrics
        size = len(scope["path"]) + len(scope["query_string"]) + sum(len(a) + len(b) for a, b in scope["headers"])
        try:
            if size > config.max_header_bytes:
                error = ApiError(431, f"got {size} bytes of headers; accepted: up to {config.max_header_bytes}")
                await self._endpoints.error_response(error)(scope, receive, noting)
            else:
                await self._app(scope, receive, noting)
        finally:
            route = getattr(scope.get("route"), "path", "none")
            metrics.observe_request(route, status, scope.get("state", {}).get("client"))


def build_app(backend: Backend, keys: ApiKeys | None = None, config: ServerConfig | None = None) -> FastAPI:
    """The application, for any ASGI server; `run_server` runs it with uvicorn.

    Args:
        keys: that are accepted; None: no key is asked for.
    """
    config = config or ServerConfig()
    endpoints = Endpoints(backend, keys or ApiKeys(), config)
    # The pages of documentation load scripts from other hosts.
    app = FastAPI(title="tenure", docs_url=None, redoc_url=None, openapi_url="/openapi.json")
    routes: list[tuple[str, str, Callable[..., Any]]] = [
        ("POST", "/v1/chat/completions", endpoints.chat),
        ("POST", "/v1/completions", endpoints.completion),
        ("POST", "/v1/responses", endpoints.response),
        ("GET", "/v1/responses/{id:path}", endpoints.no_stored_response),
        ("GET", "/v1/models", endpoints.models),
        ("GET", "/v1/models/{name:path}", endpoints.model),
        ("GET", "/health", endpoints.health),
        ("GET", "/metrics", endpoints.metrics_text),
        ("GET", "/v1/workflows", endpoints.agents.workflows),
        ("POST", "/v1/workflows", endpoints.agents.add_workflow),
        ("GET", "/v1/workflows/{name:path}", endpoints.agents.workflow),
        ("PUT", "/v1/workflows/{name:path}", endpoints.agents.replace_workflow),
        ("DELETE", "/v1/workflows/{name:path}", endpoints.agents.end_workflow),
        ("GET", "/v1/sessions/{id:path}", endpoints.agents.session),
        ("DELETE", "/v1/sessions/{id:path}", endpoints.agents.end_session),
        ("PUT", "/v1/sessions/{id:path}", endpoints.agents.keep_session),
        ("POST", "/admin/flush", endpoints.flush),
        ("GET", "/admin/state", endpoints.state),
        *(("GET", path, endpoints.page_file) for path in FILES),
    ]
    for method, path, handler in routes:
        app.add_api_route(path, handler, methods=[method], response_model=None)
    document = openapi_document(routes, backend.model_name, endpoints.keys.required)
    app.openapi = lambda: document

    async def api_error(_: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError), "registered for it"
        return endpoints.error_response(error)

    async def serving_error(_: Request, error: Exception) -> Response:
        assert isinstance(error, ServingError), "registered for it"
        return endpoints.error_response(of_serving_error(error))

    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException), "registered for it"
        known = ", ".join(f"{method} {path.replace(':path', '')}" for method, path, _ in routes)
        given = f"{request.method} {request.url.path[:100]}"
        found = ApiError(error.status_code, f"got {given}; accepted: {known}", code="not_found")
        return endpoints.error_response(found)

    async def other_error(_: Request, error: Exception) -> Response:
        return endpoints.error_response(internal_error())

    app.add_exception_handler(ApiError, api_error)
    app.add_exception_handler(ServingError, serving_error)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(Exception, other_error)
    app.add_middleware(Gateway, endpoints=endpoints)
    return app
