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

Unknown fields are ignored, with one warning per document or to the set `ignored`; invalid values raise ValueError.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from tenure.checked import NotNegative, read
from tenure.documents import DocumentLimits, parse_json, parse_yaml

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


def workflow_from_dict(document: Mapping[str, Any], ignored: set[str] | None = None) -> WorkflowSpec:
    """Converts a document with the fields listed at the top of this module.

    Only known fields are looked into, so aliases of a parsed YAML document are not followed further than these are
    deep.

    Args:
        ignored: receives the paths of unknown fields, of which there is no warning then.

    Raises:
        ValueError: a field has an invalid type or value.
    """
    unknown: set[str] = set() if ignored is None else ignored
    found = read(WorkflowDocument, document, "the workflow", unknown)
    rows = found.agents if isinstance(found.agents, Mapping) else dict.fromkeys(found.agents)
    agents = [AgentSpec(name, **(vars(fields) if fields is not None else {})) for name, fields in rows.items()]
    start = found.start
    if start is None:
        reached = {edge.target for edge in found.edges}
        start = [agent.name for agent in agents if agent.name not in reached]
    spec = WorkflowSpec(found.workflow, agents, list(found.edges), list(start))
    if unknown and ignored is None:
        names = sorted({path.rpartition(".")[2] for path in unknown})
        warnings.warn(f"unknown fields of a workflow are ignored: {', '.join(names[:10])}", stacklevel=2)
    return spec


def workflow_from_json(text: str, ignored: set[str] | None = None) -> WorkflowSpec:
    """As `workflow_from_dict`, from JSON text within `JSON_LIMITS`.

    Raises:
        ValueError: invalid JSON, too long or too deeply nested, or an invalid field.
    """
    return workflow_from_dict(parse_json(text, "the workflow", JSON_LIMITS), ignored)


def workflow_from_yaml(text: str, ignored: set[str] | None = None) -> WorkflowSpec:
    """As `workflow_from_dict`, from YAML text within `YAML_LIMITS`.

    Raises:
        ImportError: PyYAML is missing.
        ValueError: invalid YAML, too long or too deeply nested, or an invalid field.
    """
    return workflow_from_dict(parse_yaml(text, "the workflow", "simulate", YAML_LIMITS), ignored)


def workflow_to_dict(spec: WorkflowSpec) -> dict[str, Any]:
    """A workflow as a document that `workflow_from_dict` reads."""
    return {
        "workflow": spec.name,
        "agents": {
            agent.name: {name: value for name, value in vars(agent).items() if name != "name" and value is not None}
            for agent in spec.agents
        },
        "edges": [[edge.source, edge.target, edge.probability] for edge in spec.edges],
        "start": list(spec.start),
    }


def workflow_from_networkx(graph: networkx.Graph, name: str | None = None) -> WorkflowSpec:
    """Converts a directed graph whose nodes and edges have the fields above as attributes.

    Agents are named by the `str` of the nodes. `start` may be an attribute of the graph; `name` defaults to the
    graph's.

    Raises:
        ValueError: not a directed graph without parallel edges, colliding names, or an invalid field.
    """
    directed = callable(getattr(graph, "is_directed", None)) and graph.is_directed()
    if not directed or graph.is_multigraph():
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

    A node that returns `Command(goto=…)`, and a router (which may return `Send`), lead where they are declared to: by
    `destinations` or `path_map`, or by the Literal in the function's return annotation, wherever it stands in it. One
    warning names the nodes of which that is unknown, and those that no edge leads to; the successors of the former are
    learned from their calls.

    Raises:
        ValueError: the object is neither of the two.
    """
    drawable = graph.get_graph() if hasattr(graph, "get_graph") else graph
    if not hasattr(drawable, "edges") or not hasattr(drawable, "nodes"):
        raise ValueError(f"got {_type(graph)}; accepted: a compiled LangGraph graph, or the graph from its get_graph()")
    builder, unknown = getattr(graph, "builder", None), []
    every = [LangGraphEdge(edge.source, edge.target, bool(edge.conditional)) for edge in drawable.edges]
    if builder is not None:  # the drawing leaves out what follows an undeclared way
        every, unknown = _edges_of_builder(builder)
    _warn_of_unknown(name, list(drawable.nodes), every, unknown)
    edges = [edge for edge in every if edge.source not in LANGGRAPH_ENDS]
    start = [edge.target for edge in every if edge.source in LANGGRAPH_ENDS and edge.target not in LANGGRAPH_ENDS]
    branches: dict[str, int] = {}
    for edge in edges:
        branches[edge.source] = branches.get(edge.source, 0) + edge.conditional
    edges = [edge for edge in edges if edge.target not in LANGGRAPH_ENDS]
    ways: dict[str, list[LangGraphEdge]] = {}
    for edge in edges:
        ways.setdefault(edge.target, []).append(edge)
    waiting = getattr(builder, "waiting_edges", ())
    loops = _same_cycle((edge.source, edge.target) for edge in edges)
    choices = _choices(every)

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


class LangGraphEdge(NamedTuple):
    """An edge between nodes, START and END; `conditional`: one of several that a router or a Command chooses from."""

    source: str
    target: str
    conditional: bool


def _edges_of_builder(builder: Any) -> tuple[list[LangGraphEdge], list[str]]:
    """All declared edges of a `StateGraph`, one for each pair of nodes, and the nodes whose successors are unknown."""
    from langgraph.types import Command

    ways = {(source, target): False for source, target in builder.edges}
    ways |= {(source, target): False for sources, target in builder.waiting_edges for source in sources}
    unknown: dict[str, None] = {}
    for source, routers in builder.branches.items():
        for router in routers.values():
            ends = list((router.ends or {}).values()) or list(_literals(_returned(router.path)))
            for target in ends:
                ways.setdefault((source, target), True)
            if not ends:
                unknown[source] = None
    for source, spec in builder.nodes.items():
        ends = list(spec.ends or ()) or list(_literals(_returned(spec.runnable), inside=Command))
        for target in ends:
            ways.setdefault((source, target), True)
        if not ends and _calls_with(getattr(_function(spec.runnable), "__code__", None), "goto"):
            unknown[source] = None
    return [LangGraphEdge(*pair, conditional) for pair, conditional in sorted(ways.items())], list(unknown)


def _warn_of_unknown(
    name: str | None, nodes: Iterable[str], edges: Sequence[LangGraphEdge], unknown: Sequence[str]
) -> None:
    """Warns of nodes whose successors are unknown, and of those that no edge leads to from START."""
    reached, new = set(LANGGRAPH_ENDS), set(LANGGRAPH_ENDS)
    while new:
        new = {edge.target for edge in edges if edge.source in new} - reached
        reached |= new
    found = [f"the successors of {_listed(unknown)} are unknown"] if unknown else []
    lost = [node for node in nodes if node not in reached]
    found += [f"no declared edge leads to {_listed(lost)}"] if lost else []
    if found:
        warnings.warn(
            f"in the LangGraph workflow {name or 'workflow'!r}, {' and '.join(found)}: declare them by `-> "
            "Command[Literal[…]]`, by `destinations` of add_node, or by `path_map` of add_conditional_edges",
            stacklevel=3,
        )


def _listed(nodes: Sequence[str]) -> str:
    return ", ".join(map(repr, nodes[:10])) + (f" and {len(nodes) - 10} more" if len(nodes) > 10 else "")


def _function(runnable: Any) -> Any:
    """The Python function behind a node or a router of LangGraph; None if there is none."""
    function = getattr(runnable, "func", None) or getattr(runnable, "afunc", None)
    while isinstance(function, functools.partial):
        function = function.func
    return function if hasattr(function, "__code__") else getattr(function, "__call__", None)  # noqa: B004


def _returned(runnable: Any) -> Any:
    """The return annotation of a node or a router; None if there is none, or it cannot be resolved."""
    try:
        return get_type_hints(_function(runnable)).get("return")
    except (NameError, TypeError, AttributeError, SyntaxError):
        return None


def _literals(annotation: Any, inside: type | None = None) -> Iterator[str]:
    """The names in all Literals of an annotation, or in those within the generic class `inside`."""
    if get_origin(annotation) is Literal and inside is None:
        yield from (name for name in get_args(annotation) if isinstance(name, str))
        return
    for part in get_args(annotation):
        yield from _literals(part, None if get_origin(annotation) is inside else inside)


def _calls_with(code: Any, keyword: str) -> bool:
    """Whether a function's code, or that of a function defined in it, makes a call with this keyword."""
    constants = getattr(code, "co_consts", ())
    return any(
        keyword in each if isinstance(each, tuple) else _calls_with(each, keyword)
        for each in constants
        if isinstance(each, tuple) or hasattr(each, "co_consts")
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
