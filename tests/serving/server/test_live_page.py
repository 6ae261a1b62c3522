"""The live page's files and data, without a browser: policy, access, and states of the engine."""

from __future__ import annotations

import re
import threading
import time

import httpx
import pytest

from tenure.serving.server import ServerConfig
from tenure.serving.server.live_page import FILES, FOLDER

from .conftest import Served
from .test_tenants import ADMIN, A, bearer
from .traffic import AGENTS, traffic


def state(served: Served, key: str | None = None) -> dict:
    response = httpx.get(f"{served.root}/admin/state", headers={} if key is None else bearer(key), timeout=30)
    assert response.status_code == 200, response.text
    assert response.headers["cache-control"] == "no-store"
    return response.json()


def test_files_have_a_strict_policy_and_load_nothing_from_elsewhere(served: Served):
    for path, (name, kind) in FILES.items():
        response = httpx.get(f"{served.root}{path}")
        assert response.status_code == 200 and response.headers["content-type"] == kind
        assert response.content == (FOLDER / name).read_bytes()
        policy = dict(part.strip().split(" ", 1) for part in response.headers["content-security-policy"].split(";"))
        assert policy["default-src"] == policy["frame-ancestors"] == policy["form-action"] == "'none'"
        assert {policy[f"{kind}-src"] for kind in ("script", "style", "connect", "img")} == {"'self'"}
        assert response.headers["x-content-type-options"] == "nosniff"
    assert set(path.name for path in FOLDER.iterdir()) == {name for name, _ in FILES.values()}
    assert httpx.get(f"{served.root}/../live_page.py").status_code == 404
    assert httpx.get(f"{served.root}/page/page.js").status_code == 404


def test_the_sources_have_no_markup_from_data_and_no_inline_code():
    html = (FOLDER / "index.html").read_text()
    assert not re.search(r"<script(?![^>]*\ssrc=)|<style|\sstyle=|\son\w+=", html)
    for path in FOLDER.iterdir():
        text = path.read_text().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|Function\(", text), (
            path
        )


def test_the_page_is_everybodys_and_the_state_an_admins(serve, keys):
    served = serve(keys)
    page = httpx.get(served.root)
    assert page.status_code == 200 and 'data-key="required"' in page.text
    for headers, status in (({}, 401), (bearer("wrong"), 401), (bearer(A), 403), (bearer(ADMIN), 200)):
        assert httpx.get(f"{served.root}/admin/state", headers=headers).status_code == status


def test_without_keys_pages_of_other_sites_are_refused(served: Served):
    assert 'data-key="none"' in httpx.get(served.root).text
    url = f"{served.root}/admin/state"
    assert httpx.get(url, headers={"Origin": "http://evil.example"}).status_code == 403
    assert httpx.get(url, headers={"Origin": served.root}).status_code == 200


def test_an_idle_server(served: Served):
    found = state(served)
    assert (found["status"], found["model"]) == ("ok", "tiny") and found["age_s"] < 10
    snapshot = found["snapshot"]
    assert snapshot["requests"] == snapshot["transfers"] == [] and set(snapshot["stages"].values()) == {0}
    assert [tier["tier"] for tier in snapshot["tiers"]] == ["device", "host"]


def test_traffic_is_shown(serve, keys):
    served = serve(keys)
    with traffic(served, ADMIN, live=2):
        # a snapshot is shared for a while: the first may be from before both decode
        served.until(lambda: state(served, ADMIN)["snapshot"]["stages"]["decode"] == 2)
        snapshot = state(served, ADMIN)["snapshot"]
    for tier in snapshot["tiers"]:
        assert tier["pinned"] + tier["evictable"] + tier["reserved"] + tier["arriving"] == tier["used"]
        parts = sum(agent["nbytes"] for agent in tier["agents"]) + tier["conversations"] + tier["more_agent_bytes"]
        assert parts == pytest.approx(tier["used"] - tier["reserved"] - tier["arriving"], abs=20)
    device = snapshot["tiers"][0]
    assert {agent["agent"].partition("@")[0] for agent in device["agents"]} > set(AGENTS)
    (flow,) = [flow for flow in snapshot["workflows"] if flow["workflow"] == "operator/report"]
    assert flow["client"] == "operator" and [agent["agent"] for agent in flow["agents"]] == list(AGENTS)
    assert [agent["agent"] for agent in flow["agents"] if agent["running"]] == ["planner", "researcher"]
    assert [0, 1, 1.0] in flow["edges"] and [4, 4, 0.2] in flow["edges"]
    assert {agent["agent"]: agent["joins"] for agent in flow["agents"]}["editor"]
    assert sorted(request["agent"] for request in snapshot["requests"]) == ["planner", "researcher"]
    assert all(request["stage"] == "decode" and request["client"] == "operator" for request in snapshot["requests"])
    assert snapshot["stages"]["decode"] == 2 and snapshot["finished"]["answered"] == 11


def test_a_long_step_gives_the_last_state_again(serve):
    served = serve(config=ServerConfig(state_wait_s=0.2))
    assert state(served)["age_s"] < 10
    begun, release = threading.Event(), threading.Event()

    def wait() -> None:
        begun.set()
        release.wait(30)

    served.engine.between = wait
    assert begun.wait(10)
    time.sleep(served.client.config.snapshot_interval_s)
    started = time.monotonic()
    found = state(served)
    assert time.monotonic() - started < 5
    assert found["status"] == "ok" and found["age_s"] > 0.2 and found["snapshot"] is not None
    release.set()
    served.engine.between = lambda: None
    served.until(lambda: state(served)["age_s"] < 0.2)


def test_draining_and_a_dead_engine(serve):
    served = serve()
    with traffic(served, live=1):
        waiting = threading.Thread(target=served.client.drain, args=(20.0,))
        waiting.start()
        served.until(lambda: not served.client.health().accepting)
        found = state(served)
        assert found["status"] == "draining" and len(found["snapshot"]["requests"]) == 1
    waiting.join(30)
    dying = serve()
    before = state(dying)["snapshot"]["taken"]

    def die() -> None:
        raise RuntimeError("for the test")

    dying.engine.between = die
    dying.until(lambda: not dying.client.health().alive)
    found = state(dying)
    assert found["status"] == "dead" and found["snapshot"]["taken"] == before


def test_many_viewers_cost_one_snapshot(served: Served, monkeypatch):
    taken = []
    take = served.engine.snapshot
    monkeypatch.setattr(served.engine, "snapshot", lambda: taken.append(1) or take())
    begun = time.monotonic()
    for _ in range(20):
        state(served)
    assert 1 <= len(taken) <= 2 + (time.monotonic() - begun) / served.client.config.snapshot_interval_s
