"""Plots of simulations: timelines, speed-ups and studies. Needs matplotlib (`pip install 'tenure[simulate]'`)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from .study import StudyPoint
from .timeline import Timeline

PLACE_COLORS = {  # by the value of a prompt's `Status`
    "gpu": "#2a9d8f",
    "offloading": "#a8d5ba",
    "loading": "#f4a261",
    "cpu": "#8ab0d9",
    "disk": "#c9b6d6",
    "absent": "#eeeeee",
}


def figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Any, Any]:
    """A figure without a window, and its axes, `(rows, columns)`.

    Args:
        width, height: in inches.

    Raises:
        ImportError: matplotlib is missing; the message names the extra.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'tenure[simulate]'") from error
    made = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(made)
    return made, made.subplots(rows, columns, squeeze=False)


def draw_timelines(
    timelines: Mapping[str, Timeline], path: str | Path, title: str, seconds: float | None = None
) -> None:  # fmt: skip
    """One panel per policy, one line per agent: the places of its fixed prompt, and its calls, waiting and computed.

    Args:
        title: the set-up and its cell.
        seconds: draw only so many from the start.
    """
    lines = max(len(timeline.agents) for timeline in timelines.values())
    made, axes = figure(11, 0.9 + len(timelines) * (0.7 + 0.2 * lines), rows=len(timelines))
    last = max((each.end for timeline in timelines.values() for each in timeline.intervals), default=1.0)
    for panel, (policy, timeline) in zip(axes[:, 0], timelines.items(), strict=True):
        _panel(panel, policy, timeline)
        panel.set_xlim(0, min(seconds, last) if seconds else last)
        panel.tick_params(axis="x", labelsize=8, labelbottom=panel is axes[-1, 0])
    axes[-1, 0].set_xlabel("simulated seconds", fontsize=9)
    shown = "colour: the place of each agent's fixed prompt; lines: its calls"
    made.suptitle(f"{title}\n{shown}", fontsize=10, x=0.01, ha="left")
    places = {each.place for timeline in timelines.values() for each in timeline.intervals}
    made.legend(handles=_legend(places), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    made.savefig(path, dpi=130)


def _panel(panel: Any, policy: str, timeline: Timeline) -> None:
    line = {agent: number for number, agent in enumerate(timeline.agents)}
    for each in timeline.intervals:
        panel.broken_barh(
            [(each.begin, each.end - each.begin)], (line[each.agent] - 0.4, 0.8), color=PLACE_COLORS[each.place]
        )
    for call in timeline.calls:
        if call.agent in line:
            at = line[call.agent]
            panel.plot([call.arrived, call.admitted], [at, at], color="#d62828", linewidth=2.5, solid_capstyle="butt")
            panel.plot([call.admitted, call.ended], [at, at], color="black", linewidth=2.5, solid_capstyle="butt")
    panel.set_yticks(list(line.values()), [agent.rpartition("/")[2] for agent in line], fontsize=7)
    panel.set_ylim(len(line) - 0.5, -0.5)
    panel.set_title(policy, fontsize=9, loc="left")


def _legend(places: Collection[str]) -> list[Any]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    names = {"gpu": "on the device", "offloading": "being copied to the host", "loading": "being loaded",
             "cpu": "on the host", "disk": "on disk", "absent": "nowhere: to be computed"}  # fmt: skip
    patches = [Patch(color=color, label=names[place]) for place, color in PLACE_COLORS.items() if place in places]
    lines = [("#d62828", "a call waits"), ("black", "a call is computed")]
    return [*patches, *(Line2D([], [], color=color, linewidth=2.5, label=label) for color, label in lines)]


def draw_speedups(
    ratios: Mapping[str, Mapping[str, Sequence[float]]], path: str | Path, baseline: str, title: str,
    paper: Mapping[tuple[str, str], float] | None = None,
) -> None:  # fmt: skip
    """Bars of the means with the range over repeats, one group per cell.

    Args:
        ratios: speed-ups by cell and policy, one per repeat.
        baseline: the policy that they are relative to.
        title: the set-up.
        paper: the paper's speed-up by cell and policy, drawn as a line across that policy's bar.
    """
    policies = list(dict.fromkeys(policy for cell in ratios.values() for policy in cell))
    made, axes = figure(max(6.5, 2 + 1.9 * len(ratios)), 4)
    panel, width = axes[0, 0], 0.8 / len(policies)
    for number, policy in enumerate(policies):
        xs, means, below, above = [], [], [], []
        for at, cell in enumerate(ratios.values()):
            values = cell.get(policy, ())
            if values:
                mean = sum(values) / len(values)
                xs.append(at - 0.4 + width * (number + 0.5))
                means.append(mean)
                below.append(mean - min(values))
                above.append(max(values) - mean)
        panel.bar(xs, means, width * 0.95, yerr=[below, above], capsize=2, label=policy, error_kw={"linewidth": 0.8})
    marked: list[str] = []
    for (cell, policy), value in (paper or {}).items():
        if cell in ratios and policy in policies:
            at = list(ratios).index(cell) - 0.4 + width * (policies.index(policy) + 0.5)
            label = "" if policy in marked else f"the paper's figure, for {policy}"
            marked.append(policy)
            panel.plot([at - 0.6 * width, at + 0.6 * width], [value] * 2, color="black", linewidth=2, label=label)
            panel.annotate(f"{value:.2f}", (at, value), (0, 2), textcoords="offset points", fontsize=7, ha="center")
    panel.axhline(1, color="#888888", linewidth=0.8)
    panel.set_title(f"{title}\nbars: mean over seeds; whiskers: smallest and largest", fontsize=9, loc="left")
    panel.set_xticks(range(len(ratios)), [name.replace(", ", "\n") for name in ratios], fontsize=8)
    panel.set_xlabel("cell of the set-up", fontsize=9)
    panel.set_ylabel(f"makespan: times as fast as {baseline}")
    made.legend(loc="outside lower center", fontsize=8, frameon=False, ncols=min(4, len(policies) + len(set(marked))))
    made.savefig(path, dpi=130)


def draw_study(points: Sequence[StudyPoint], path: str | Path, baseline: str, title: str, columns: int = 3) -> None:
    """Two panels per question, one line per policy: the speed-up, and the P99 of the time to first token.

    The dotted line is the tolerance that no policy should fall below.

    Args:
        title: the set-up.
        columns: questions side by side.
    """
    questions = list(dict.fromkeys(point.question for point in points))
    policies = list(dict.fromkeys(point.policy for point in points))
    blocks = -(-len(questions) // columns)
    made, axes = figure(9, 0.5 + 4.4 * blocks, rows=2 * blocks, columns=columns)
    for panel in axes.flat[:]:
        panel.set_visible(False)
        panel.tick_params(labelsize=7)
    for number, question in enumerate(questions):
        block, column = divmod(number, columns)
        upper, lower = axes[2 * block, column], axes[2 * block + 1, column]
        for policy in policies:
            mine = [point for point in points if (point.question, point.policy) == (question, policy)]
            at = list(range(len(mine)))
            upper.plot(at, [point.ratio for point in mine], marker="o", markersize=3, label=policy)
            lower.plot(at, [point.ttft_p99_s for point in mine], marker="o", markersize=3)
            for panel in (upper, lower):
                panel.set_visible(True)
                panel.set_xticks(at, [point.value for point in mine], fontsize=7)
        upper.axhline(1 - points[0].tolerance, color="#d62828", linewidth=0.8, linestyle=":")
        upper.set_title(question, fontsize=8)
        lower.set_ylim(bottom=0)
        if column == 0:
            upper.set_ylabel(f"× as fast as {baseline}", fontsize=8)
            lower.set_ylabel("P99 of first token, s", fontsize=8)
    limit = f"dotted: {1 - points[0].tolerance:.2f}, below which no policy should fall"
    made.suptitle(f"{title}: one setting varied at a time\n{limit}", fontsize=10, x=0.01, ha="left")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    made.legend(handles, labels, loc="outside lower center", ncols=len(policies), fontsize=8, frameon=False)
    made.savefig(path, dpi=100)
