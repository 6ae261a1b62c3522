"""A help desk for tenure's guides, with the OpenAI Agents SDK.

Triage hands over to the specialist for a guide, who looks a word up in the reference (a tool) and hands over to the
reviewer, who hands the draft back; then the specialist answers:

    triage → specialist (tool, loop) ⇄ reviewer
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from agents import Agent, Model, ModelSettings, function_tool
from small_model import Route, num_calls

DOCS = Path(__file__).parents[2] / "docs"
SPECIALISTS = {
    "compress": ("guides/compress.md", ("budget", "evict", "compress")),
    "train": ("guides/train.md", ("train", "gates", "loss")),
    "evaluate": ("guides/evaluate.md", ("measure", "task", "table")),
    "serve": ("guides/serve-agents.md", ("serve", "agent", "prompt")),
}
OTHERS = {
    "triage": ("You are the help desk. Say in one sentence what the question is about.", "index.md"),
    "reviewer": ("You review. Say in one sentence what the draft should say better.", "guides/write-a-policy.md"),
}


def instructions(agent: str, characters: int) -> str:
    """The fixed prompt of an agent: its task, and the beginning of the document that it works with."""
    if agent in SPECIALISTS:
        task, page = "You know this guide. Answer in one sentence, from the guide only.", SPECIALISTS[agent][0]
    else:
        task, page = OTHERS[agent]
    return f"{task}\n\n{(DOCS / page).read_text(encoding='utf-8')[:characters]}"


@function_tool
def look_up(word: str) -> str:
    """The first line of the glossary of hints that has a word."""
    lines = (DOCS / "reference" / "hints.md").read_text(encoding="utf-8").splitlines()
    return next((line for line in lines if word in line.lower()), f"nothing about {word}")


def specialist_for(question: str) -> str:
    """The specialist whose words the question has most of."""

    def found(name: str) -> int:
        return sum(question.lower().count(word) for word in SPECIALISTS[name][1])

    return max(SPECIALISTS, key=found)


def build_team(make_model: Callable[[Route], Model], characters: int = 4000, tokens: int = 24) -> Agent[Any]:
    """The first agent; `make_model` makes the model of each, which calls what its route chooses."""

    def agent(name: str, route: Route, **parts: Any) -> Agent[Any]:
        settings = ModelSettings(temperature=0, max_tokens=tokens)
        text = instructions(name, characters)
        return Agent(name, instructions=text, model=make_model(route), model_settings=settings, **parts)

    def from_triage(items: list[dict[str, Any]]) -> tuple[str, dict[str, Any]]:
        return f"transfer_to_{specialist_for(str(items[0]['content']))}", {}

    def from_specialist(items: list[dict[str, Any]]) -> tuple[str, dict[str, Any]] | None:
        if not num_calls(items, "look_up"):
            return "look_up", {"word": "agent"}
        return None if num_calls(items, "transfer_to_reviewer") else ("transfer_to_reviewer", {})

    def from_reviewer(items: list[dict[str, Any]]) -> tuple[str, dict[str, Any]]:
        return f"transfer_to_{specialist_for(str(items[0]['content']))}", {}

    reviewer = agent("reviewer", from_reviewer)
    specialists = [agent(name, from_specialist, tools=[look_up], handoffs=[reviewer]) for name in SPECIALISTS]
    reviewer.handoffs = [*specialists]
    return agent("triage", from_triage, handoffs=[*specialists])
