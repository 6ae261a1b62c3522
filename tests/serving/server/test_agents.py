"""Agents, workflows, sessions and metrics of a server."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tenure.serving import Tier
from tenure.serving.engine import Compression
from tenure.serving.hints import HintReader
from tenure.serving.server import Caller
from tenure.serving.server.call_context import read_context

TEAM_A = {"Authorization": "Bearer key-of-team-a-0123456789"}
TEAM_B = {"Authorization": "Bearer key-of-team-b-0123456789"}
SYSTEM = {"role": "system", "content": "You are the planner, and you plan all day long, step by step. " * 3}
CHAT: dict[str, Any] = {"model": "tiny", "messages": [SYSTEM, {"role": "user", "content": "Plan."}], "max_tokens": 2}
WORKFLOW = {"workflow": "report", "agents": ["planner", "writer"], "edges": [["planner", "writer"]]}
YAML = "workflow: report\nagents:\n  planner:\n    call_s: 2.0\n  writer:\nedges:\n  - [planner, writer]\n"


def workflows(served) -> list[Any]:
    """The declared ones."""
    with served.system.graph.lock:
        return [workflow for workflow in served.system.graph if workflow.name != "learned"]


def agents(served) -> set[str]:
    """The agents whose fixed prompts are cached."""
    with served.system.tiers.lock:
        return {str(agent) for agent in served.system.tiers.agents()}


def test_an_agent_is_named_by_its_fixed_prompt_unless_a_header_or_hint_names_it(served):
    assert served.post("/chat/completions", CHAT).status_code == 200
    (name,) = agents(served)
    assert name.startswith("prompt-")
    served.post("/chat/completions", CHAT | {"agent_hints": {"agent_id": "hinted"}})
    assert agents(served) == {name, "hinted"}
    headers = {"X-Tenure-Agent": "named"}
    served.post("/chat/completions", CHAT | {"agent_hints": {"agent_id": "hinted"}}, headers=headers)
    assert agents(served) == {name, "hinted", "named"}


def test_the_fixed_prompt_is_compressed(serve):
    how = Compression("retention", 0.25, sinks=2, recent=4)
    plain, compressed = serve(), serve(compression=how)
    sizes, answers = [], []
    for served in (plain, compressed):
        answers = [served.post("/chat/completions", CHAT | {"temperature": 0}).json() for _ in range(2)]
        assert answers[0]["choices"] == answers[1]["choices"]
        assert answers[1]["usage"]["prompt_tokens_details"]["cached_tokens"] > 128
        with served.system.tiers.lock:
            (agent,) = served.system.tiers.agents()
            end = served.system.tiers.lookup_agent(agent)
            assert end is not None
            sizes.append(sum(node.nbytes for node in end.path()))
    assert sizes[1] < 0.5 * sizes[0]


@pytest.mark.parametrize("sent", ["json", "yaml"])
def test_a_workflow_is_declared_used_and_ended(serve, keys, sent):
    served = serve(keys)
    body: dict[str, Any] = {"json": WORKFLOW}
    if sent == "yaml":
        body = {"content": YAML, "headers": {"Content-Type": "application/yaml"}}
    body["headers"] = body.get("headers", {}) | TEAM_A
    declared = httpx.post(f"{served.url}/workflows", **body)
    assert declared.status_code == 201
    assert declared.json() == {"id": "report", "object": "workflow", "agents": ["planner", "writer"]}
    names = TEAM_A | {"X-Tenure-Workflow": "report", "X-Tenure-Agent": "planner"}
    assert served.post("/chat/completions", CHAT, headers=names).status_code == 200
    (workflow,) = workflows(served)
    assert workflow.name == "team-a/report" and workflow.client == "team-a"
    served.until(lambda: served.system.graph.next_steps("writer") <= 1)
    ended = httpx.delete(f"{served.url}/workflows/report", headers=TEAM_A)
    assert ended.json() == {"id": "report", "object": "workflow", "deleted": True} and not workflows(served)


def test_workflows_belong_to_their_client(serve, keys):
    served = serve(keys)
    for team in (TEAM_A, TEAM_B):  # the same name twice
        assert httpx.post(f"{served.url}/workflows", json=WORKFLOW, headers=team).status_code == 201
    twice = httpx.post(f"{served.url}/workflows", json=WORKFLOW, headers=TEAM_A)
    assert twice.status_code == 400 and twice.json()["error"]["message"] == "there is a workflow 'report' already"
    assert httpx.delete(f"{served.url}/workflows/report", headers=TEAM_B).status_code == 200
    assert httpx.delete(f"{served.url}/workflows/report", headers=TEAM_B).status_code == 404
    assert httpx.delete(f"{served.url}/workflows/team-a%2Freport", headers=TEAM_B).status_code == 404
    assert [workflow.name for workflow in workflows(served)] == ["team-a/report"]


def test_a_workflow_is_changed_without_losing_its_state(serve, keys):
    served, url = serve(keys), "/workflows/report"

    def put(document: Any, headers: Any = TEAM_A) -> httpx.Response:
        return httpx.put(f"{served.url}{url}", json=document, headers=headers)

    assert put(WORKFLOW).status_code == 201
    names = TEAM_A | {"X-Tenure-Workflow": "report", "X-Tenure-Agent": "planner"}
    assert served.post("/chat/completions", CHAT, headers=names).status_code == 200
    (workflow,) = workflows(served)
    served.until(lambda: bool(workflow.pending))
    for again in (put(WORKFLOW), put(WORKFLOW | {"agents": ["writer", "planner"]})):
        assert again.status_code == 200 and again.json()["id"] == "report"
    assert workflows(served) == [workflow] and workflow.pending
    assert put(WORKFLOW, TEAM_B).status_code == 201  # another client's workflow of the same name
    for changed in ({"edges": [["planner", "writer", 0.5]]}, {"agents": {"planner": {}, "writer": {"join": "and"}}}):
        assert put(WORKFLOW | changed).status_code == 200
        assert [each for each in workflows(served) if each.client == "team-a"] == [workflow] and workflow.pending
    assert put(WORKFLOW | {"edges": []}).status_code == 200 and not workflow.pending
    wrong = put(WORKFLOW | {"workflow": "review"})
    assert wrong.status_code == 400 and "'review'" in wrong.json()["error"]["message"]
    assert put({"workflow": "report", "edges": [["a", "b"]]}).status_code == 400 and len(workflows(served)) == 2


def test_workflows_are_listed_and_read_by_their_client(serve, keys):
    served = serve(keys)
    for team, names in ((TEAM_A, ("report", "a/b", "zebra")), (TEAM_B, ("report",))):
        for name in names:
            declared = httpx.post(f"{served.url}/workflows", json=WORKFLOW | {"workflow": name}, headers=team)
            assert declared.status_code == 201

    def get(path: str, headers: Any = TEAM_A) -> httpx.Response:
        return httpx.get(f"{served.url}/workflows{path}", headers=headers)

    found = get("").json()
    assert [one["id"] for one in found["data"]] == ["a/b", "report", "zebra"] and not found["has_more"]
    assert found["data"][1] == {
        "id": "report", "object": "workflow", "agents": ["planner", "writer"], "running": 0,
    }  # fmt: skip
    part = get("?limit=1&after=a/b").json()
    assert [one["id"] for one in part["data"]] == ["report"] and part["has_more"]
    assert [one["id"] for one in get("", TEAM_B).json()["data"]] == ["report"]
    for limit in ("0", "x", "-1", "1001", "9" * 50, "²"):
        assert get(f"?limit={limit}").status_code == 400
    names = TEAM_B | {"X-Tenure-Workflow": "report", "X-Tenure-Agent": "planner"}
    assert served.post("/chat/completions", CHAT, headers=names).status_code == 200
    served.until(lambda: get("/report", TEAM_B).json()["agents"]["writer"]["steps"] == 0)
    theirs = get("/report", TEAM_B).json()
    assert theirs["edges"] == [{"from": "planner", "to": "writer", "probability": 1.0}]
    assert set(theirs["agents"]) == {"planner", "writer"}, "not the names by which clients are told apart"
    assert get("/report").json()["agents"]["writer"] == {"join": "or", "running": 0, "steps": 1}
    assert get("/team-b%2Freport").status_code == get("/learned").status_code == 404


def test_unknown_fields_of_workflows_are_logged_once(served, caplog):
    for _ in range(2):
        httpx.put(f"{served.url}/workflows/report", json=WORKFLOW | {"mood\nWARNING": 1}).raise_for_status()
    found = [record.getMessage() for record in caplog.records if "mood" in record.getMessage()]
    assert found == [r"unknown fields of requests are ignored: 'workflow.mood\nWARNING'"]


def test_the_learned_workflow_is_out_of_reach_without_keys(served):
    assert httpx.get(f"{served.url}/workflows").json()["data"] == []
    assert httpx.get(f"{served.url}/workflows/learned").status_code == 404
    assert httpx.delete(f"{served.url}/workflows/learned").status_code == 404
    refused = httpx.put(f"{served.url}/workflows/learned", json=WORKFLOW | {"workflow": "learned"})
    assert refused.status_code == 400
    assert served.post("/chat/completions", CHAT, headers={"X-Tenure-Session": "s"}).status_code == 200


def test_a_session_is_read_by_its_client(serve, keys):
    served = serve(keys)

    def get(session: str, headers: Any = TEAM_A) -> httpx.Response:
        return httpx.get(f"{served.url}/sessions/{session}", headers=headers)

    assert get("talk").status_code == 404
    body = CHAT | {"agent_hint": {"session_id": "talk", "parent_session_id": "root"}}
    assert served.post("/chat/completions", body, headers=TEAM_A).status_code == 200
    found = get("talk").json()
    assert found.pop("cached_tokens") > 150
    assert found == {
        "id": "talk", "object": "session", "ended": False, "kept_s": None, "parent": "root", "sub_agents": [],
    }  # fmt: skip
    assert get("root").json()["sub_agents"] == ["talk"] and get("talk", TEAM_B).status_code == 404
    httpx.put(f"{served.url}/sessions/talk", json={"ttl_s": 60}, headers=TEAM_A)
    assert 50 < get("talk").json()["kept_s"] <= 60
    httpx.delete(f"{served.url}/sessions/talk", headers=TEAM_A)
    assert get("talk").json()["ended"] and get("talk").json()["parent"] is None and get("x" * 300).status_code == 400


@pytest.mark.parametrize(
    "sent",
    [
        {"content": b"{"}, {"content": b"\xff"}, {"json": []}, {"json": {"workflow": "x" * 200}},
        {"json": {"workflow": ""}}, {"json": {"agents": ["a"], "edges": [["a", "b", 7]]}}, {"json": {"agents": 3}},
        {"content": "a: &a [1]\nb: [*a, ", "headers": {"Content-Type": "application/yaml"}},
        {"content": "x" * 70_000, "headers": {"Content-Type": "application/yaml"}},
        {"content": "!!python/object/apply:os.system ['true']", "headers": {"Content-Type": "text/yaml"}},
    ],
)  # fmt: skip
def test_bad_workflows_are_refused(served, sent):
    response = httpx.post(f"{served.url}/workflows", **sent)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["type"] == "invalid_request_error" and not workflows(served)


def test_a_session_is_kept_and_ended(served):
    headers = {"X-Tenure-Session": "talk"}
    assert served.post("/chat/completions", CHAT, headers=headers).status_code == 200
    kept = httpx.put(f"{served.url}/sessions/talk", json={"ttl_s": 60})
    assert kept.json() == {"id": "talk", "object": "session", "ttl_s": 60}
    hints = served.system.predictor.hints
    served.until(lambda: (hint := hints.current("session:talk")) is not None and not hint.evict)
    served.until(lambda: "session:talk" in agents(served))
    ended = httpx.delete(f"{served.url}/sessions/talk")
    assert ended.json() == {"id": "talk", "object": "session", "deleted": True}
    served.until(lambda: (hint := hints.current("session:talk")) is not None and hint.evict)
    assert served.post("/chat/completions", CHAT, headers=headers).status_code == 200


@pytest.mark.parametrize("dialect", ["x-tenure", "x-dynamo", "x", "agent_hint", "nvext"])
def test_a_parent_waits_for_its_sub_agents(served, dialect):
    """By headers and by hints, as clients of several engines send them."""
    headers, body = {}, CHAT | {"temperature": 0}
    if dialect == "agent_hint":
        body = body | {"agent_hint": {"session_id": "child", "parent_session_id": "root"}}
    elif dialect == "nvext":
        body = body | {"nvext": {"agent_context": {"session_id": "child", "parent_session_id": "root"}}}
    else:
        suffix = "" if dialect == "x-tenure" else "-id"
        headers = {f"{dialect}-session{suffix}": "child", f"{dialect}-parent-session{suffix}": "root"}
    root = {"X-Tenure-Session": "root"}
    before = served.post("/chat/completions", CHAT | {"temperature": 0}, headers=root).json()
    answer = served.post("/chat/completions", body, headers=headers).json()
    assert answer["choices"] == before["choices"], "a hint changes no answer"
    predictor = served.system.predictor
    assert predictor.reuse("session:root") == 1.0 and "session:root" in agents(served)
    if dialect == "nvext":
        last: dict[str, Any] = {
            "json": CHAT | {"nvext": {"agent_context": {"session_id": "child", "session_final": True}}}
        }
    else:
        last = {"json": CHAT, "headers": {"X-Dynamo-Session-Id": "child", "X-Dynamo-Session-Final": "TRUE"}}
    assert httpx.post(f"{served.url}/chat/completions", timeout=60, **last).status_code == 200
    served.until(lambda: len(predictor.session_tree) == 0)
    hint = predictor.hints.current("session:child")
    assert hint is not None and hint.evict, "it has ended after its answer"
    hint = predictor.hints.current("session:root")
    assert hint is not None and not hint.evict and hint.steps == 0, "it is called next"


def test_a_session_ends_with_its_last_call_also_when_the_client_goes(served):
    headers = {"X-Tenure-Session": "talk", "X-Tenure-Session-Final": "true"}
    body = CHAT | {"max_tokens": 500, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{served.url}/chat/completions", json=body, headers=headers, timeout=60) as stream:
        next(stream.iter_lines())
    hints = served.system.predictor.hints
    served.until(lambda: (hint := hints.current("session:talk")) is not None and hint.evict)
    wrong = served.post("/chat/completions", CHAT, headers={"X-Tenure-Session-Final": "maybe"})
    assert wrong.status_code == 400 and "accepted: true or false" in wrong.json()["error"]["message"]


def test_bad_sessions_are_refused(served):
    assert httpx.put(f"{served.url}/sessions/{'x' * 300}", json={}).status_code == 400
    for body in ({"ttl_s": -1}, {"ttl_s": "x"}, {"forever": True}, [1]):
        assert httpx.put(f"{served.url}/sessions/talk", json=body).status_code == 400
    assert httpx.put(f"{served.url}/sessions/talk").json()["ttl_s"] == 300


def test_headers_precede_hints_and_names_are_the_clients_own():
    caller, reader = Caller("team-a", False), HintReader()
    hints = {"agent_hints": {"agent_id": "hinted", "workflow_id": "flow", "reuse_hint": "keep"}}
    context = read_context(hints, {"x-dynamo-session-id": "s"}, caller, reader, "prompt-1")
    assert context.fields["agent"] == "hinted" and context.fields["workflow"] == "team-a/flow"
    assert context.fields["session"] == "s" and context.fields["client"] == context.fields["namespace"] == "team-a"
    assert [hint.client for hint in context.hints] == ["team-a"]
    headers = {"x-tenure-agent": "named", "x-tenure-session": "t", "x-dynamo-session-id": "s"}
    context = read_context(hints, headers, caller, reader, "prompt-1")
    assert context.fields["agent"] == "named" and context.fields["session"] == "t"
    assert read_context({}, {}, caller, reader, "prompt-1").fields["agent"] == "prompt-1"
    with pytest.raises(ValueError, match="accepted: up to 128"):
        read_context({}, {"x-tenure-workflow": "x" * 200}, caller, reader)


def test_metrics_count_requests_and_tokens(served):
    served.post("/chat/completions", CHAT)
    served.post("/chat/completions", {"model": "other"})
    httpx.get(f"{served.root}/nothing")
    text = httpx.get(f"{served.root}/metrics").text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert values['tenure_http_requests_total{route="/v1/chat/completions",status="200"}'] == "1.0"
    assert values['tenure_http_requests_total{route="/v1/chat/completions",status="400"}'] == "1.0"
    assert values['tenure_http_requests_total{route="none",status="404"}'] == "1.0"
    assert values['tenure_requests_finished_total{reason="answered"}'] == "1.0"
    assert float(values["tenure_prefill_tokens_total"]) > 100 and values["tenure_engine_alive"] == "1.0"
    assert float(values['tenure_pool_capacity_bytes{tier="device"}']) == served.system.tiers.capacity(Tier.DEVICE)
    assert values["tenure_answer_seconds_count"] == "1.0" and values["tenure_first_token_seconds_count"] == "1.0"
