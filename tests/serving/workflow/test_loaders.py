"""The same workflow from every source, and what is refused or warned about."""

from __future__ import annotations

import json
import math
import time
import warnings

import networkx
import numpy
import pytest

from tenure.documents import LIMITS
from tenure.serving.workflow.graph import StepGraph
from tenure.serving.workflow.loaders import (
    workflow_from_dict,
    workflow_from_json,
    workflow_from_langgraph,
    workflow_from_networkx,
    workflow_from_yaml,
    workflow_to_dict,
)
from tenure.serving.workflow.spec import AgentSpec, EdgeSpec, WorkflowSpec, repeated, without_agents

MAX_JSON, MAX_YAML = LIMITS.json_characters, LIMITS.yaml_characters
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
        (None, "the workflow: got nothing as the document; accepted: a mapping of workflow, agents, edges, start"),
        ([], "got a list as the document; accepted: a mapping of workflow, agents, edges, start"),
        ({"agents": "abc"}, "got 'abc' as agents; accepted: a mapping or a list of items that are each text"),
        ({"agents": ["a", 1]}, r"got 1 as agents\[1\]; accepted: text of 1 to 256 characters"),
        ({"agents": {1: {}}}, "got 1 as a field's name in agents; accepted: text"),
        ({"agents": {"": {}}}, "got '' as agents..name; accepted: text of 1 to 256 characters"),
        ({"agents": {"a" * 300: {}}}, r"got 'a{60}'… as agents.a{60}.name; accepted: text of 1 to 256 characters"),
        ({"agents": {"a": 3}}, "got 3 as agents.a; accepted: a mapping of join, call_s, .* or nothing"),
        ({"agents": {"a": {"join": "xor"}}}, "got 'xor' as agents.a.join; accepted: or, and"),
        ({"agents": {"a": {"join": ["or"]}}}, "got a list as agents.a.join; accepted: or, and"),
        ({"agents": {"a": {"call_s": -1}}}, "got -1 as agents.a.call_s; accepted: a number of 0 or more or nothing"),
        ({"agents": {"a": {"call_s": math.nan}}}, "got nan as agents.a.call_s; accepted: a number of 0 or more"),
        ({"agents": {"a": {"call_s": 10**400}}}, "got a whole number of 1329 bits as agents.a.call_s; accepted: a num"),
        ({"agents": {"a": {"pause_s": "1"}}}, "got '1' as agents.a.pause_s; accepted: a number"),
        ({"agents": ["a"], "edges": "ab"}, "got 'ab' as edges; accepted: a list of items that are each a mapping"),
        ({"agents": ["a"], "edges": [["a"]]}, r"edges\[0\]: got \['a'\] as an edge; accepted: \[from, to\], "),
        ({"agents": ["a"], "edges": [{"from": "a"}]}, r"edges\[0\] lacks to; accepted fields: from, to, probability"),
        ({"agents": ["a"], "edges": [["a", "a", 1.5]]}, r"got 1.5 as edges\[0\].probability; accepted: a number above"),
        ({"agents": ["a"], "edges": [["a", "a", True]]}, r"got True as edges\[0\].probability; accepted: a number"),
        ({"agents": ["a"], "edges": [["a", ["b"]]]}, r"got a list as edges\[0\].to; accepted: text of 1 to 256"),
        ({"agents": ["a"], "start": "a"}, "got 'a' as start; accepted: a list of items that are each text"),
        ({"agents": ["a"], "start": [["a"]]}, r"got a list as start\[0\]; accepted: text of 1 to 256 characters"),
        ({"workflow": 7, "agents": []}, "got 7 as workflow; accepted: text of 1 to 256 characters"),
    ],
)
def test_documents_that_are_none(document, message):
    with pytest.raises(ValueError, match=message):
        workflow_from_dict(document)


@pytest.mark.parametrize(
    ("read", "text", "message"),
    [
        (workflow_from_json, "{", "the workflow is not JSON: Expecting property name"),
        (workflow_from_json, "[" * 100_000, "the workflow is nested too deeply; accepted: up to 32 levels"),
        (workflow_from_yaml, "{", "the workflow is not YAML: while parsing a flow"),
        (workflow_from_yaml, "[" * 1500, "the workflow is nested too deeply; accepted: up to 32 levels"),
        (
            workflow_from_yaml,
            "agents: !!python/object/apply:os.getcwd []",
            "the workflow is not YAML: could not determine a const",
        ),
        (
            workflow_from_json,
            " " * (MAX_JSON + 1),
            f"got the workflow of {MAX_JSON + 1} characters; accepted: up to {MAX_JSON}",
        ),
        (
            workflow_from_yaml,
            " " * (MAX_YAML + 1),
            f"got the workflow of {MAX_YAML + 1} characters; accepted: up to {MAX_YAML}",
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
        ({"agents": {"a": {"join": nested(9)}}}, "got a list as agents.a.join; accepted: or, and"),
        ({"agents": {"a": {"call_s": nested(9)}}}, "got a list as agents.a.call_s; accepted: a number"),
        ({"agents": [nested(9)]}, r"got a list as agents\[0\]; accepted: text"),
        ({"agents": ["a"], "edges": [nested(9)]}, r"edges\[0\]: got \[\[\[.{50,60} as an edge; accepted: \[from, to\]"),
        ({"agents": ["a"], "edges": [["a", nested(9)]]}, r"got a list as edges\[0\].to; accepted: text"),
        ({"agents": ["a"], "edges": [["a", "a", nested(9)]]}, r"got a list as edges\[0\].probability; accepted: a num"),
        ({"workflow": nested(9), "agents": []}, "got a list as workflow; accepted: text"),
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
        (aliases(10, "a", "[%s]"), "got more than 1048576 values in the workflow; accepted: up to 1048576"),
        (aliases(10, "{a: 1}", "{<<: [%s]}"), "got merge keys that add more than 16384 fields to the workflow"),
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


def test_large_workflows_are_read():
    """More agents and edges than one list of another document may have."""
    names = [f"a{number}" for number in range(70_000)]
    document = {"agents": names, "edges": [[names[0], name] for name in names[1:]]}
    spec = workflow_from_json(json.dumps(document))
    assert len(spec.agents) == 70_000 and len(spec.edges) == 69_999 and spec.start == ["a0"]


def test_unknown_attributes_of_networkx_may_be_anything():
    graph = networkx.DiGraph()
    graph.add_node("a", call_s=numpy.float64(2.5), pos=numpy.zeros(2), size=math.inf)
    with pytest.warns(UserWarning, match="unknown fields of a workflow are ignored: pos, size"):
        spec = workflow_from_networkx(graph)
    assert spec.agents == [AgentSpec("a", call_s=2.5)] and spec.start == ["a"]


def test_what_is_no_langgraph():
    with pytest.raises(ValueError, match="got int; accepted: a compiled LangGraph graph"):
        workflow_from_langgraph(3)


def test_a_workflow_as_a_document_is_read_as_the_same_workflow():
    agents = [AgentSpec("a", call_s=2.0, pause_spread_s=1.0), AgentSpec("b", "and"), AgentSpec("c")]
    spec = WorkflowSpec("w", agents, [EdgeSpec("a", "b", 0.5), EdgeSpec("b", "a")], ["c", "a"])
    assert workflow_from_dict(workflow_to_dict(spec)) == spec


@pytest.mark.parametrize(
    ("edges", "joins", "removed", "expected", "expected_joins"),
    [
        ("am mb", "", "m", {"ab": 1.0}, ""),
        ("am0.5 mb0.5 ab0.25", "", "m", {"ab": 0.5}, ""),
        ("am bm mc", "m", "m", {"ac": 1.0, "bc": 1.0}, "c"),  # the fork's join is now that of c
        ("am bm mc", "", "m", {"ac": 1.0, "bc": 1.0}, ""),
        ("am mc bc", "c", "m", {"ac": 1.0, "bc": 1.0}, "c"),
        ("am dm mc bc", "c", "m", {"ac": 1.0, "bc": 1.0, "dc": 1.0}, ""),  # c waits for one of a and d only
        ("am dm mc bc", "mc", "m", {"ac": 1.0, "bc": 1.0, "dc": 1.0}, "c"),
        ("am ma0.5", "", "m", {"aa": 0.5}, ""),
        ("am mn nb", "", "mn", {"ab": 1.0}, ""),
        ("mm ma", "", "m", {}, ""),
    ],
)
def test_agents_that_are_left_out(edges, joins, removed, expected, expected_joins):
    specs = [EdgeSpec(each[0], each[1], float(each[2:] or 1)) for each in edges.split()]
    agents = [AgentSpec(name, "and" if name in joins else "or") for name in "abcdmn"]
    found = without_agents(WorkflowSpec("w", agents, specs, ["m", "b"]), [*removed])
    assert {edge.source + edge.target: edge.probability for edge in found.edges} == expected
    assert {agent.name for agent in found.agents if agent.join == "and"} == {*expected_joins}
    assert {agent.name for agent in found.agents} == {*"abcdmn"} - {*removed}
    assert "m" not in found.start and found.start[-1] == "b"


def test_a_workflow_that_is_repeated():
    edges = [EdgeSpec("a", "b", 0.3), EdgeSpec("a", "c", 0.3), EdgeSpec("b", "c"), EdgeSpec("d", "a", 0.75)]
    agents = [AgentSpec(name) for name in "abcd"]
    found = repeated(WorkflowSpec("w", agents, edges, ["a", "b"]))
    assert {edge.source + edge.target: edge.probability for edge in found.edges} == pytest.approx(
        {"ab": 0.5, "ac": 0.3, "aa": 0.2, "bc": 1.0, "ca": 0.5, "cb": 0.5, "da": 0.875, "db": 0.125}
    )
    assert repeated(WorkflowSpec("w", agents)).edges == []
