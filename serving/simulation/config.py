"""Set-ups to simulate, from YAML: a machine, the workloads of a table's cells, policies, and what a paper reports."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ..prefetch import PrefetchConfig
from ..scheduler.config import SchedulerConfig
from ..system import system_names
from .cost_model import Links, RooflineCosts, card, model
from .driver import Machine
from .workload import Workload

POLICIES = ("lru", "lru_reactive", "lru_prefetch", "ste", "ste_prefetch", "expected_time")


@dataclass(frozen=True)
class Cell:
    """One workload of a set-up.

    Attributes:
        paper: ratios that the paper reports for its policy, by the baseline they are over.
        paper_policy: ours that stands for it.
        why: what explains a difference, in words.
    """

    name: str
    machine: Machine
    workload: Workload
    paper: Mapping[str, float] = field(default_factory=dict)
    paper_policy: str = "ste_prefetch"
    why: str = ""


@dataclass(frozen=True)
class Setup:
    """What `tenure simulate` runs.

    Attributes:
        policies: names of systems. baselines: of those, the ones that the others are compared with.
        repeats: with the seeds `seed`, `seed` + 1, ...
    """

    name: str
    title: str
    source: str
    cells: tuple[Cell, ...]
    policies: tuple[str, ...] = POLICIES
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

    def with_policies(self, names: tuple[str, ...]) -> Setup:
        """Only these, and the baselines."""
        chosen = tuple(dict.fromkeys((*self.baselines, *names)))
        return replace(self, policies=chosen)


def load_setup(path: str | Path, changes: Sequence[str] = ()) -> Setup:
    """Reads a set-up; docs/simulator.md has the format.

    Args:
        changes: as `machine.link_gb_s=4`, of the set-up and of all its cells.

    Raises:
        ValueError: unknown names or wrong values, with the file's name.
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
                if isinstance(cell, dict):  # `read_setup` tells of others
                    (cell.get(section) or {}).pop(key, None)
    return given


def read_setup(given: Any, name: str) -> Setup:
    """From what YAML gives."""
    _only(
        given, {"title", "source", "machine", "workload", "cells", "policies", "baselines", "repeats", "seed"}, "set-up"
    )
    cells = tuple(_cell(each, given) for each in given.get("cells") or [{"name": name}])
    options = {key: given[key] for key in ("repeats", "seed") if key in given}
    options |= {key: tuple(given[key]) for key in ("policies", "baselines") if key in given}
    return Setup(name, given.get("title", name), given.get("source", ""), cells, **options)


def _cell(given: Any, setup: dict[str, Any]) -> Cell:
    _only(given, {"name", "machine", "workload", "paper", "paper_policy", "why"}, "cell")
    machine = read_machine({**setup.get("machine", {}), **given.get("machine", {})})
    workload = Workload.read({**setup.get("workload", {}), **given.get("workload", {})})
    more = {key: given[key] for key in ("paper", "paper_policy", "why") if key in given}
    return Cell(str(given.get("name", "")), machine, workload, **more)


def read_machine(given: dict[str, Any]) -> Machine:
    """A card and a model of `presets`, at the shares of `RooflineCosts`; sizes in GB (10^9 bytes).

    A copy goes layer by layer unless `copy_parts` says otherwise. With `host_copy_gb_s`, what crosses the link is first
    gathered in the host's memory at that rate, and not meanwhile.
    """
    rates = {"compute_share", "memory_share", "overhead_s"}
    sizes = {"card", "model", "card_share", "pool_tokens", "host_gb", "disk_gb", "link_gb_s", "disk_gb_s", "latency_s"}
    others = {"host_copy_gb_s", "page_size", "copy_parts", "limits", "prefetch"}
    _only(given, rates | sizes | others, "machine")
    link, gathering = given.get("link_gb_s", 0), given.get("host_copy_gb_s", math.inf)
    if not gathering > 0:
        raise ValueError(f"got host_copy_gb_s={gathering}; accepted: a number above 0")
    if link > 0:
        link = 1 / (1 / link + 1 / gathering)
    links = Links(1e9 * link, 1e9 * given.get("disk_gb_s", 0), given.get("latency_s", 0.0))
    shape = model(given.get("model", "llama-3.1-8b"))
    costs = RooflineCosts(
        card(given.get("card", "h100")), shape, links, **{key: given[key] for key in rates if key in given}
    )
    rate = shape.kv_bytes_per_token
    device = given["pool_tokens"] * rate if "pool_tokens" in given else costs.pool_bytes(given.get("card_share", 0.88))
    options = {"copy_parts": shape.layers, **{key: given[key] for key in ("page_size", "copy_parts") if key in given}}
    for name, kind in (("limits", SchedulerConfig), ("prefetch", PrefetchConfig)):
        if name in given:
            _only(given[name], {each.name for each in fields(kind)}, f"machine's {name}")
            options[name] = kind(**given[name])
    host, disk = (int(1e9 * given.get(key, 0)) for key in ("host_gb", "disk_gb"))
    return Machine(costs, links, int(device), host, disk, rate, **options)


def _only(given: Any, known: set[str], what: str) -> None:
    if not isinstance(given, dict):
        raise ValueError(f"got {type(given).__name__} for a {what}; accepted: a mapping")
    unknown = sorted(given.keys() - known, key=str)
    if unknown:
        raise ValueError(f"a {what} has no {unknown[0]!r:.60}; accepted: {', '.join(sorted(known))}")
