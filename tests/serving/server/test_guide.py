"""The code in docs/guides/serve-http.md runs against a server, and its tables name what the code has."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tenure.serving.server.api_requests import HINT_FIELDS
from tenure.serving.server.cache_explanation import TEXTS
from tenure.serving.server.call_context import HEADERS

GUIDE = (Path(__file__).parents[3] / "docs" / "guides" / "serve-http.md").read_text()


def snippet(fragment: str) -> str:
    (found,) = [one for one in re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL) if fragment in one]
    return found


@pytest.mark.parametrize("fragment", ["OpenAI(", "/v1/workflows"])
def test_the_snippets_of_clients_run(served, fragment, capsys):
    code = snippet(fragment).replace("http://127.0.0.1:8000", served.root).replace('"demo"', '"tiny"')
    code = code.replace("stream=True", "stream=True, max_tokens=8")
    exec(code, {})  # our own documentation
    assert (fragment != "OpenAI(") or served.system.scheduler.metrics.decode_tokens > 0


def test_the_snippet_of_ones_own_process_runs(served):
    code, _, last = snippet("build_app").rpartition("run_server(app")
    scope = {"client": served.client, "system": served.system, "tokenizer": served.tokenizer}
    exec(code, scope)  # our own documentation; its last line would serve
    assert last.startswith(", client, bind(") and scope["app"].title == "tenure"


def test_the_tables_are_complete():
    assert dict(re.findall(r"^\| `(\w+)` \| `(\w+)` \|$", GUIDE, re.MULTILINE)) == HINT_FIELDS
    named = {name.lower() for name in re.findall(r"`(X-[\w-]+)`", GUIDE)}
    assert named == {name for names in HEADERS.values() for name in names}
    reasons = GUIDE.partition("### Why a prefix missed")[2].partition("### Errors")[0]
    assert {reason.value for reason in TEXTS} == set(re.findall(r"`(\w+)`(?=[^|]*\|[^|]*\|$)", reasons, re.MULTILINE))
