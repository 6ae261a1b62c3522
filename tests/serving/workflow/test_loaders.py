"""The same workflow from every source, and what is refused or warned about."""

from __future__ import annotations

import json
import math
import time
import warnings

import networkx
import pytest

from tenure.serving.workflow.graph import StepGraph
from tenure.serving.workflow.loaders import (
    MAX_JSON,
    MAX_YAML,
    workflow_from_dict,
    workflow_from_json,
    workflow_from_langgraph,
    workflow_from_networkx,
    workflow_from_yaml,
)
from tenure.serving.workflow.spec import AgentSpec, EdgeSpec, WorkflowSpec

YAML = """
workflow: report
agents:
  planner: {call_s: 2.0, call_spread_s: 1}
  search: {pause_s: 4}
  coder:
  writer: {join: and}
edges:
  - [planner, search]
  - [planner, coder]
  - [search, writer]
  - {from: coder, to: writer}
  - [writer, planner, 0.25]
start: [planner]
"""
REPORT = WorkflowSpec(
    "report",
    [
        AgentSpec("planner", "or", 2.0, 1),
        AgentSpec("search", pause_s=4),
        AgentSpec("coder"),
        AgentSpec("writer", "and"),
    ],
    [
        EdgeSpec("planner", "search"),
        EdgeSpec("planner", "coder"),
        EdgeSpec("search", "writer"),
        EdgeSpec("coder", "writer"),
        EdgeSpec("writer", "planner", 0.25),
    ],
    ["planner"],
)


def test_yaml_json_and_dict_say_the_same():
    import yaml

    document = yaml.safe_load(YAML)
    assert (
        workflow_from_yaml(YAML) == workflow_from_dict(document) == workflow_from_json(json.dumps(document)) == REPORT
    )
    graph = StepGraph()
    graph.add_workflow(workflow_from_yaml(YAML)).start("planner")
    assert [graph.next_steps(agent.name) for agent in REPORT.agents] == [3, 1, 1, 2]


def test_agents_may_be_a_list_and_start_where_no_edge_leads():
    spec = workflow_from_dict({"agents": ["a", "b"], "edges": [["a", "b"]]})
    assert spec == WorkflowSpec("workflow", [AgentSpec("a"), AgentSpec("b")], [EdgeSpec("a", "b")], ["a"])


def test_networkx():
    graph = networkx.DiGraph(name="report", start=["planner"])
    for agent in REPORT.agents:
        fields = {k: v for k, v in vars(agent).items() if k != "name" and v is not None}
        graph.add_node(agent.name, **fields)
    for edge in REPORT.edges:
        graph.add_edge(edge.source, edge.target, probability=edge.probability)
    assert workflow_from_networkx(graph) == REPORT
    numbers = workflow_from_networkx(networkx.cycle_graph(3, networkx.DiGraph), "ring")
    assert [edge.source + edge.target for edge in numbers.edges] == ["01", "12", "20"]
    assert numbers.name == "ring"


@pytest.mark.parametrize("graph", [networkx.Graph(), networkx.MultiDiGraph()])
def test_networkx_graphs_of_the_wrong_kind(graph):
    with pytest.raises(ValueError, match=r"accepted: a directed graph without parallel edges"):
        workflow_from_networkx(graph)


def test_networkx_names_that_collide():
    graph = networkx.DiGraph([(1, "1")])
    with pytest.raises(ValueError, match="two nodes of the networkx graph have the same name"):
        workflow_from_networkx(graph)


def test_unknown_fields_are_warned_about_once():
    document = {"agents": {f"a{i}": {"colour": "red"} for i in range(50)}, "version": 2}
    with pytest.warns(UserWarning, match=r"unknown fields of a workflow are ignored: colour, version") as caught:
        spec = workflow_from_dict(document)
    assert len(caught) == 1
    assert len(spec.agents) == 50
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        workflow_from_yaml(YAML)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (None, "got NoneType for a workflow; accepted: a mapping with the fields workflow, agents, edges, start"),
        ([], "got list for a workflow"),
        ({"agents": "abc"}, "got str as agents; accepted: their names, or a mapping"),
        ({"agents": ["a", 1]}, "got 1 as the name of an agent"),
        ({"agents": {1: {}}}, "got 1 as the name of an agent; accepted: a string of 1 to 256"),
        ({"agents": {"a": 3}}, "got int for the agent 'a'; accepted: a mapping with the fields join"),
        ({"agents": {"a": {"join": "xor"}}}, "got join='xor' for the agent 'a'; accepted: or or and"),
        ({"agents": {"a": {"join": ["or"]}}}, r"got join=\['or'\] for the agent 'a'"),
        ({"agents": {"a": {"call_s": -1}}}, "got call_s=-1 for the agent 'a'; accepted: seconds"),
        ({"agents": {"a": {"call_s": math.nan}}}, "got call_s=nan for the agent 'a'"),
        ({"agents": {"a": {"call_s": 10**400}}}, "got call_s=10000.*000 for the agent 'a'; accepted: seconds"),
        ({"agents": {"a": {"pause_s": "1"}}}, "got pause_s='1' for the agent 'a'"),
        ({"agents": ["a"], "edges": "ab"}, "got str as edges; accepted: a list"),
        ({"agents": ["a"], "edges": [["a"]]}, r"got \['a'\] as an edge; accepted: \[from, to\]"),
        ({"agents": ["a"], "edges": [{"from": "a"}]}, r"got an edge with the fields \['from'\]; accepted: from, to"),
        ({"agents": ["a"], "edges": [["a", "a", 1.5]]}, "got 1.5 as the probability of an edge; accepted"),
        ({"agents": ["a"], "edges": [["a", "a", True]]}, "got True as the probability of an edge; accepted"),
        ({"agents": ["a"], "edges": [["a", ["b"]]]}, r"got \['b'\] as the name of an edge's target"),
        ({"agents": ["a"], "start": "a"}, "got str as start; accepted: a list"),
        ({"agents": ["a"], "start": [["a"]]}, r"got \['a'\] as the name of an agent; accepted: a string"),
        ({"workflow": 7, "agents": []}, "got 7 as the name of a workflow"),
    ],
)
def test_documents_that_are_none(document, message):
    with pytest.raises(ValueError, match=message):
        workflow_from_dict(document)


@pytest.mark.parametrize(
    ("read", "text", "message"),
    [
        (workflow_from_json, "{", "the workflow is no JSON: Expecting property name"),
        (workflow_from_json, "[" * 100_000, "the workflow's JSON is nested too deeply"),
        (workflow_from_yaml, "{", "the workflow is no YAML: while parsing a flow"),
        (workflow_from_yaml, "[" * 1500, "the workflow's YAML is nested too deeply"),
        (
            workflow_from_yaml,
            "agents: !!python/object/apply:os.getcwd []",
            "the workflow is no YAML: could not determine a const",
        ),
        (
            workflow_from_json,
            " " * (MAX_JSON + 1),
            f"got a workflow of {MAX_JSON + 1} characters; accepted: up to {MAX_JSON}",
        ),
        (
            workflow_from_yaml,
            " " * (MAX_YAML + 1),
            f"got a workflow of {MAX_YAML + 1} characters; accepted: up to {MAX_YAML}",
        ),
    ],
)
def test_texts_that_are_none(read, text, message):
    with pytest.raises(ValueError, match=message):
        read(text)


def nested(levels: int) -> list:
    """Lists of ten times the same list, 10 ** `levels` items in all."""
    value: list = ["a"] * 10
    for _ in range(levels - 1):
        value = [value] * 10
    return value


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"agents": {"a": {"join": nested(9)}}}, r"^got join=\[\[\[.{50,60} for the agent 'a'; accepted: or"),
        ({"agents": {"a": {"call_s": nested(9)}}}, r"^got call_s=\[\[\[.{50,60} for the agent 'a'; accepted: seconds"),
        ({"agents": [nested(9)]}, r"^got \[\[\[.{50,60} as the name of an agent; accepted: a string"),
        ({"agents": ["a"], "edges": [nested(9)]}, r"^got \[\[\[.{50,60} as an edge; accepted: \[from, to\]"),
        ({"agents": ["a"], "edges": [["a", nested(9)]]}, r"^got \[\[\[.{50,60} as the name of an edge's target"),
        ({"agents": ["a"], "edges": [["a", "a", nested(9)]]}, r"^got \[\[\[.{50,60} as the probability of an edge"),
        ({"workflow": nested(9), "agents": []}, r"^got \[\[\[.{50,60} as the name of a workflow"),
    ],
)
def test_a_billion_nested_items_are_refused_at_once(document, message):
    begun = time.process_time()
    with pytest.raises(ValueError, match=message) as caught:
        workflow_from_dict(document)
    assert time.process_time() - begun < 1
    assert len(str(caught.value)) < 200


def aliases(levels: int, item: str, nest: str) -> str:
    """A YAML document whose `x0` is `item`; every level after it repeats the one before ten times in `nest`."""
    lines = [f"x0: &x0 {item}"]
    lines += [f"x{i}: &x{i} {nest % ', '.join([f'*x{i - 1}'] * 10)}" for i in range(1, levels)]
    return "\n".join([*lines, f"agents: {{a: {{join: *x{levels - 1}}}}}"])


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (aliases(10, "a", "[%s]"), r"^got join=\[\[\[.{50,60} for the agent 'a'; accepted: or"),
        (aliases(10, "{a: 1}", "{<<: [%s]}"), f"^the workflow's merge keys add more than {MAX_YAML} fields"),
    ],
)
def test_yaml_aliases_that_stand_for_a_billion_items(text, message):
    with pytest.raises(ValueError, match=message):
        workflow_from_yaml(text)


def test_yaml_merge_keys():
    """Fields that several agents share are written once."""
    text = "agents: {a: &slow {call_s: 9, join: and}, b: {<<: *slow, call_s: 8}, c: {<<: [*slow, {pause_s: 1}]}}"
    agents = [AgentSpec("a", "and", 9), AgentSpec("b", "and", 8), AgentSpec("c", "and", 9, pause_s=1)]
    assert workflow_from_yaml(text).agents == agents


def test_what_is_no_langgraph():
    with pytest.raises(ValueError, match="got int; accepted: a compiled LangGraph graph"):
        workflow_from_langgraph(3)
