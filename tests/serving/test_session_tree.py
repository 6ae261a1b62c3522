"""Sub-agents and the sessions that wait for them: who is released when, and what it does to the cache."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tenure.eviction import evict
from tenure.serving import Hint, LinearCosts, MemoryPool, Request, ThreadedTransfer, Tier, VirtualClock, build_system
from tenure.serving.engine import Engine
from tenure.serving.hints import SessionAction
from tenure.serving.prompt_cache import PromptKV
from tenure.serving.session_tree import SessionTree, SessionTreeConfig

ROOT, CHILD, OTHER, BELOW = (("c", f"session:{name}") for name in ("root", "child", "other", "below"))
PAGE = 16


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock()


def test_a_session_waits_until_its_last_sub_agent_ends(clock):
    tree = SessionTree(clock)
    assert tree.link(CHILD, ROOT) == tree.link(OTHER, ROOT) == tree.link(CHILD, ROOT) == []
    assert ROOT in tree and tree.children(ROOT) == [CHILD, OTHER] and tree.parent(CHILD) == ROOT and len(tree) == 2
    assert tree.end(CHILD) == [] and tree.end(CHILD) == [] and ROOT in tree
    assert tree.end(OTHER) == [ROOT] and ROOT not in tree and len(tree) == 0


def test_the_activity_of_a_sub_agent_keeps_all_above_it(clock):
    tree = SessionTree(clock, SessionTreeConfig(silence_s=10.0))
    tree.link(CHILD, ROOT)
    tree.link(BELOW, CHILD)
    for now in (6.0, 12.0, 18.0):
        clock.advance_to(now)
        tree.observe(BELOW)
        assert tree.pop_silent() == []
    clock.advance_to(28.5)
    assert set(tree.pop_silent()) == {ROOT, CHILD} and len(tree) == 0


def test_a_parent_that_ends_forgets_its_sub_agents(clock):
    tree = SessionTree(clock)
    tree.link(CHILD, ROOT)
    assert tree.release(ROOT) == [ROOT] and tree.release(ROOT) == [] and tree.parent(CHILD) is None
    clock.advance_to(1e6)
    assert tree.pop_silent() == []


def test_no_circles_no_other_clients_and_one_parent(clock):
    tree = SessionTree(clock)
    tree.link(CHILD, ROOT)
    tree.link(BELOW, CHILD)
    for child, parent in ((ROOT, ROOT), (ROOT, BELOW), (ROOT, CHILD), (("d", "session:x"), ROOT)):
        assert tree.link(child, parent) == [] and tree.parent(child) is None
    assert tree.link(BELOW, OTHER) == [CHILD] and tree.children(OTHER) == [BELOW]


def test_sub_agents_are_bounded(clock):
    tree = SessionTree(clock, SessionTreeConfig(max_children=3))
    released = []
    for number in range(10):
        clock.advance_to(float(number))
        released += tree.link(("c", f"session:child-{number}"), ("c", f"session:root-{number}"))
    assert released == [("c", f"session:root-{number}") for number in range(7)] and len(tree) == 3


@pytest.fixture
def session(tiny_model) -> Iterator[object]:
    with evict(tiny_model("llama", vocab_size=256, max_position_embeddings=2048), "full") as session:
        yield session


class Served:
    """An engine with memory for 1024 tokens on the device, and half of that on the host."""

    def __init__(self, session, tokens: int = 1024, silence_s: float = 300.0) -> None:
        rate = PromptKV(session).bytes_per_token()
        pools = {Tier.DEVICE: MemoryPool(rate * tokens), Tier.HOST: MemoryPool(rate * tokens // 2)}
        self.system = build_system(
            "expected_time", pools, ThreadedTransfer(), costs=LinearCosts(2000.0, (1e8, 1e8)), bytes_per_token=rate,
            clock=time.monotonic, page_size=PAGE, learn=True,
        )  # fmt: skip
        self.system.predictor.session_tree.config = SessionTreeConfig(silence_s=silence_s)
        self.engine = Engine(session, self.system)

    def call(self, seed: int, name: str, parent: str | None = None, tokens: int = 256) -> int:
        """Answers a prompt in the session `name`; returns how many of its tokens were cached."""
        if parent is not None:
            self.engine.hint(Hint("server", session=name, parent_session=parent))
        prompt = [(seed * 31 + i * 7) % 251 for i in range(tokens)]
        self.engine.submit(Request("r", prompt, 2, session=name))
        (output,) = self.engine.run()
        assert output.error is None
        return output.cached_tokens

    def end(self, name: str) -> None:
        self.engine.hint(Hint("server", session=name, session_action=SessionAction.CLOSE))
        self.engine.step(0.0)


@pytest.fixture
def serve(session) -> Iterator[Callable[..., Served]]:
    """Makes engines; what they have stored is checked at the end."""
    made: list[Served] = []

    def make(**options: Any) -> Served:
        made.append(Served(session, **options))
        return made[-1]

    yield make
    for served in made:
        served.system.tiers.check()
        served.system.close()


@pytest.mark.parametrize("linked", [True, False])
def test_the_prompt_of_a_parent_stays_while_its_sub_agents_run(serve, linked):
    """Without the link, what the sub-agents compute evicts it from both tiers."""
    served = serve()
    assert served.call(0, "root") == 0
    for number in range(1, 13):
        served.call(number, f"child-{number}", "root" if linked else None)
    found = served.call(0, "root")
    assert (found >= 240) is linked and (found == 0) is not linked


def test_a_parent_is_released_when_its_sub_agents_end_and_fetched(serve):
    served = serve()
    served.call(0, "root")
    served.call(1, "child", "root")
    predictor = served.system.predictor
    assert predictor.reuse("session:root") == 1.0 and predictor.steps("session:root") == 0.0
    assert "session:root" in served.system.tiers.agents()
    served.end("child")
    assert "session:root" not in predictor._parent_agents
    hint = predictor.hints.current("session:root")
    assert hint is not None and hint.steps == 0.0 and not hint.persistent, "it is called next"
    served.call(0, "root")
    served.engine.step(0.0)
    assert predictor.hints.current("session:root") is None
    for number in range(2, 14):
        served.call(number, f"later-{number}")
    assert served.call(0, "root") == 0, "nothing is kept for good"


def test_a_parent_whose_sub_agents_fall_silent_is_released(serve):
    served = serve(silence_s=0.05)
    served.call(0, "root")
    served.call(1, "child", "root")
    time.sleep(0.06)
    served.engine.step(0.0)
    assert not served.system.predictor._parent_agents and len(served.system.predictor.session_tree) == 0
    assert "session:root" not in served.system.tiers.agents()


def test_a_parent_that_is_ended_or_given_up_is_not_kept(serve):
    served = serve()
    served.call(0, "root")
    served.call(1, "child", "root")
    served.end("root")
    assert "session:root" not in served.system.tiers.agents()
    assert served.system.predictor.reuse("session:root") == 0.0
