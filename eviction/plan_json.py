"""A plan as plain JSON values, and back."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from .budget import Budget, Plan
from .policies import Policy, get_policy
from .protect import Protected

_PLAIN = (bool, int, float, str, dict, list, tuple, type(None))
NUMBERS = ("scope", "sinks", "recent", "buffer", "floor", "prefill_chunk")


def plan_to_json(plan: Plan) -> dict[str, Any]:
    guard = plan.protect
    return {
        "policy": _policy_to_json(plan.policy),
        "budget": plan.budget.amount,
        "protect": None if guard is None else {"rows": guard.rows, "shared": guard.shared},
        **{name: getattr(plan, name) for name in NUMBERS},
    }


def plan_from_json(document: dict[str, Any], known: Iterable[Policy]) -> Plan:
    """The plan of a document made by `plan_to_json`.

    Args:
        known: policies whose classes are used for their names, besides those of the registry.

    Raises:
        ValueError, KeyError, TypeError: unknown policy or option, or a value that is missing or out of range.
    """
    guard = document["protect"]
    if guard is not None:
        rows = tuple(tuple((int(start), int(stop)) for start, stop in ranges) for ranges in guard["rows"])
        guard = Protected(rows, bool(guard["shared"]))
    policy = _policy_from_json(document["policy"], {type(one).name: type(one) for one in known})
    numbers = {name: document[name] for name in NUMBERS}
    return Plan(policy, Budget(document["budget"]), protect=guard, **numbers)


def _policy_to_json(policy: Policy) -> dict[str, Any]:
    options = {field.name: getattr(policy, field.name) for field in fields(policy)}  # type: ignore[arg-type]
    plain = {name: _policy_to_json(value) if isinstance(value, Policy) else value for name, value in options.items()}
    other = [name for name, value in plain.items() if not isinstance(value, _PLAIN)]
    if other:
        raise ValueError(
            f"a cache under policy {policy.name!r} cannot be saved, its {', '.join(other)} is no plain value; "
            'cache.compress("full", 1.0) first goes on without it'
        )
    return {"name": policy.name, "options": plain}


def _policy_from_json(document: dict[str, Any], known: dict[str, type[Policy]]) -> Policy:
    name = document["name"]
    kind = known.get(name) or type(get_policy(name))
    return kind(**{key: _option(value, known) for key, value in document["options"].items()})


def _option(value: Any, known: dict[str, type[Policy]]) -> Any:
    if isinstance(value, dict):
        return _policy_from_json(value, known)
    return tuple(value) if isinstance(value, list) else value  # JSON has no tuples, a frozen policy has no lists
