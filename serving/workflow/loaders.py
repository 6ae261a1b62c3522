"""Converts dicts, JSON, YAML, networkx and LangGraph graphs to a `WorkflowSpec`.

The document, as a dict, JSON or YAML (`docs/concepts/step-graph.md` has an example)::

    workflow: name
    agents:
      planner:                 # all fields are optional
        join: or               # or, and
        call_s: 2.0            # guessed seconds of a call, its spread (standard deviation),
        call_spread_s: 1.0
        pause_s: 0.5           # and of the pause after it, e.g. a tool
        pause_spread_s: 0.5
    edges:
      - [planner, coder]       # or with the probability as a third entry, or:
      - {from: coder, to: tester, probability: 0.7}
    start: [planner]           # by default the agents that no edge leads to

Unknown fields are ignored with one warning per document; invalid values raise ValueError.
"""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tenure.checked import DocumentLimits, NotNegative, parse_json, parse_yaml, read

from .spec import AgentSpec, EdgeSpec, Join, Name, WorkflowSpec

if TYPE_CHECKING:
    import networkx


LANGGRAPH_ENDS = ("__start__", "__end__")
JSON_LIMITS = DocumentLimits(items=1 << 20, values=1 << 23)  # any workflow that fits in the characters of one text
YAML_LIMITS = DocumentLimits(items=1 << 20)


@dataclass(frozen=True)
class AgentFields:
    """An agent's fields in a document, which has the name as their key; see `AgentSpec`."""

    join: Join = "or"
    call_s: NotNegative | None = None
    call_spread_s: NotNegative | None = None
    pause_s: NotNegative | None = None
    pause_spread_s: NotNegative | None = None


@dataclass(frozen=True)
class WorkflowDocument:
    """The document at the top of this module."""

    workflow: Name = "workflow"
    agents: Mapping[str, AgentFields | None] | tuple[Name, ...] = ()
    edges: tuple[EdgeSpec, ...] = ()
    start: tuple[Name, ...] | None = None


def workflow_from_dict(document: Mapping[str, Any]) -> WorkflowSpec:
    """Converts a document with the fields listed at the top of this module.

    Only known fields are looked into, so aliases of a parsed YAML document are not followed further than these are
    deep.

    Raises:
        ValueError: a field has an invalid type or value.
    """
    unknown: set[str] = set()
    found = read(WorkflowDocument, document, "the workflow", unknown)
    rows = found.agents if isinstance(found.agents, Mapping) else dict.fromkeys(found.agents)
    agents = [AgentSpec(name, **(vars(fields) if fields is not None else {})) for name, fields in rows.items()]
    start = found.start
    if start is None:
        reached = {edge.target for edge in found.edges}
        start = [agent.name for agent in agents if agent.name not in reached]
    spec = WorkflowSpec(found.workflow, agents, list(found.edges), list(start))
    if unknown:
        names = sorted({path.rpartition(".")[2] for path in unknown})
        warnings.warn(f"unknown fields of a workflow are ignored: {', '.join(names[:10])}", stacklevel=2)
    return spec


def workflow_from_json(text: str) -> WorkflowSpec:
    """As `workflow_from_dict`, from JSON text within `JSON_LIMITS`.

    Raises:
        ValueError: invalid JSON, too long or too deeply nested, or an invalid field.
    """
    return workflow_from_dict(parse_json(text, "the workflow", JSON_LIMITS))


def workflow_from_yaml(text: str) -> WorkflowSpec:
    """As `workflow_from_dict`, from YAML text within `YAML_LIMITS`.

    Raises:
        ImportError: PyYAML is missing.
        ValueError: invalid YAML, too long or too deeply nested, or an invalid field.
    """
    return workflow_from_dict(parse_yaml(text, "the workflow", "simulate", YAML_LIMITS))


def workflow_from_networkx(graph: networkx.Graph, name: str | None = None) -> WorkflowSpec:
    """Converts a directed graph whose nodes and edges have the fields above as attributes.

    Agents are named by the `str` of the nodes. `start` may be an attribute of the graph; `name` defaults to the
    graph's.

    Raises:
        ValueError: not a directed graph without parallel edges, colliding names, or an invalid field.
    """
    if not graph.is_directed() or graph.is_multigraph():
        raise ValueError(f"got a networkx {_type(graph)}; accepted: a directed graph without parallel edges (DiGraph)")
    names = _distinct_names(graph.nodes)
    document: dict[str, Any] = {
        "workflow": name or graph.name or "workflow",
        "agents": {names[node]: dict(fields) for node, fields in graph.nodes(data=True)},
        "edges": [{"from": names[s], "to": names[t], **fields} for s, t, fields in graph.edges(data=True)],
    }
    if "start" in graph.graph:
        document["start"] = [names.get(node, str(node)) for node in graph.graph["start"]]
    return workflow_from_dict(document)


def workflow_from_langgraph(graph: Any, name: str | None = None) -> WorkflowSpec:
    """Converts a compiled LangGraph graph, or the result of its `get_graph()`.

    The target of a conditional edge is an OR: it is one of the branches, all equally probable (a branch to the end
    counts as one). An agent with several plain incoming edges is an AND if it waits for all of them:

    * `add_edge([a, b], agent)` declares this; the information is only in the compiled graph.
    * Other edges do not wait for each other in LangGraph. They are an AND where either all of their sources run or
      none does (a fork), and an OR where conditional edges choose between the sources or leave one out. An edge that
      closes a cycle is an OR, too: the first call cannot wait for its own successors.

    The first agents are those after START.

    Raises:
        ValueError: the object is neither of the two.
    """
    drawable = graph.get_graph() if hasattr(graph, "get_graph") else graph
    if not hasattr(drawable, "edges") or not hasattr(drawable, "nodes"):
        raise ValueError(f"got {_type(graph)}; accepted: a compiled LangGraph graph, or the graph from its get_graph()")
    edges = [edge for edge in drawable.edges if edge.source not in LANGGRAPH_ENDS]
    start = [
        edge.target for edge in drawable.edges if edge.source in LANGGRAPH_ENDS and edge.target not in LANGGRAPH_ENDS
    ]
    branches: dict[str, int] = {}
    for edge in edges:
        branches[edge.source] = branches.get(edge.source, 0) + bool(edge.conditional)
    edges = [edge for edge in edges if edge.target not in LANGGRAPH_ENDS]
    ways: dict[str, list[Any]] = {}
    for edge in edges:
        ways.setdefault(edge.target, []).append(edge)
    waiting = getattr(getattr(graph, "builder", None), "waiting_edges", ())
    loops = _same_cycle((edge.source, edge.target) for edge in edges)
    choices = _choices(drawable.edges)

    def waits(agent: str) -> bool:
        into = ways.get(agent, [])
        if len(into) < 2 or any(edge.conditional for edge in into):
            return False
        sources = {edge.source for edge in into}
        if any(target == agent and sources <= set(group) for group, target in waiting):
            return True
        return loops.isdisjoint((source, agent) for source in sources) and len({choices[s] for s in sources}) == 1

    return WorkflowSpec(
        name or "workflow",
        [AgentSpec(agent, "and" if waits(agent) else "or") for agent in drawable.nodes if agent not in LANGGRAPH_ENDS],
        [EdgeSpec(e.source, e.target, 1 / branches[e.source] if e.conditional else 1.0) for e in edges],
        list(dict.fromkeys(start)),
    )


def _same_cycle(edges: Iterable[tuple[str, str]]) -> set[tuple[str, str]]:
    """The edges that lie on a cycle."""
    import networkx

    graph = networkx.DiGraph(edges)
    component = {node: i for i, nodes in enumerate(networkx.strongly_connected_components(graph)) for node in nodes}
    return {(source, target) for source, target in graph.edges if component[source] == component[target]}


def _choices(edges: Iterable[Any]) -> dict[str, frozenset[tuple[str, frozenset[str]]]]:
    """For each node the choices that decide whether it runs: a router, and its branches that lead to the node.

    A router decides nothing for a node that all its branches lead to; branches back to the router only postpone it.
    """
    import networkx

    edges = list(edges)
    graph = networkx.DiGraph((edge.source, edge.target) for edge in edges)
    found: dict[str, set[tuple[str, frozenset[str]]]] = {node: set() for node in graph}
    for router in dict.fromkeys(edge.source for edge in edges if edge.conditional):
        others = networkx.restricted_view(graph, [router], [])
        reached: dict[bool, dict[str, set[str]]] = {True: {}, False: {}}  # by conditional and by plain edges
        for edge in edges:
            if edge.source == router != edge.target:
                reached[bool(edge.conditional)][edge.target] = {edge.target, *networkx.descendants(others, edge.target)}
        onward = reached[True].keys() - networkx.ancestors(graph, router)
        for node in set().union(*reached[True].values()).difference(*reached[False].values()):
            branches = frozenset(branch for branch, nodes in reached[True].items() if node in nodes)
            if not onward <= branches:
                found[node].add((router, branches))
    return {node: frozenset(choices) for node, choices in found.items()}


def _distinct_names(nodes: Iterable[Hashable]) -> dict[Hashable, str]:
    names = {node: str(node) for node in nodes}
    if len(set(names.values())) < len(names):
        raise ValueError("two nodes of the networkx graph have the same name as a string")
    return names


def _type(value: Any) -> str:
    return type(value).__name__
