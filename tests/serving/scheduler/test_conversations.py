"""Hints about sessions concern the sessions' own conversations, also where one agent has all of them."""

from __future__ import annotations

import pytest

from tenure.serving import Hint, HintReader, PredictionConfig, Tier
from tenure.serving.conversations import Conversations
from tenure.serving.hints import ActionKind, HintAction, SessionAction
from tenure.serving.kvcache.radix_tree import Pages

FIXED = list(range(20))


class Talks:
    """Conversations of one agent: each turn appends 20 tokens of its session."""

    def __init__(self, driver, sessions, clients=None):
        self.driver, self.clients = driver, clients or dict.fromkeys(sessions, "")
        self.prompts = {session: list(FIXED) for session in sessions}
        self.number = 0

    def turn(self, session):
        self.number += 1
        prompt = self.prompts[session]
        prompt += [10_000 + 1000 * list(self.prompts).index(session) + len(prompt) + n for n in range(20)]
        return self.driver.serve(
            f"{session} {self.number}", prompt, agent="assistant", fixed_tokens=20, session=session[0],
            client=self.clients[session],
        )  # fmt: skip

    def hint(self, source, document, session):
        reader = HintReader()
        self.driver.scheduler.hint(reader.read(source, document, self.clients[session], "assistant", session[0]))

    def cached(self, session):
        return self.driver.system.tiers.lookup(self.prompts[session]).length


def keep(ttl=3000):
    return {"session_id": "a", "actions": [{"action_type": "kv.retain", "payload": {"priority": 100, "ttl": ttl}}]}


@pytest.mark.parametrize("name", ["ste", "ste_prefetch", "expected_time"])
@pytest.mark.parametrize("hinted", [True, False])
def test_a_keep_keeps_the_conversation_of_a_session(make_driver, name, hinted):
    """Room for seven conversations on device and host; twelve others follow, and then the kept one goes on."""
    driver = make_driver(name, device=160, host=160)
    talks = Talks(driver, "abcdefghijklm")
    for session in "bcdefgh":  # it has been seen that suffixes are seldom used again
        talks.turn(session)
    talks.turn("a")
    talks.turn("a")
    if hinted:
        talks.hint("kv_hints", keep(), "a")
    for session in "bcdefghijklm":
        talks.turn(session)
        talks.turn(session)
    found = talks.turn("a").cached_tokens
    assert found == (60 if hinted else 20), "two turns and the fixed prompt"
    if hinted:
        for session in "bcdefghijklm":
            talks.turn(session)
        assert talks.turn("a").cached_tokens == 80, "it is kept until the hint expires, with what it appends"


def test_a_keep_sent_with_the_first_request_keeps_what_follows(make_driver):
    driver = make_driver("expected_time", device=160, host=160)
    talks = Talks(driver, "abcdefghijklm")
    talks.hint("vllm", {"session_id": "a", "cache_control": {"ttl": 3000}}, "a")
    talks.turn("a")
    for session in "bcdefghijklm":
        talks.turn(session)
        talks.turn(session)
    assert talks.turn("a").cached_tokens == 40


def test_a_kept_conversation_is_an_ordinary_one_when_the_hint_expires(make_driver):
    driver = make_driver("expected_time", device=160, host=160)
    tree, talks = driver.system.tiers.tree, Talks(driver, "ab")
    talks.turn("a")
    talks.hint("kv_hints", keep(ttl=30), "a")
    driver.begin()
    assert tree.prompt_ends["session:a"].end == 40 and tree.prompt_ends["assistant"].end == 20
    driver.clock.advance_to(driver.clock() + 31)
    driver.begin()
    assert "session:a" not in tree.prompt_ends and talks.cached("a") == 40
    assert driver.system.predictor.conversations.agent(("", "session:a")) is None
    driver.system.tiers.check()


@pytest.mark.parametrize("name", ["lru", "lru_reactive", "ste", "expected_time"])
@pytest.mark.parametrize("running", [False, True])
def test_the_end_of_a_session_releases_its_conversation_first(make_driver, name, running):
    """The session used last is over: what only it used is evicted first, and the fixed prompt of all stays."""
    driver = make_driver(name, device=200)
    talks = Talks(driver, "abc")
    for session in "abc":
        talks.turn(session)
    close = {"session_control": {"session_id": "c", "action": "close"}}
    if running:  # the client says so while the last call is still computed
        driver.scheduler.hint(Hint("x", session="c", session_action=SessionAction.CLOSE))
        driver.submit("last", [*talks.prompts["c"], *range(500, 520)], 2, agent="assistant", session="c")
        driver.scheduler.hint(HintReader().read("dynamo", close, agent="assistant"))
        driver.run()
        talks.prompts["c"] += range(500, 520)
    else:
        driver.scheduler.hint(HintReader().read("dynamo", close, agent="assistant"))
    driver.begin()
    tiers = driver.system.tiers
    victim = tiers.storage.queues[Tier.DEVICE].first()
    assert victim is not None and victim.end == len(talks.prompts["c"]) and not victim.fixed
    assert victim is tiers.lookup(talks.prompts["c"]).nodes[-1]


def test_a_session_that_goes_on_after_its_end_is_used_again(make_driver):
    driver = make_driver("lru_reactive", device=200)
    talks = Talks(driver, "ab")
    talks.turn("a")
    talks.hint("dynamo", {"session_control": {"session_id": "a", "action": "close"}}, "a")
    talks.turn("b")
    talks.turn("a")
    driver.begin()
    victim = driver.system.tiers.storage.queues[Tier.DEVICE].first()
    assert victim is driver.system.tiers.lookup(talks.prompts["b"]).nodes[-1]


def test_sessions_of_two_clients_with_one_name_are_two(make_driver):
    driver = make_driver("ste", device=400)
    talks = Talks(driver, ["a1", "a2"], {"a1": "one", "a2": "two"})
    talks.turn("a1")
    talks.turn("a2")
    talks.hint("kv_hints", keep(), "a1")
    talks.hint("kv_hints", keep(), "a2")
    driver.begin()
    tiers = driver.system.tiers
    ends = {agent: node for agent, node in tiers.tree.prompt_ends.items() if agent.startswith("session:")}
    assert ends == {
        "session:a": tiers.lookup(talks.prompts["a1"]).nodes[-1],
        "session:a@two": tiers.lookup(talks.prompts["a2"]).nodes[-1],
    }


def test_a_document_that_names_an_agent_means_the_agent(make_driver):
    driver = make_driver("ste", device=400)
    talks = Talks(driver, "ab")
    talks.turn("a")
    talks.hint("sglang", {"agent_id": "assistant", "reuse_hint": "keep"}, "a")
    driver.begin()
    assert driver.system.predictor.steps("assistant") < 2
    assert "session:a" not in driver.system.tiers.tree.prompt_ends


def test_conversations_are_bounded():
    known = Conversations(max_sessions=3, max_bytes=100)
    for number in range(10):
        known.observe(("", f"session:{number}"), Pages(b"x" * 20), None)
    assert list(known._prompts) == [("", f"session:{n}") for n in (7, 8, 9)] and known._bytes == 60
    known.observe(("", "session:8"), Pages(b"x" * 90), None)
    assert list(known._prompts) == [("", "session:8")] and known._bytes == 90
    known.observe(("", "session:1"), Pages(b"x" * 101), None)
    assert not known._prompts and known._bytes == 0


def test_a_hint_about_an_unknown_session_changes_nothing(make_driver):
    driver = make_driver("expected_time", device=200)
    action = HintAction(ActionKind.RETAIN, "session:never", 1.0, 10.0)
    driver.scheduler.hint(Hint("kv_hints", client="c", session="never", actions=(action,)))
    driver.begin()
    driver.clock.advance_to(driver.clock() + 11)
    driver.begin()
    conversations = driver.system.predictor.conversations
    assert not conversations._agents and not conversations._sessions and not conversations._tagged


@pytest.mark.parametrize("name", ["max_sessions", "max_session_bytes", "held_steps"])
def test_bounds_are_checked(name):
    with pytest.raises(ValueError, match=f"got 0 as {name}; accepted: a (whole )?number"):
        PredictionConfig(**{name: 0})  # pyright: ignore[reportArgumentType]
