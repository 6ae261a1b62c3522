"""What `/metrics` gives is Prometheus' text format, follows its conventions, and counts up."""

from __future__ import annotations

import re
from typing import Any

import httpx
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "temperature": 0}
# As `promtool check metrics` has them: base units, written out and at the end.
NO_BASE_UNITS = {
    "s", "ms", "us", "ns", "msec", "sec", "milliseconds", "microseconds", "nanoseconds", "minutes", "hours", "days",
    "kb", "mb", "gb", "kib", "mib", "gib", "kilobytes", "megabytes", "gigabytes", "bits", "percent", "percents",
}  # fmt: skip
TYPES = ("counter", "gauge", "histogram", "summary")


def families(text: str) -> dict[str, Metric]:
    found = list(text_string_to_metric_families(text))
    assert len({family.name for family in found}) == len(found), "a family is given once"
    return {family.name: family for family in found}


def faults(family: Metric) -> list[str]:
    """The conventions of names that a family does not follow."""
    words, samples = family.name.split("_"), {sample.name for sample in family.samples}
    labels = {label for sample in family.samples for label in sample.labels}
    rules = {
        "no help": bool(family.documentation.strip()),
        "unknown type": family.type in TYPES,
        "not in snake case": re.fullmatch(r"[a-z][a-z0-9_]*", family.name) is not None and "__" not in family.name,
        "without the application's name": words[0] == "tenure",
        "a type in the name": not {*words} & {*TYPES},
        "not a base unit": not {*words} & NO_BASE_UNITS,
        "a unit in the middle": not {"seconds", "bytes"} & {*words[:-1]},
        "a counter without _total": family.type != "counter" or samples == {f"{family.name}_total"},
        "_total of no counter": family.type == "counter" or not family.name.endswith("_total"),
        "a suffix of histograms": not family.name.endswith(("_count", "_sum", "_bucket", "_info")),
        "a label that Prometheus sets": not {label for label in labels if label.startswith("__")} | labels & {"job"},
    }
    return [rule for rule, kept in rules.items() if not kept]


def test_names_types_and_units_follow_the_conventions(served):
    assert served.post("/chat/completions", CHAT).status_code == 200
    response = httpx.get(f"{served.root}/metrics")
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    # The client library adds when each series began.
    found = {name: one for name, one in families(response.text).items() if not name.endswith("_created")}
    assert len(found) >= 15 and response.text.endswith("\n")
    assert {name: broken for name, family in found.items() if (broken := faults(family))} == {}


def test_faults_are_found():
    def of(text: str) -> Any:
        (family,) = text_string_to_metric_families(text)
        return faults(family)

    assert of("# HELP tenure_x_seconds x\n# TYPE tenure_x_seconds gauge\ntenure_x_seconds 1\n") == []
    assert of("# TYPE tenure_x gauge\ntenure_x 1\n") == ["no help"]
    assert "not a base unit" in of("# HELP tenure_x_ms x\n# TYPE tenure_x_ms gauge\ntenure_x_ms 1\n")
    assert "a type in the name" in of("# HELP tenure_gauge x\n# TYPE tenure_gauge gauge\ntenure_gauge 1\n")


def test_counters_never_fall_and_buckets_are_cumulative(served):
    before = families(httpx.get(f"{served.root}/metrics").text)
    for path in ("/chat/completions", "/nothing"):
        served.post(path, CHAT)
    after = families(httpx.get(f"{served.root}/metrics").text)
    for name, family in before.items():
        if family.type == "counter":
            for sample in family.samples:
                later = {(s.name, tuple(s.labels.items())): s.value for s in after[name].samples}
                assert later[sample.name, tuple(sample.labels.items())] >= sample.value
    for family in after.values():
        if family.type == "histogram":
            buckets = [s.value for s in family.samples if s.name.endswith("_bucket")]
            (count,) = (s.value for s in family.samples if s.name.endswith("_count"))
            assert buckets == sorted(buckets) and buckets[-1] == count == 1, family.name
    answers = {(s.labels["route"], s.labels["status"]): s.value for s in after["tenure_http_requests"].samples}
    assert answers == {("none", "404"): 1, ("/metrics", "200"): 1, ("/v1/chat/completions", "200"): 1}


def test_every_tier_says_how_full_it_is(served):
    found = families(httpx.get(f"{served.root}/metrics").text)
    used, capacity = (
        {s.labels["tier"]: s.value for s in found[f"tenure_pool_{what}_bytes"].samples} for what in ("used", "capacity")
    )
    assert used.keys() == capacity.keys() == {"device", "host"}
    assert all(0 <= used[tier] <= capacity[tier] for tier in used)
