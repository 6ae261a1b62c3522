"""The code in the documents on tiers, eviction policies, requests and hints runs as described."""

from __future__ import annotations

import re
from pathlib import Path

from tenure.serving import EvictionPolicy, FinishReason, Tier, TieredCache, TierPolicy, hint_formats, system_names

ROOT = Path(__file__).parents[2]


TIERS, AGENTS, HINTS = "concepts/tiers.md", "guides/serve-agents.md", "reference/hints.md"


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)


def before_closing(code: str) -> str:
    """An example without its last line, which empties the tree."""
    body, last = code.rstrip("\n").rsplit("\n", 1)
    assert last.endswith(".close()")
    return body


def test_the_example_runs():
    scope: dict = {}
    code = next(block for block in blocks(TIERS) if "TieredCache(" in block)
    exec(before_closing(code), scope)  # our own documentation
    tiers = scope["tiers"]
    assert isinstance(tiers, TieredCache)
    found = tiers.lookup(scope["prompt"])
    assert found.length == 96 and [node.length for node in found.nodes] == [64, 32]
    assert tiers.tree.prompt_ends == {"planner": found.nodes[0]}
    tiers.check()
    tiers.close()


def test_the_order_evicts_what_it_says(make_tiers, cached):
    scope: dict = {}
    exec(next(block for block in blocks(TIERS) if "(EvictionPolicy)" in block), scope)
    order = scope["LargestFirst"]()
    assert isinstance(order, EvictionPolicy)
    tiers = make_tiers(device=20, policy=TierPolicy(order))
    for prompt in ([1] * 4, [2] * 8, [3] * 6):
        assert cached(tiers, prompt)
    first = tiers.storage.queues[Tier.DEVICE].first()
    assert first is not None and first.length == 8


def test_the_request_is_answered_and_the_hint_taken():
    scope: dict = {}
    exec(next(block for block in blocks(AGENTS) if "VirtualClock(" in block), scope)
    output, system = scope["output"], scope["system"]
    assert output.finish_reason is FinishReason.ANSWERED and output.num_output_tokens == 4
    assert system.tiers.tree.prompt_ends["planner"].end == 960
    exec(next(block for block in blocks(AGENTS) if "HintReader" in block), scope)
    assert scope["request"].agent == "planner" and scope["request"].client == "team-a"
    assert system.predictor.steps("planner") < 2
    system.scheduler.check()


def test_the_tables_name_what_there_is():
    for page, heading, names in ((AGENTS, "## Systems", system_names()), (HINTS, "## Formats", hint_formats())):
        text = (ROOT / "docs" / page).read_text()
        rows = re.findall(r"^\| `(\w+)` \|", text[text.index(heading) :].split("\n##")[0], re.MULTILINE)
        assert sorted(rows) == sorted(names)
