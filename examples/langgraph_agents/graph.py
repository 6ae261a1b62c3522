"""A team that answers questions about tenure's documents, as a LangGraph graph.

The planner is followed by a search (a tool that calls no model), by the experts whose documents it found, in parallel,
and by the writer; the critic sends the draft back until it has been revised, and then the answer is filed:

    planner → search → expert(s) → writer ⇄ critic → END

Every call is a real one. The branches depend on the search and on the number of drafts, never on the model's words, so
that a small model is enough and two runs make the same calls.
"""

from __future__ import annotations

import operator
import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import HumanMessage, SystemMessage
from langgraph.graph import START, StateGraph
from langgraph.types import Command, RetryPolicy, Send

DOCS = Path(__file__).parents[2] / "docs"
EXPERTS = {
    "budgets": "concepts/budgets.md",
    "tiers": "concepts/tiers.md",
    "step_graph": "concepts/step-graph.md",
    "simulator": "concepts/simulator.md",
}
OTHERS = {
    "planner": ("You plan. Name in one sentence what has to be found out to answer the question.", "index.md"),
    "writer": ("You write. Answer the question in two sentences, from the experts' notes.", "getting-started.md"),
    "critic": ("You review. Say in one sentence what the draft should say better.", "guides/write-a-policy.md"),
}
NUM_EXPERTS = 2  # that are asked for each question
NUM_DRAFTS = 2


class State(TypedDict, total=False):
    """A question on its way through the team."""

    question: str
    plan: str
    experts: list[str]
    notes: Annotated[list[str], operator.add]
    draft: str
    review: str
    num_drafts: int


def instructions(agent: str, characters: int) -> str:
    """The fixed prompt of an agent: its task, and the beginning of the document that it works with."""
    task = f"You are the expert for {agent}. Answer in one sentence, from this document only."
    task, page = (task, EXPERTS[agent]) if agent in EXPERTS else OTHERS[agent]
    return f"{task}\n\n{(DOCS / page).read_text(encoding='utf-8')[:characters]}"


def find_experts(question: str) -> list[str]:
    """The experts whose documents have the most of the question's words: a tool without a model."""
    words = set(re.findall(r"[a-z]{4,}", question.lower()))

    def found(expert: str) -> int:
        text = (DOCS / EXPERTS[expert]).read_text(encoding="utf-8").lower()
        return sum(text.count(word) for word in words)

    return sorted(EXPERTS, key=found, reverse=True)[:NUM_EXPERTS]


def build_graph(model: BaseChatModel, characters: int = 4000) -> Any:
    """The compiled graph; `characters` of its document are in each agent's prompt."""

    def ask(agent: str, text: str) -> str:
        messages = [SystemMessage(instructions(agent, characters)), HumanMessage(text)]
        return str(model.invoke(messages).content)

    def planner(state: State) -> State:
        return {"plan": ask("planner", state["question"]), "num_drafts": 0}

    def search(state: State) -> State:
        return {"experts": find_experts(f"{state['question']} {state['plan']}")}

    def to_experts(state: State) -> list[Send]:
        return [Send(expert, state) for expert in state["experts"]]

    def expert(name: str) -> Any:
        def answer(state: State) -> State:
            return {"notes": [f"{name}: {ask(name, state['question'])}"]}

        return answer

    def writer(state: State) -> State:
        notes = "\n".join(sorted(state["notes"]))
        text = f"Question: {state['question']}\nNotes:\n{notes}\nReview: {state.get('review', 'none')}"
        return {"draft": ask("writer", text), "num_drafts": state["num_drafts"] + 1}

    def critic(state: State) -> Command[Literal["writer", "__end__"]]:
        review = ask("critic", f"Question: {state['question']}\nDraft: {state['draft']}")
        done = state["num_drafts"] >= NUM_DRAFTS
        return Command(update={"review": review}, goto="__end__" if done else "writer")

    builder = StateGraph(State)
    retry = RetryPolicy(max_attempts=2)
    builder.add_node("planner", planner, retry_policy=retry)
    builder.add_node("search", search)
    builder.add_node("writer", writer, retry_policy=retry)
    builder.add_node("critic", critic, retry_policy=retry)
    builder.add_edge(START, "planner")
    builder.add_edge("planner", "search")
    builder.add_conditional_edges("search", to_experts, list(EXPERTS))
    for name in EXPERTS:
        builder.add_node(name, expert(name), retry_policy=retry)
        builder.add_edge(name, "writer")
    builder.add_edge("writer", "critic")
    return builder.compile()
