"""The picture is well-formed SVG that names every agent and its values."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest

from tenure.serving.workflow.graph import StepGraph
from tenure.serving.workflow.graph_config import GraphConfig
from tenure.serving.workflow.plot import draw_svg
from tenure.serving.workflow.spec import AgentSpec, EdgeSpec, WorkflowSpec


def texts(svg: str) -> list[str]:
    return ["".join(node.itertext()) for node in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


def test_every_agent_is_drawn_with_its_value():
    agents = [AgentSpec(f"a{i}", call_s=2.0, call_spread_s=0.0) for i in range(4)] + [AgentSpec("idle", "and")]
    edges = [EdgeSpec(f"a{i}", f"a{(i + 1) % 4}") for i in range(4)] + [
        EdgeSpec("a1", "a1", 0.25),
        EdgeSpec("a2", "idle", 0.5),
    ]
    graph = StepGraph(lambda: 0.0, GraphConfig(discount_s=20.0))
    graph.add_workflow(WorkflowSpec("ring", [*agents, AgentSpec("alone")], edges)).start("a0")
    svg = draw_svg(graph, "ring")
    shown = texts(svg)
    for name in ("a0", "a1 ↺ 0.25", "a2", "a3", "idle", "alone", "not in sight", "0.5"):
        assert name in shown, shown
    assert "steps 1 · 2.0 s" in shown
    assert f"reuse {graph.reuse('a1'):.2f}" in shown
    assert svg == draw_svg(graph, "ring")


def test_names_are_only_text():
    graph = StepGraph()
    graph.add_workflow(WorkflowSpec("w", [AgentSpec("<script>$x^{$"), AgentSpec("n" * 200)], []))
    assert {"<script>$x^{$", "n" * 23 + "…"} <= set(texts(draw_svg(graph, "w")))


def test_an_empty_workflow_and_one_too_large():
    graph = StepGraph()
    graph.add_workflow("empty")
    assert texts(draw_svg(graph, "empty")) == []
    graph.add_workflow(WorkflowSpec("large", [AgentSpec(f"a{i}") for i in range(201)]))
    with pytest.raises(ValueError, match="the workflow 'large' has 201 agents; up to 200 can be drawn"):
        draw_svg(graph, "large")
