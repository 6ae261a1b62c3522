"""The documents keep their word: code in them runs, links in them lead somewhere."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from tenure.eviction import Policy, evict

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
DOCUMENTS += sorted(ROOT.glob("examples/*/README.md"))


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_relative_links_lead_somewhere(path: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text())
    absent = [link for link in links if not link.startswith("http") and not (path.parent / link).exists()]
    assert not absent


def test_the_policy_of_the_documentation_runs(tiny_llama: PreTrainedModel, monkeypatch) -> None:
    """The snippet's `with evict(...)` stands for the reader's own code; the class above it is executed as printed."""
    text = (ROOT / "docs" / "eviction.md").read_text()
    block = next(code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "(Policy)" in code)
    module = types.ModuleType("snippet")
    monkeypatch.setitem(sys.modules, "snippet", module)  # dataclasses look their module up
    exec(block[: block.index("with evict")], module.__dict__)  # our own documentation
    policy = module.ValueNorm
    assert isinstance(policy, type) and issubclass(policy, Policy)
    with evict(tiny_llama, policy(), budget=0.25, scope="layer", sinks=1, recent=2) as session, torch.no_grad():
        tiny_llama(torch.arange(3, 43)[None], use_cache=True)
        assert session.report().kept_share == pytest.approx(0.25)
