"""The code in docs/tiers.md on nodes and orders runs, and does what is said there."""

from __future__ import annotations

import re
from pathlib import Path

from tenure.serving import EvictionPolicy, FinishReason, Tier, TieredCache, TierPolicy, hint_formats, system_names

ROOT = Path(__file__).parents[2]


def blocks() -> list[str]:
    text = (ROOT / "docs" / "tiers.md").read_text()
    section = text[text.index("## The life of a node") :]
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)


def before_closing(code: str) -> str:
    """An example without its last line, which empties the tree."""
    body, last = code.rstrip("\n").rsplit("\n", 1)
    assert last.endswith(".close()")
    return body


def test_the_example_runs():
    scope: dict = {}
    exec(before_closing(next(block for block in blocks() if "TieredCache(" in block)), scope)  # our own documentation
    tiers = scope["tiers"]
    assert isinstance(tiers, TieredCache)
    found = tiers.match(scope["prompt"])
    assert found.length == 96 and [node.length for node in found.nodes] == [64, 32]
    assert tiers.tree.ends == {"planner": found.nodes[0]}
    tiers.check()
    tiers.close()


def test_the_order_evicts_what_it_says(make_tiers, cached):
    scope: dict = {}
    exec(next(block for block in blocks() if "(EvictionPolicy)" in block), scope)
    order = scope["LargestFirst"]()
    assert isinstance(order, EvictionPolicy)
    tiers = make_tiers(device=20, policy=TierPolicy(order))
    for prompt in ([1] * 4, [2] * 8, [3] * 6):
        assert cached(tiers, prompt)
    first = tiers.storage.candidates[Tier.DEVICE].first()
    assert first is not None and first.length == 8


def test_the_request_is_answered_and_the_hint_taken():
    scope: dict = {}
    exec(next(block for block in blocks() if "build_system(" in block), scope)
    output, system = scope["output"], scope["system"]
    assert output.finish_reason is FinishReason.ANSWERED and output.num_output_tokens == 4
    assert system.tiers.tree.ends["planner"].end == 960
    exec(next(block for block in blocks() if "HintReader" in block), scope)
    assert scope["request"].agent == "planner" and scope["request"].client == "team-a"
    assert system.predictor.steps("planner") < 2
    system.scheduler.check()


def test_the_tables_name_what_there_is():
    text = (ROOT / "docs" / "tiers.md").read_text()
    for heading, names in (("### Systems", system_names()), ("### What a hint", hint_formats())):
        rows = re.findall(r"^\| `(\w+)` \|", text[text.index(heading) :].split("\n###")[0], re.MULTILINE)
        assert sorted(rows) == sorted(names)
