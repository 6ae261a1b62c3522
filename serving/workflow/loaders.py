"""Converts dicts, JSON, YAML, networkx and LangGraph graphs to a `WorkflowSpec`.

The document, as a dict, JSON or YAML (`docs/tiers.md` has an example)::

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

import json
import warnings
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .spec import AgentSpec, EdgeSpec, WorkflowSpec, shown

if TYPE_CHECKING:
    import networkx
    from yaml import SafeLoader


MAX_JSON, MAX_YAML = 16 << 20, 1 << 20  # characters accepted; YAML parses a hundred times slower
WORKFLOW_FIELDS = ("workflow", "agents", "edges", "start")
AGENT_FIELDS = ("join", "call_s", "call_spread_s", "pause_s", "pause_spread_s")
EDGE_FIELDS = ("from", "to", "probability")
LANGGRAPH_ENDS = ("__start__", "__end__")


def workflow_from_dict(document: Mapping[str, Any]) -> WorkflowSpec:
    """Converts a document with the fields listed at the top of this module.

    Raises:
        ValueError: a field has an invalid type or value.
    """
    unknown: set[str] = set()
    fields = _fields(document, WORKFLOW_FIELDS, "a workflow", unknown)
    rows = fields.get("agents", {})
    if isinstance(rows, Sequence) and not isinstance(rows, str):
        rows = {_string(name, "an agent"): None for name in rows}
    if not isinstance(rows, Mapping):
        raise ValueError(f"got {_type(rows)} as agents; accepted: their names, or a mapping of names to fields")
    agents = [
        AgentSpec(name, **(_fields(row, AGENT_FIELDS, f"the agent {shown(name)}", unknown) if row is not None else {}))
        for name, row in rows.items()
    ]
    edges = [_edge(row, unknown) for row in _list(fields.get("edges", []), "edges")]
    reached = {edge.target for edge in edges}
    start = _list(fields.get("start", [agent.name for agent in agents if agent.name not in reached]), "start")
    name = fields.get("workflow", "workflow")
    spec = WorkflowSpec(name, agents, edges, [_string(one, "an agent") for one in start])
    _warn(unknown)
    return spec


def workflow_from_json(text: str) -> WorkflowSpec:
    """As `workflow_from_dict`, from JSON text of at most `MAX_JSON` characters.

    Raises:
        ValueError: invalid JSON, too long or too deeply nested, or an invalid field.
    """
    _check_size(text, MAX_JSON)
    try:
        return workflow_from_dict(json.loads(text))
    except json.JSONDecodeError as error:
        raise ValueError(f"the workflow is no JSON: {error}") from None
    except RecursionError:
        raise ValueError("the workflow's JSON is nested too deeply") from None


def workflow_from_yaml(text: str) -> WorkflowSpec:
    """As `workflow_from_dict`, from YAML text of at most `MAX_YAML` characters.

    Raises:
        ValueError: invalid YAML, too long or too deeply nested, or an invalid field.
    """
    import yaml

    _check_size(text, MAX_YAML)
    try:
        return workflow_from_dict(yaml.load(text, _bounded_loader()))
    except yaml.YAMLError as error:
        first_line = str(error).splitlines()[0]
        raise ValueError(f"the workflow is no YAML: {first_line}") from None
    except RecursionError:
        raise ValueError("the workflow's YAML is nested too deeply") from None


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


def _edge(row: Any, unknown: set[str]) -> EdgeSpec:
    if isinstance(row, Mapping):
        fields = _fields(row, EDGE_FIELDS, "an edge", unknown)
        if "from" not in fields or "to" not in fields:
            raise ValueError(f"got an edge with the fields {shown(list(row))}; accepted: from, to and probability")
        return EdgeSpec(fields["from"], fields["to"], fields.get("probability", 1.0))
    if isinstance(row, Sequence) and not isinstance(row, str) and len(row) in (2, 3):
        return EdgeSpec(*row)
    raise ValueError(f"got {shown(row)} as an edge; accepted: [from, to], [from, to, probability] or a mapping")


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


def _fields(row: Any, accepted: Sequence[str], what: str, unknown: set[str]) -> dict[str, Any]:
    if not isinstance(row, Mapping):
        raise ValueError(f"got {_type(row)} for {what}; accepted: a mapping with the fields {', '.join(accepted)}")
    unknown.update(str(field)[:60] for field in row if field not in accepted)
    return {field: row[field] for field in accepted if field in row}


def _list(value: Any, what: str) -> Sequence[Any]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ValueError(f"got {_type(value)} as {what}; accepted: a list")
    return value


def _string(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"got {shown(value)} as the name of {what}; accepted: a string")
    return value


def _type(value: Any) -> str:
    return type(value).__name__


def _bounded_loader() -> type[SafeLoader]:
    """YAML's safe loader with a bound of `MAX_YAML` fields on merge keys (`<<: [*a, *a]`), which copy their targets."""
    import yaml

    class BoundedLoader(yaml.SafeLoader):
        added = 0

        def flatten_mapping(self, node: yaml.MappingNode) -> None:
            for key, value in node.value:
                if key.tag == "tag:yaml.org,2002:merge":
                    for part in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                        if isinstance(part, yaml.MappingNode):
                            self.flatten_mapping(part)
                            self.added += len(part.value)
                if self.added > MAX_YAML:
                    raise ValueError(f"the workflow's merge keys add more than {MAX_YAML} fields")
            super().flatten_mapping(node)

    return BoundedLoader


def _check_size(text: str, limit: int) -> None:
    if len(text) > limit:
        raise ValueError(f"got a workflow of {len(text)} characters; accepted: up to {limit}")


def _warn(unknown: set[str]) -> None:
    if unknown:
        shown = ", ".join(sorted(unknown)[:10])
        warnings.warn(f"unknown fields of a workflow are ignored: {shown}", stacklevel=3)
