"""The example in docs/guides/serve-agents.md runs and answers from a compressed prompt."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from tenure.retention import RetentionGates
from tenure.serving import Tier

ROOT = Path(__file__).parents[2]


def test_the_example_runs(tiny_llama):
    text = (ROOT / "docs" / "guides" / "serve-agents.md").read_text()
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "Engine(" in block]
    torch.manual_seed(1)
    gates = RetentionGates.for_model(tiny_llama, gate_width=8, init_std=0.5, initial_bias=2.0)
    planner, question = (torch.randint(3, 128, (count,)).tolist() for count in (200, 10))
    scope = {"model": tiny_llama, "gates": gates, "planner": planner, "question": question}
    body, _, closing = code.partition("    system.close()\n")
    assert closing == ""
    exec(body, scope)  # our own documentation
    (answer,) = scope["answers"]
    assert 1 <= len(answer) <= 20
    system = scope["system"]
    node, *behind = system.tiers.tree
    assert all(each.start >= node.end for each in behind), "question and answer are stored behind the fixed prompt"
    allocated = node.allocated[Tier.DEVICE]
    assert node.length == 192 and 0 < allocated < 0.35 * 192 * scope["PromptKV"](scope["session"]).bytes_per_token()
    system.close()
    assert not list(system.tiers.tree)
