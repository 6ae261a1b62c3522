"""`budget="calibrated"`: the budget that `tenure calibrate` stored with the gates."""

from __future__ import annotations

from dataclasses import replace

from ..retention.calibration import Calibration, weights_digest
from ..retention.gates import RetentionGates
from .budget import CALIBRATED, Budget, Plan
from .policies import policy_text


def with_budget(plan: Plan, budget: float | int | str | None, gates: RetentionGates | None) -> Plan:
    """The plan with that budget, looked up in the gates if it is "calibrated"; None leaves the plan's.

    Raises:
        ValueError: the budget is none of the accepted, or for "calibrated": no gates, gates without a calibration or
            changed since, or one made for another way of evicting.
    """
    if budget is None:
        return plan
    return calibrated(plan, gates) if budget == CALIBRATED else replace(plan, budget=Budget(budget))


def calibrated(plan: Plan, gates: RetentionGates | None) -> Plan:
    """The plan with the budget that `tenure calibrate` stored with the gates.

    Raises:
        ValueError: no gates, gates without a calibration or changed since, or one made for another way of evicting.
    """
    if gates is None:
        raise ValueError("budget 'calibrated' is stored with gates: give the gates, or a number as the budget")
    found = gates.calibration
    if found is None:
        raise ValueError(
            "budget 'calibrated' needs gates that were calibrated: run `tenure calibrate --gates FOLDER` first, or "
            "give a number as the budget"
        )
    differing = _differences(plan, found)
    if differing:
        raise ValueError(
            f"budget 'calibrated' promises nothing with {', '.join(differing)}: run `tenure calibrate` for that, or "
            f"give its number, {found.budget}, without the promise"
        )
    if found.weights != weights_digest(gates.state_dict()):
        raise ValueError("the gates have changed since they were calibrated; run `tenure calibrate` again")
    return replace(plan, budget=Budget(found.budget))


def _differences(plan: Plan, found: Calibration) -> list[str]:
    """What the plan does otherwise than the calibration's measurements did."""
    name = plan.policy.name
    same_kind = name == found.policy.partition("(")[0]
    pairs = {
        "policy": (policy_text(plan.policy) if same_kind else name, found.policy),
        "scope": (plan.scope, found.scope),
        "floor": (plan.floor, found.floor),
        "sinks": (plan.sinks, found.sinks),
        "recent": (plan.recent, found.recent),
    }
    differing = [f"{what} {now!r} (calibrated: {then!r})" for what, (now, then) in pairs.items() if now != then]
    return differing + [what for what in ("prefill_chunk", "protect") if getattr(plan, what) is not None]
