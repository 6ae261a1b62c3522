"""Draws a workflow as SVG, with steps, expected time and reuse of each agent."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from .graph import StepGraph

if TYPE_CHECKING:
    import networkx


def draw_svg(graph: StepGraph, workflow: str, max_agents: int = 200) -> str:
    """Returns SVG text of one workflow: running agents filled, AND joins square, branches dashed with probabilities.

    An edge to the agent itself is ↺ with its probability. Below each name are the steps to its next call, the expected
    time in seconds and the expected discounted reuse, over all workflows.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: an unknown workflow, or one with more than `max_agents` agents, which would be illegible.
    """
    try:
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
        from matplotlib.patches import FancyArrowPatch
    except ImportError:
        raise ImportError("drawing a step graph needs matplotlib: pip install 'tenure[agents]'") from None
    import matplotlib
    import networkx

    flow = graph[workflow]
    if len(flow.ids) > max_agents:
        raise ValueError(f"the workflow {workflow!r} has {len(flow.ids)} agents; up to {max_agents} can be drawn")
    drawn = networkx.DiGraph()
    drawn.add_nodes_from(flow.ids)
    drawn.add_edges_from((edge.source, edge.target) for edge in flow.edges())
    places = _layout(drawn, [flow.names[node] for node in [*flow.running, *flow.expected]])
    columns = {round(x) for x, _ in places.values()}
    rows = max((sum(round(x) == column for x, _ in places.values()) for column in columns), default=1)
    figure = Figure(figsize=(max(4, 2.2 * len(columns)), max(2.5, 1.3 * rows + 0.8)))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(-0.6, max(columns, default=0) + 0.6), ylim=(-rows / 2, rows / 2))
    axes.set_axis_off()
    boxes, loops = {}, {e.source: f" ↺ {e.probability:.2g}" for e in flow.edges() if e.source == e.target}
    for agent, (x, y) in places.items():
        label = axes.text(
            x, y, f"{_short(agent)}{loops.get(agent, '')}\n{_values(graph, agent)}",
            ha="center", va="center", fontsize=8, parse_math=False,
            bbox={
                "boxstyle": "square,pad=0.5" if flow.join(agent) == "and" else "round,pad=0.5",
                "facecolor": "#f6c65b" if flow.ids[agent] in flow.running else "#e8eef7",
                "edgecolor": "#35507a",
            },
        )  # fmt: skip
        boxes[agent] = label.get_bbox_patch()
    for edge in [edge for edge in flow.edges() if edge.source != edge.target]:
        # Drawn after the boxes: the arrows end at their borders, whose sizes are only known then.
        style = {"arrowstyle": "-|>", "mutation_scale": 12, "linestyle": "--" if edge.probability < 1 else "-"}
        axes.add_patch(
            FancyArrowPatch(
                places[edge.source], places[edge.target], connectionstyle="arc3,rad=0.2",
                patchA=boxes[edge.source], patchB=boxes[edge.target], zorder=4, **style,
            )
        )  # fmt: skip
        if edge.probability < 1:
            (x0, y0), (x1, y1) = axes.transData.transform([places[edge.source], places[edge.target]])
            middle = (x0 + x1) / 2 + 0.1 * (y1 - y0), (y0 + y1) / 2 - 0.1 * (x1 - x0)  # half the height of the arc
            x, y = axes.transData.inverted().transform(middle)
            around = {"facecolor": "white", "edgecolor": "none", "pad": 1}
            axes.text(x, y, f"{edge.probability:.2g}", ha="center", va="center", fontsize=8, bbox=around, zorder=5)
    out = io.StringIO()
    # Text stays text, and the same graph gives the same file.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "tenure"}):
        FigureCanvasSVG(figure).print_svg(out, metadata={"Date": None})
    return out.getvalue()


def _values(graph: StepGraph, agent: str) -> str:
    steps, seconds = graph.next_steps(agent), graph.seconds(agent)
    if math.isinf(steps) and math.isinf(seconds):
        return "not in sight"
    shown = "∞" if math.isinf(steps) else f"{steps:.0f}"
    return f"steps {shown} · {seconds:.1f} s\nreuse {graph.reuse(agent):.2f}"


def _layout(drawn: networkx.DiGraph, first: list[str]) -> Mapping[str, tuple[float, float]]:
    """Columns by the number of edges from `first` and the agents without predecessors, then from any other."""
    import networkx

    column: dict[str, int] = {}
    for start in [*first, *(agent for agent, degree in drawn.in_degree if degree == 0), *drawn]:
        if start not in column:
            for distance, agents in enumerate(networkx.bfs_layers(drawn, start)):
                for agent in agents:
                    column.setdefault(agent, distance)
    rows: dict[int, list[str]] = {}
    for agent in drawn:
        rows.setdefault(column[agent], []).append(agent)
    return {
        agent: (float(x), float(i) - (len(agents) - 1) / 2)
        for x, agents in rows.items()
        for i, agent in enumerate(reversed(agents))
    }


def _short(name: str) -> str:
    return name if len(name) <= 24 else name[:23] + "…"
