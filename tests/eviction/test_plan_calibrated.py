"""`budget="calibrated"`: the stored number is used, and nothing the calibration did not measure."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tenure.eviction import Budget, Knorm, Retention, evict
from tenure.retention import Calibration, TriedBudget
from tenure.retention.calibration import weights_digest


def calibration(gates, **values: Any) -> Calibration:
    budget = values.get("budget", 0.25)
    standard = Calibration(
        budget=budget, loss="kl", bound=0.2, max_loss=1.0, confidence=0.9, method="ltt", policy="retention",
        scope="global", floor=0.0, sinks=4, recent=32, model="tiny", dtype="float32", tasks=("needle",),
        lengths=(300, 300), cases=60, documents=5, data="demo", seed=0, weights=weights_digest(gates.state_dict()),
        table=(TriedBudget(budget, 0.0, 0.01, True),),
    )  # fmt: skip
    return replace(standard, **values)


@pytest.fixture
def model(tiny_llama):
    return tiny_llama


@pytest.fixture
def gates(model, gates_for):
    gates = gates_for(model)
    gates.calibration = calibration(gates)
    return gates


def kept(model, prompt, **options: Any) -> tuple[list, float]:
    with torch.no_grad(), evict(model, **options) as session:
        cache = session.new_cache()
        model(prompt(1, 200), past_key_values=cache)
        positions = [[head.tolist() for head in cache.kept(layer)[0]] for layer in range(3)]
        return positions, session.report(cache).kept_share


def test_it_is_the_stored_number(model, gates, prompt, tmp_path):
    found, share = kept(model, prompt, policy="retention", budget="calibrated", gates=gates)
    assert share == 0.25
    assert found == kept(model, prompt, policy="retention", budget=0.25, gates=gates, sinks=4, recent=32)[0]
    gates.save_pretrained(tmp_path)
    assert found == kept(model, prompt, policy=Retention(), budget="calibrated", gates=tmp_path)[0]
    gates.calibration = calibration(gates, budget=60)
    assert kept(model, prompt, budget="calibrated", gates=gates)[1] == 0.3


def test_a_cache_may_be_compressed_to_it(model, gates, prompt):
    with torch.no_grad(), evict(model, "full", 1.0, gates=gates, observe=["retention", "knorm"]) as session:
        cache = session.new_cache()
        model(prompt(1, 200), past_key_values=cache)
        other = cache.fork()
        with pytest.raises(ValueError, match=r"promises nothing with policy 'knorm' \(calibrated: 'retention'\)"):
            other.compress("knorm", budget="calibrated")
        assert session.report(other).kept_share == 1.0 and other.plan == cache.plan
        cache.compress("retention", budget="calibrated")
        assert session.report(cache).kept_share == 0.25 and cache.plan.budget == Budget(0.25)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "knorm"}, r"policy 'knorm' \(calibrated: 'retention'\), scope 'head' \(calibrated: 'global'\)"),
        ({"policy": Retention(lookahead=7)}, r"with policy 'retention\(lookahead=7\)' \(calibrated: 'retention'\)"),
        ({"scope": "layer"}, r"with scope 'layer' \(calibrated: 'global'\): run `tenure calibrate` for that, or give "
                             r"its number, 0.25, without the promise"),
        ({"floor": 0.2}, r"with floor 0.2 \(calibrated: 0.0\)"),
        ({"sinks": 2, "recent": 8}, r"with sinks 2 \(calibrated: 4\), recent 8 \(calibrated: 32\)"),
        ({"prefill_chunk": 64}, "with prefill_chunk:"),
        ({"protect": [(0, 5)]}, "with protect:"),
    ],
)  # fmt: skip
def test_another_way_of_evicting_is_refused_by_name(model, gates, options, message):
    given = {"policy": "retention", "budget": "calibrated", "gates": gates} | options
    with pytest.raises(ValueError, match=message), evict(model, **given):
        pass


def test_options_that_were_calibrated_are_accepted(model, gates, prompt):
    gates.calibration = calibration(gates, policy="retention(lookahead=7)", sinks=2, scope="layer")
    _, share = kept(
        model, prompt, policy=Retention(lookahead=7), budget="calibrated", gates=gates, sinks=2, scope="layer"
    )
    assert share == 0.25


def test_no_gates_or_no_calibration(model, gates):
    with (
        pytest.raises(ValueError, match="'calibrated' is stored with gates: give the gates"),
        evict(model, Knorm(), "calibrated"),
    ):
        pass
    gates.calibration = None
    with (
        pytest.raises(ValueError, match="needs gates that were calibrated: run `tenure calibrate --gates"),
        evict(model, "retention", "calibrated", gates=gates),
    ):
        pass


def test_gates_that_changed_since_are_refused(model, gates):
    with torch.no_grad():
        gates.bias.add_(0.5)
    with (
        pytest.raises(ValueError, match="the gates have changed since they were calibrated"),
        evict(model, "retention", "calibrated", gates=gates),
    ):
        pass


def test_the_word_alone_is_no_budget():
    with pytest.raises(ValueError, match="'calibrated' is looked up in the gates by evict"):
        Budget("calibrated")
