"""Simulation set-ups from YAML: a machine, the workload of each cell of a table, policies, and a paper's results."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ..prefetch import PrefetchConfig
from ..scheduler.scheduler_config import SchedulerConfig
from ..system import system_names
from .cost_model import Links, RooflineCosts, get_card, get_model_spec
from .simulator import SimulatedMachine
from .workload import WorkloadConfig

DEFAULT_POLICIES = ("lru", "lru_reactive", "lru_prefetch", "ste", "ste_prefetch", "expected_time")


@dataclass(frozen=True)
class SimulationCell:
    """One cell of a set-up: a workload on a machine.

    Attributes:
        paper: speed-ups that a paper reports, by baseline.
        paper_policy: the policy of this package that corresponds to the paper's.
        why: explains differences from the paper, as text.
    """

    name: str
    machine: SimulatedMachine
    workload: WorkloadConfig
    paper: Mapping[str, float] = field(default_factory=dict)
    paper_policy: str = "ste_prefetch"
    why: str = ""


@dataclass(frozen=True)
class SimulationSetup:
    """The runs of one `tenure simulate`.

    Attributes:
        title, source: printed above the tables.
        policies: names of systems. baselines: of these, the ones that the others are compared with.
        repeats: number of seeds: `seed`, `seed` + 1, ...

    Raises:
        ValueError: an unknown policy, a baseline that is not among the policies, or no cells or repeats.
    """

    name: str
    title: str
    source: str
    cells: tuple[SimulationCell, ...]
    policies: tuple[str, ...] = DEFAULT_POLICIES
    baselines: tuple[str, ...] = ("lru", "lru_reactive")
    repeats: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        for name in (*self.policies, *self.baselines):
            if name not in system_names():
                raise ValueError(f"unknown policy {name!r:.60}; known: {', '.join(system_names())}")
        missing = [name for name in self.baselines if name not in self.policies]
        if missing:
            raise ValueError(f"the baseline {missing[0]!r} is not among the policies {', '.join(self.policies)}")
        if not self.cells or self.repeats < 1:
            raise ValueError(f"got {len(self.cells)} cells and {self.repeats} repeats; accepted: 1 or more of both")

    def with_policies(self, names: tuple[str, ...]) -> SimulationSetup:
        """A copy with these policies and the baselines only."""
        chosen = tuple(dict.fromkeys((*self.baselines, *names)))
        return replace(self, policies=chosen)


def load_setup(path: str | Path, changes: Sequence[str] = ()) -> SimulationSetup:
    """Reads a set-up; docs/simulator.md has the format.

    Args:
        changes: settings as `machine.link_gb_s=4` that replace those of the set-up and of all its cells.

    Raises:
        ImportError: PyYAML is missing; the message names the extra.
        ValueError: unknown names or wrong values; the message has the file's name.
    """
    try:
        import yaml
    except ImportError as error:
        raise ImportError("set-ups are YAML: pip install 'tenure[simulate]'") from error
    text = Path(path).read_text(encoding="utf-8")
    try:
        given = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    try:
        return read_setup(_changed(given, changes), Path(path).stem)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None


def _changed(given: Any, changes: Sequence[str]) -> Any:
    import yaml

    for change in changes:
        name, _, value = change.partition("=")
        section, _, key = name.partition(".")
        if section not in ("machine", "workload") or not key or not value:
            raise ValueError(f"got the change {change!r:.60}; accepted: machine.KEY=VALUE or workload.KEY=VALUE")
        try:
            read = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ValueError(f"got the change {change!r:.60}, whose value is not YAML") from None
        if isinstance(given, dict):
            given[section] = {**(given.get(section) or {}), key: read}
            for cell in given.get("cells") or []:
                if isinstance(cell, dict):  # `read_setup` refuses others
                    (cell.get(section) or {}).pop(key, None)
    return given


def read_setup(given: Any, name: str) -> SimulationSetup:
    """A set-up from parsed YAML.

    Args:
        name: of the set-up, e.g. the file's stem.

    Raises:
        ValueError: unknown names or wrong values.
    """
    _only(
        given, {"title", "source", "machine", "workload", "cells", "policies", "baselines", "repeats", "seed"}, "set-up"
    )
    cells = tuple(_cell(each, given) for each in given.get("cells") or [{"name": name}])
    options = {key: given[key] for key in ("repeats", "seed") if key in given}
    options |= {key: tuple(given[key]) for key in ("policies", "baselines") if key in given}
    return SimulationSetup(name, given.get("title", name), given.get("source", ""), cells, **options)


def _cell(given: Any, setup: dict[str, Any]) -> SimulationCell:
    _only(given, {"name", "machine", "workload", "paper", "paper_policy", "why"}, "cell")
    machine = read_machine({**setup.get("machine", {}), **given.get("machine", {})})
    workload = WorkloadConfig.read({**setup.get("workload", {}), **given.get("workload", {})})
    more = {key: given[key] for key in ("paper", "paper_policy", "why") if key in given}
    return SimulationCell(str(given.get("name", "")), machine, workload, **more)


def read_machine(given: dict[str, Any]) -> SimulatedMachine:
    """A machine from parsed YAML: a card and a model of `cost_model`, and sizes in GB (10^9 bytes).

    Nodes are copied layer by layer unless `copy_parts` is given. With `host_copy_gb_s`, bytes are gathered in host
    memory at that rate before they cross the link, so the two times add up.

    Raises:
        ValueError: unknown names or wrong values.
    """
    rates = {"compute_share", "memory_share", "overhead_s"}
    sizes = {"card", "model", "card_share", "pool_tokens", "host_gb", "disk_gb", "link_gb_s", "disk_gb_s", "latency_s"}
    others = {"host_copy_gb_s", "page_size", "copy_parts", "scheduler", "prefetch"}
    _only(given, rates | sizes | others, "machine")
    link, gathering = given.get("link_gb_s", 0), given.get("host_copy_gb_s", math.inf)
    if not gathering > 0:
        raise ValueError(f"got host_copy_gb_s={gathering}; accepted: a number above 0")
    if link > 0:
        link = 1 / (1 / link + 1 / gathering)
    links = Links(1e9 * link, 1e9 * given.get("disk_gb_s", 0), given.get("latency_s", 0.0))
    shape = get_model_spec(given.get("model", "llama-3.1-8b"))
    costs = RooflineCosts(
        get_card(given.get("card", "h100")), shape, links, **{key: given[key] for key in rates if key in given}
    )
    rate = shape.kv_bytes_per_token
    device = given["pool_tokens"] * rate if "pool_tokens" in given else costs.pool_bytes(given.get("card_share", 0.88))
    options = {"copy_parts": shape.layers, **{key: given[key] for key in ("page_size", "copy_parts") if key in given}}
    for name, kind in (("scheduler", SchedulerConfig), ("prefetch", PrefetchConfig)):
        if name in given:
            _only(given[name], {each.name for each in fields(kind)}, f"machine's {name}")
            options[name] = kind(**given[name])
    host, disk = (int(1e9 * given.get(key, 0)) for key in ("host_gb", "disk_gb"))
    return SimulatedMachine(costs, links, int(device), host, disk, rate, **options)


def _only(given: Any, known: set[str], what: str) -> None:
    if not isinstance(given, dict):
        raise ValueError(f"got {type(given).__name__} for a {what}; accepted: a mapping")
    unknown = sorted(given.keys() - known, key=str)
    if unknown:
        raise ValueError(f"a {what} has no {unknown[0]!r:.60}; accepted: {', '.join(sorted(known))}")
