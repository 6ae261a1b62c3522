"""A server of a tiny model on loopback, with an engine of its own for comparison."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tenure.eviction import Session, evict
from tenure.serving import EngineClient, LinearCosts, MemoryPool, System, ThreadedTransfer, Tier, build_system
from tenure.serving.engine import Compression, Engine
from tenure.serving.prompt_cache import PromptKV
from tenure.serving.sampling.grammar_compiler import GrammarCompiler
from tenure.serving.sampling.grammar_config import GrammarConfig
from tenure.serving.server import ApiKeys, Backend, Caller, ServerConfig, bind, build_app
from tenure.serving.server.http_server import DrainingServer, make_server

from ..engines import gates_of

PAGE, CONTEXT = 16, 2048
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
KEYS = {
    "key-of-team-a-0123456789": Caller("team-a", False),
    "key-of-team-b-0123456789": Caller("team-b", False),
    "key-of-the-admin-0123456": Caller("operator", True),
}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token a byte, after <pad>, <|im_start|> and <|im_end|>."""
    special = ["<pad>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate([*special, *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<|im_end|>")
    wrapped.chat_template = TEMPLATE
    return wrapped


class PacedEngine(Engine):
    """An engine that calls `between` before each step."""

    between: Callable[[], None] = staticmethod(lambda: None)

    def step(self, patience_s: float = 0.1) -> list[Any]:
        self.between()
        return super().step(patience_s)


@dataclass
class Served:
    """A running server.

    Attributes:
        url: with the version, as clients want it.
    """

    url: str
    engine: PacedEngine
    client: EngineClient
    system: System
    tokenizer: PreTrainedTokenizerFast
    server: DrainingServer
    stop: Callable[[], None]

    @property
    def root(self) -> str:
        return self.url.removesuffix("/v1")

    def post(self, path: str, json: Any = None, **options: Any) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", json=json, timeout=60, **options)

    def until(self, condition: Callable[[], bool], seconds: float = 20.0) -> None:
        """Waits for `condition`."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "the condition does not hold in time"
            time.sleep(0.005)

    def connections(self) -> set[Any]:
        """The open ones, of clients."""
        return self.server.server_state.connections

    def unfinished(self) -> int:
        health = self.client.health()
        return health.num_waiting + health.num_running


@pytest.fixture
def model(tiny_model):
    return tiny_model("llama", vocab_size=259, max_position_embeddings=CONTEXT)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture
def session(model) -> Iterator[Session]:
    with evict(model, "full", gates=gates_of(model), observe=["retention"]) as session:
        yield session


@pytest.fixture
def make_engine(session, tokenizer) -> Iterator[Callable[..., PacedEngine]]:
    """Makes engines of the tiny model, each with a system of its own; closed at the end."""
    made: list[System] = []

    def make(compression: Compression | None = None, tokens: int = 8192, **options: Any) -> PacedEngine:
        rate = PromptKV(session).bytes_per_token()
        pools: dict[Tier, Any] = {Tier.DEVICE: MemoryPool(rate * tokens), Tier.HOST: MemoryPool(rate * tokens)}
        made.append(
            build_system(
                "expected_time", pools, ThreadedTransfer(), costs=LinearCosts(2000.0, (1e8, 1e8)),
                bytes_per_token=rate, clock=time.monotonic, page_size=PAGE, learn=True, **options,
            )
        )  # fmt: skip
        return PacedEngine(session, made[-1], compression, tokenizer)

    yield make
    for system in made:
        system.close()
        system.tiers.check()


@pytest.fixture(scope="session")
def make_grammars() -> Iterator[Callable[..., GrammarCompiler]]:
    """The compiler of grammars for an engine; shared by tests, as its processes take a second to start."""
    made: dict[Any, GrammarCompiler] = {}

    def make(engine: PacedEngine, config: GrammarConfig | None = None) -> GrammarCompiler:
        key = engine.vocab_size, engine.end_token_ids, config
        if key not in made:
            made[key] = GrammarCompiler(byte_tokenizer(), *key)
        return made[key]

    yield make
    for one in made.values():
        one.close()


@pytest.fixture
def serve(make_engine, tokenizer, make_grammars) -> Iterator[Callable[..., Served]]:
    """Starts servers on free ports, each in a thread; stopped at the end."""
    stops: list[Callable[[], None]] = []

    def start(
        keys: ApiKeys | None = None, config: ServerConfig | None = None, compression: Compression | None = None,
        grammars: GrammarConfig | None = None, **options: Any,
    ) -> Served:  # fmt: skip
        engine = make_engine(compression, **options)
        client, config = EngineClient(engine), config or ServerConfig(drain_s=5.0)
        backend = Backend(client, engine.system, tokenizer, "tiny", CONTEXT, make_grammars(engine, grammars))
        ready, listening = threading.Event(), bind("127.0.0.1", 0)
        server = make_server(build_app(backend, keys, config), client, config, ready.set)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        assert ready.wait(20), "the server starts"

        def stop() -> None:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive(), "the server stops"

        stops.append(stop)
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        return Served(url, engine, client, engine.system, tokenizer, server, stop)

    yield start
    for stop in stops:
        stop()


@pytest.fixture
def served(serve) -> Served:
    return serve()


@pytest.fixture
def keys() -> ApiKeys:
    return ApiKeys(KEYS)
