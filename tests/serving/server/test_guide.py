"""The code in docs/guides/serve-http.md runs against a server, and its tables name what the code has."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tenure.serving.server import ApiKeys
from tenure.serving.server.api_keys import QUOTAS
from tenure.serving.server.api_requests import HINT_FIELDS
from tenure.serving.server.cache_explanation import TEXTS
from tenure.serving.server.call_context import HEADERS, LAST_CALL

GUIDE = (Path(__file__).parents[3] / "docs" / "guides" / "serve-http.md").read_text()


def snippet(fragment: str) -> str:
    (found,) = [one for one in re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL) if fragment in one]
    return found


@pytest.mark.parametrize(
    ("fragment", "calls", "declared"),
    [
        ("stream=True", 1, []),
        ('tool_choice="required"', 1, []),
        ("httpx.post(", 0, []),
        ("LangGraphWorkflows(", 2, ["report"]),
        ("AgentWorkflows(", 1, ["support"]),
    ],
)
def test_the_snippets_of_clients_run(served, fragment, calls, declared, capsys):
    if "Workflows" in fragment:
        pytest.importorskip("langgraph")
        pytest.importorskip("agents")
    code = snippet(fragment).replace("http://127.0.0.1:8000", served.root).replace('"demo"', '"tiny"')
    code = code.replace("stream=True", "stream=True, max_tokens=8").replace("max_tokens=64", "max_tokens=8")
    exec(code, {})  # our own documentation
    served.until(lambda: served.unfinished() == 0)
    assert served.system.scheduler.metrics.submitted == calls
    assert [workflow.name for workflow in served.system.graph if workflow.name != "learned"] == declared


def test_the_snippet_of_ones_own_process_runs(served):
    code, _, last = snippet("build_app").rpartition("run_server(app")
    scope = {"client": served.client, "system": served.system, "tokenizer": served.tokenizer}
    exec(code, scope)  # our own documentation; its last line would serve
    assert last.startswith(", client, bind(") and scope["app"].title == "tenure"


def test_the_tables_are_complete():
    assert dict(re.findall(r"^\| `(\w+)` \| `(\w+)` \|$", GUIDE, re.MULTILINE)) == HINT_FIELDS
    named = {name.lower() for name in re.findall(r"`((?:X-|Thread-)[\w-]+)`", GUIDE)}
    assert named == {name for names in (*HEADERS.values(), LAST_CALL) for name in names}
    reasons = GUIDE.partition("### Why a prefix missed")[2].partition("### Errors")[0]
    assert {reason.value for reason in TEXTS} == set(re.findall(r"`(\w+)`(?=[^|]*\|[^|]*\|$)", reasons, re.MULTILINE))
    options = {name for name in re.findall(r"^\| `(\w+)` \| (?!`)", GUIDE, re.MULTILINE)}
    assert options >= set(QUOTAS)


def test_the_file_of_keys_is_read(tmp_path):
    (text,) = re.findall(r"```text\n(# client.*?)```", GUIDE, re.DOTALL)
    path = tmp_path / "keys"
    path.write_text(text)
    keys = ApiKeys.from_file(path)
    assert keys.caller("Bearer sk-7d15e0c6b3f24a98a1b2").share == "lab" and keys.limits("team-a").concurrency == 32
