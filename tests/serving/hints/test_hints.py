"""Wire formats into one type: what is understood, what is bounded, what is refused, what is warned about."""

from __future__ import annotations

import warnings

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tenure.serving import Hint, HintReader, Request, StorePolicy, VirtualClock, hint_formats, request_fields
from tenure.serving.hints import ActionKind, HintAction, HintConfig, HintStore, SessionAction
from tenure.serving.hints.hint import normalised


def read(source, document, **sender) -> Hint:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return HintReader().read(source, document, **sender)


def test_sglang():
    document = {
        "workflow_id": "w",
        "agent_id": "coder",
        "step_id": "s3",
        "step_index": 3,
        "total_steps": 9,
        "parent_step_id": "s2",
        "children_step_ids": ["tester", "writer"],
        "tool_name": "bash",
        "expected_tool_duration_ms": 1500,
        "cache_ttl_ms": 60_000,
        "shared_prefix_hash": "abc",
        "reuse_hint": "keep",
    }
    hint = read("sglang", document, client="c")
    assert hint == Hint(
        "sglang",
        "c",
        workflow="w",
        agent="coder",
        pause_s=1.5,
        steps={"tester": 1.0, "writer": 1.0},
        ttl_s=60.0,
        actions=(HintAction(ActionKind.RETAIN, "coder", 0.9, 60.0),),
    )
    assert request_fields(hint) == {"workflow": "w", "agent": "coder", "client": "c"}
    discard = read("sglang", {"step_id": "s3", "reuse_hint": "discard"})
    assert (
        discard.store_policy is StorePolicy.DISCARD
        and discard.actions[0].kind is ActionKind.EVICT
        and discard.agent == "s3"
    )
    assert read("sglang", {"agent_id": "a", "reuse_hint": "neutral"}).actions == ()
    assert read("sglang", {"agent_id": 7}).agent == "7"


def test_dynamo():
    document = {
        "agent_hints": {"priority": 50, "osl": 256, "speculative_prefill": True},
        "session_control": {"session_id": "s", "action": "open", "timeout": 120},
    }
    hint = read("dynamo", document)
    assert (hint.priority, hint.expected_tokens, hint.session) == (0.75, 256, "s")
    assert hint.session_action is SessionAction.OPEN
    assert hint.actions == (HintAction(ActionKind.FETCH, "session:s", 0.5, 120.0),)
    assert request_fields(hint) == {"agent": "session:s", "session": "s", "priority": 0.75, "expected_tokens": 256}
    assert read("dynamo", {"agent_hints": {"priority": -1e6}}).priority == 0
    assert read("dynamo", {"agent_hints": {"priority": 0}}).priority == 0.5
    assert read("dynamo", {"agent_hints": {"strict_priority": 3}}).priority == 1.0
    closed = read("dynamo", {"session_control": {"session_id": "s", "action": "close"}}, agent="planner")
    assert closed.actions == (HintAction(ActionKind.EVICT, "session:s", 0.5, 300.0),), "others go on calling planner"
    assert read("dynamo", {"agent_hints": {"speculative_prefill": True}}, agent="a").actions[0].agent == "a"


def test_the_sessions_of_dynamo_today():
    document = {
        "agent_context": {"session_id": "child", "parent_session_id": "root", "session_final": True, "compaction": {}},
        "cache_salt": "salt",
    }
    hint = read("dynamo", document, agent="planner")
    assert (hint.session, hint.parent_session, hint.cache_salt) == ("child", "root", "salt")
    assert hint.session_action is SessionAction.CLOSE
    assert hint.actions == (HintAction(ActionKind.EVICT, "session:child", 0.5, 300.0),)
    assert read("dynamo", {"agent_context": {"session_id": "s"}}).session_action is None


def test_sglang_session_params():
    hint = read("sglang_session", {"id": "s", "rid": None, "offset": 0, "replace": False}, agent="planner")
    assert (hint.session, hint.agent, hint.actions) == ("s", "planner", ())
    with pytest.raises(ValueError, match=r"got 'r1' as session_params.rid; accepted: no such field"):
        read("sglang_session", {"id": "s", "rid": "r1"})


def test_vllm_transfer_params():
    fetch = {"action_type": "kv.fetch", "payload": {"agent_id": "a"}}
    document = {"do_remote_prefill": True, "remote_host": "h", "kv_hints": {"message_id": "m", "actions": [fetch]}}
    hint = read("vllm_transfer", document, session="s")
    assert (hint.source, hint.message) == ("vllm_transfer", "m") and hint.actions[0].agent == "a"
    assert read("vllm_transfer", {"do_remote_decode": False, "kv_hint": {"migrate": 1}}, agent="a").actions == ()


def test_blocks_on_other_engines_are_not_fetched():
    payload = {"source_control_endpoint": "tcp://10.0.0.1:25000", "block_hashes": list(range(5000)), "mode": "copy"}
    action = {"action_id": "1", "action_type": "kv.fetch", "action_version": "1.0", "payload": payload}
    assert read("kv_hints", {"protocol_version": "0.1", "actions": [action]}, agent="a", session="s").actions == ()
    named = {"actions": [action | {"payload": payload | {"session_id": "s"}}]}
    assert read("kv_hints", named).actions[0] == HintAction(ActionKind.FETCH, "session:s", 0.5, 300.0)


def test_vllm():
    document = {
        "session_id": "s",
        "parent_session_id": "p",
        "cache_control": {"type": "ephemeral", "ttl": 7200, "block_offset": 12},
        "context_management": {
            "manage_request": False,
            "edits": [{"type": "offload", "block_start": 0, "block_end": 4}, {"type": "prefetch"}, {"type": "evict"}],
        },
    }
    hint = read("vllm", document)
    assert (hint.session, hint.parent_session) == ("s", "p")
    assert [action.kind.name for action in hint.actions] == ["RETAIN", "EVICT", "FETCH", "EVICT"]
    assert hint.actions[0].ttl_s == 3600.0, "no longer than an hour"
    assert read("vllm", {"session_id": "s", "cache_control": {}}).actions[0].ttl_s == 300.0


def test_kv_hints():
    document = {
        "protocol_version": "1.0",
        "message_id": "m",
        "actions": [
            {
                "action_id": "1",
                "action_type": "kv.retain",
                "action_version": 1,
                "payload": {"priority": 100, "ttl": 30, "token_range": [0, 512], "agent_id": "a"},
            },
            {"action_id": "2", "action_type": "kv.evict", "payload": {"session_id": "s"}},
            {"action_id": "3", "action_type": "kv.fetch", "payload": {"agent_id": "b", "duration_ms": 1500}},
        ],
    }
    hint = read("kv_hints", document)
    assert hint.message == "m" and hint.fixed_tokens == 512
    assert hint.actions == (
        HintAction(ActionKind.RETAIN, "a", 1.0, 30.0),
        HintAction(ActionKind.EVICT, "session:s", 0.5, 300.0),
        HintAction(ActionKind.FETCH, "b", 0.5, 1.5),
    )


def test_tensorrt():
    document = {
        "token_range_retention_configs": [
            {"token_start": 0, "token_end": 100, "priority": 80, "duration_ms": 30_000},
            {"token_start": 100, "token_end": None, "priority": 10},
        ],
        "decode_retention_priority": 0,
        "decode_duration_ms": 5,
        "transfer_mode": "DRAM",
        "directory": "",
    }
    hint = read("tensorrt", document, session="s")
    assert (hint.fixed_tokens, hint.store_policy) == (100, StorePolicy.DISCARD)
    (action,) = hint.actions
    assert (action.agent, action.ttl_s) == ("session:s", 30.0) and action.priority == pytest.approx(0.5 + 0.5 * 45 / 65)
    whole = read("tensorrt", {"token_range_retention_configs": [{"token_start": 0, "priority": 36}]}, agent="a")
    request = Request("r", [1, 2, 3], 1, **request_fields(whole))
    assert request.agent == "a" and request.fixed_tokens == 2**31 - 1
    default = read("tensorrt", {"token_range_retention_configs": [{"token_end": 9, "priority": 35}]}, agent="a")
    assert default.fixed_tokens is None and default.actions == ()


def test_kvflow():
    hint = read("kvflow", {"agent_id": "a", "agent_data": {"a": 0, "b": 2, "c": -1}, "timestep_cnt": 7})
    assert (hint.agent, hint.sequence) == ("a", 7) and hint.steps == {"a": 0.0, "b": 2.0, "c": 1e9}
    assert read("kvflow", {"timestep_data": {"0": ["a"], "3": ["a", "b"]}}).steps == {"a": 0.0, "b": 3.0}


@pytest.mark.parametrize(
    ("source", "document", "message"),
    [
        ("sglang", [], "got list as agent_hints; accepted: an object with fields"),
        ("sglang", {"agent_id": []}, r"got list as agent_hints.agent_id; accepted: a string of 1 to 256"),
        ("sglang", {"agent_id": "x" * 300}, "agent_hints.agent_id; accepted: a string of 1 to 256"),
        ("sglang", {"cache_ttl_ms": -5}, "got -5 as agent_hints.cache_ttl_ms; accepted: a number from 0"),
        ("sglang", {"cache_ttl_ms": float("nan")}, "accepted: a finite number"),
        ("sglang", {"reuse_hint": "pin"}, "got 'pin' as agent_hints.reuse_hint; accepted: keep, neutral, discard"),
        ("sglang", {"step_index": 5, "total_steps": 3}, "got agent_hints.step_index=5 of total_steps=3"),
        ("sglang", {"step_index": True}, "got True as agent_hints.step_index; accepted: a whole number"),
        ("sglang", {"children_step_ids": [None]}, "got NoneType as agent_hints.children_step_ids; accepted: a string"),
        ("kvflow", {"agent_data": {None: 3}}, "got NoneType as kvflow.agent_data; accepted: a string"),
        ("sglang", {"children_step_ids": "ab"}, "accepted: a list of up to 1024 items"),
        ("sglang", {"children_step_ids": ["a"] * 2000}, "accepted: a list of up to 1024 items"),
        ("sglang", {str(n): n for n in range(2000)}, "got 2000 fields in agent_hints; accepted: up to 1024"),
        ("dynamo", {"agent_hints": {"osl": 0}}, "got 0 as nvext.agent_hints.osl; accepted: a whole number from 1"),
        ("dynamo", {"agent_hints": {"speculative_prefill": "yes"}}, "accepted: true or false"),
        ("dynamo", {"session_control": {"action": "pin"}}, "accepted: open, bind, close"),
        ("vllm", {"cache_control": {"ttl": "5"}}, "got '5' as agent_hint.cache_control.ttl; accepted: a finite number"),
        ("vllm", {"context_management": {"manage_request": True}}, "manage_request; accepted: false"),
        ("sglang_session", {"id": []}, "got list as session_params.id"),
        ("dynamo", {"agent_context": {"session_final": "yes"}}, "agent_context.session_final; accepted: true or false"),
        ("vllm_transfer", {"kv_hints": 3}, "got int as kv_hints; accepted: an object"),
        ("kv_hints", {"actions": [{"action_type": "kv.retain", "payload": {"priority": 101}}]}, "from 0 to 100"),
        ("kv_hints", {"actions": [{"action_type": "kv.retain", "payload": {"token_range": [9, 2]}}]}, "start and end"),
        ("kv_hints", {"actions": [7]}, "got int as kv_hints.actions; accepted: an object"),
        ("tensorrt", {"token_range_retention_configs": [{"token_start": 9, "token_end": 2}]}, "from 9 to 2"),
        ("kvflow", {"agent_data": {"a": "soon"}}, "got 'soon' as steps of an agent; accepted: a number from 0 up"),
        ("kvflow", {"agent_data": {"a": -7}}, "got '-7' as steps"),
        ("kvflow", {"timestep_data": {"x": ["a"]}}, "got 'x' as steps"),
        ("morse", {}, "unknown hint format 'morse'; known: dynamo, kv_hints, kvflow, sglang, sglang_session, "),
    ],
)
def test_wrong_values_are_one_clear_error(source, document, message):
    with pytest.raises(ValueError, match=message) as raised:
        read(source, document)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 300


def test_unknown_fields_are_warned_about_once():
    reader = HintReader()
    with pytest.warns(UserWarning, match="unknown fields of hints are ignored: agent_hints.mood, agent_hints.pin"):
        reader.read("sglang", {"agent_id": "a", "mood": 1, "pin": True})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reader.read("sglang", {"agent_id": "b", "mood": 2})
    with pytest.warns(UserWarning, match=r"agent_hints\.a\?WARNING"):
        reader.read("sglang", {"a\nWARNING": 1})
    with pytest.warns(UserWarning, match=r"kv_hints.actions.action_type=kv.compress"):
        assert reader.read("kv_hints", {"actions": [{"action_type": "kv.compress"}]}).actions == ()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
NAMES = (
    "agent_id", "session_id", "children_step_ids", "cache_ttl_ms", "agent_hints", "session_control", "priority", "osl",
    "cache_control", "context_management", "edits", "type", "ttl", "actions", "action_type", "payload", "token_range",
    "token_range_retention_configs", "token_end", "agent_data", "timestep_data", "timestep_cnt", "message_id",
    "parent_session_id", "agent_context", "session_final", "cache_salt", "id", "rid", "kv_hints", "block_hashes",
)  # fmt: skip


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(hint_formats()), st.dictionaries(st.sampled_from(NAMES), json_values, max_size=6) | json_values)
def test_whatever_comes_is_a_bounded_hint_or_one_error(source, document):
    """No other exception, and nothing in a hint that a scheduler could stumble over."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            hint = HintReader().read(source, document, client="c", session="s")
        except ValueError:
            return
    assert hint.priority is None or 0 <= hint.priority <= 1
    assert 0 <= hint.ttl_s <= 3600 and all(0 <= a.ttl_s <= 3600 and 0 <= a.priority <= 1 for a in hint.actions)
    assert all(isinstance(agent, str) and 0 < len(agent) <= 256 for agent in hint.agents())
    assert all(steps >= 0 for steps in hint.steps.values())
    Request("r", [1], 1, **request_fields(hint))
    HintStore(VirtualClock()).add(hint, set(hint.agents()))


def test_the_store_is_bounded_and_forgets():
    clock = VirtualClock()
    store = HintStore(clock, HintConfig(max_agents=10))
    for number in range(100):
        agent = f"a{number}"
        store.add(Hint("x", actions=(HintAction(ActionKind.RETAIN, agent, 1.0, 10.0 + number),)), {agent})
    assert len(store) == 10 and store.steps("a99", 5.0) == 0.0 and store.steps("a1", 5.0) == 5.0
    assert len(store._expiry._heap) < 110
    clock.advance_to(105.0)
    assert store.pop_expired() == {f"a{number}" for number in range(90, 96)}
    store.add(Hint("x", steps={"b": 2.0}), {"b"})
    assert store.steps("b", 5.0) == 2.0
    store.on_call("b")
    assert store.steps("b", 5.0) == 5.0, "it is fulfilled"
    store.on_call("a99")
    assert store.steps("a99", 5.0) == 0.0, "a request to retain lasts for its time"


def test_priorities_of_all_scales():
    assert [normalised(value, 0, 35, 100) for value in (-5, 0, 35, 100, 1e9)] == [0, 0, 0.5, 1, 1]
