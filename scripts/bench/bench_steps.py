"""`tenure bench steps`: time the step graph's full solve and its updates at 10 000 agents and 100 000 edges."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..output import OutputFile, write_rows
from .benching import BenchRow, alternate, median_ratio, show

if TYPE_CHECKING:
    from ...serving import StepGraph, Workflow


@dataclass
class StepsBenchConfig:
    """Time steps-to-execution on large graphs, from scratch and after single updates; print a table of ratios.

    Times are CPU times, since everything runs in one thread; other load on the machine then matters less.
    """

    agents: int = 10_000
    """Agents per graph."""
    degree: int = 10
    """Edges per agent."""
    runs: int = 5
    """Measured full solves; medians are reported."""
    updates: int = 300
    """Measured updates per graph; medians are reported."""
    json: OutputFile | None = None
    """Also write the rows to this file."""

    def __post_init__(self) -> None:
        if self.agents < 100 or not 1 <= self.degree <= 50 or min(self.runs, self.updates) < 1:
            raise ValueError("--agents accepts 100 or more, --degree 1 to 50, --runs and --updates 1 or more")


def main(config: StepsBenchConfig) -> int:
    rows = []
    for name, size, running in (
        ("workflows_of_100", 100, 1),  # many of usual size
        ("one_workflow/1%_running", config.agents, config.agents // 100),
        ("one_workflow/1_running", config.agents, 1),  # an update may change what half of the agents are worth
    ):
        rows += graph_rows(name, config, size, running)
    show(rows, f"{config.agents} agents, {config.agents * config.degree} edges; medians of processor time")
    if config.json:
        write_rows(rows, config.json)
    return 0


def build(config: StepsBenchConfig, size: int, running: int, draws: random.Random) -> StepGraph:
    """Random workflows of `size` agents with cycles and 30 % AND joins, in each of which `running` agents run."""
    from ...serving import AgentSpec, EdgeSpec, StepGraph, WorkflowSpec

    graph = StepGraph()
    for number in range(config.agents // size):
        names = [f"{number}.{i}" for i in range(size)]
        agents = [AgentSpec(name, "and" if draws.random() < 0.3 else "or") for name in names]
        edges = [EdgeSpec(names[i], names[t]) for i in range(size) for t in draws.sample(range(size), config.degree)]
        flow = graph.add_workflow(WorkflowSpec(f"w{number}", agents, edges))
        for name in draws.sample(names, running):
            flow.start(name)
    return graph


def graph_rows(name: str, config: StepsBenchConfig, size: int, running: int) -> list[BenchRow]:
    """The full solve against the bare definition, and each kind of update against the full solve."""
    from ...serving.workflow.steps_solver import solve_naively

    draws = random.Random(0)
    graph = build(config, size, running, draws)
    flows = list(graph)

    def ours() -> None:
        for flow in flows:
            flow.solver.solve()

    def naive() -> None:
        for solver in (flow.solver for flow in flows):
            solve_naively(solver.predecessors, solver.is_and, solver.is_source, solver.satisfied, solver.horizon)

    seconds = alternate({"ours": ours, "peer": naive}, config.runs, clock=time.process_time)
    full, peer = (statistics.median(seconds[side]) * 1e3 for side in ("ours", "peer"))
    ratio = median_ratio(seconds["peer"], seconds["ours"])
    rows = [BenchRow(f"{name}/full_solve", full, peer, ratio, "ms", config.runs, "<= 200 ms")]
    graph.changed_steps()
    took: dict[str, list[float]] = {}
    for _ in range(config.updates):
        flow = draws.choice(flows)
        for kind, update in one_of_each(flow, draws):
            start = time.process_time()
            update()
            for agent in graph.changed_steps():  # what a reader asks for: the new value of what has changed
                graph.next_steps(agent)
            took.setdefault(kind, []).append((time.process_time() - start) * 1e3)
    all_of_them = [one for values in took.values() for one in values]
    for kind, values in {"any": all_of_them, **took}.items():
        value = statistics.median(values)
        aim = "<= 1 ms" if kind == "any" else ""
        rows.append(BenchRow(f"{name}/update/{kind}", value, full, full / value, "ms", len(values), aim))
    return rows


def one_of_each(flow: Workflow, draws: random.Random) -> list[tuple[str, Callable[[], None]]]:
    """A round of updates that leaves the numbers of agents, edges and running calls as they were."""
    names = list(flow.ids)
    agent = flow.names[draws.choice(list(flow.running))]
    successor = flow.names[draws.choice(list(flow.branches[flow.ids[agent]]))]
    source = draws.choice(names)
    target = flow.names[draws.choice(list(flow.branches[flow.ids[source]]))]
    new = draws.choice([name for name in names if flow.ids[name] not in flow.branches[flow.ids[source]]])
    first, second = draws.random(), draws.random()  # names of calls: the successor may be running already
    return [
        ("finish", lambda: flow.finish(agent, chose=[successor])),
        ("start", lambda: flow.start(successor, first)),
        ("retry", lambda: flow.retry(successor, first)),
        ("start", lambda: flow.start(successor, second)),
        ("add_edge", lambda: flow.add_edge(source, new)),
        ("remove_edge", lambda: flow.remove_edge(source, target)),
        ("add_agent", lambda: flow.add_agent("extra")),
        ("remove_agent", lambda: flow.remove_agent("extra")),
    ]
