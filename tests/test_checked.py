"""Documents into dataclasses: what fits comes back as it was, and everything else is one sentence with its place."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenure.checked import Distinct, Named, NumbersToo, OrInfinite, Range, Size, read, read_fields, verify
from tenure.documents import DocumentLimits, bounded, load_json, load_yaml, parse_json, parse_yaml


@dataclass(frozen=True)
class Machine:
    card: str
    share: Annotated[float, Range(0, 1, above=True)] = 0.9


@dataclass(frozen=True)
class Edge:
    """An edge as clients write it: a mapping, or [from, to]."""

    source: Annotated[str, Named("from"), Size(1, 8), NumbersToo()]
    target: Annotated[str, Named("to")]

    @staticmethod
    def shorthand(value: Any) -> Any:
        return dict(zip(("from", "to"), value, strict=False)) if isinstance(value, list) else value


@dataclass(frozen=True)
class Plan:
    name: str
    steps: Annotated[int, Range(1, 100)]
    scope: Literal["global", "local"] = "global"
    budgets: Annotated[tuple[float | int, ...], Size(1), Distinct()] = (0.2,)
    span: tuple[int, int] = (1, 2)
    machines: tuple[Machine, ...] = ()
    edges: Sequence[Edge] = ()
    agents: Mapping[str, Machine | None] | tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    on: bool = False
    seconds: Annotated[float, Range(0)] | None = None

    def __post_init__(self) -> None:
        verify(self)
        if self.span[0] > self.span[1]:
            raise ValueError(f"got {self.span} as span; accepted: rising numbers")


GOOD = {"name": "a", "steps": 3}


def test_values_come_back_as_they_were() -> None:
    document = GOOD | {
        "scope": "local", "budgets": [0.5, 64], "span": [2, 5],
        "machines": [{"card": "h100"}, {"card": "x", "share": 1}],
        "edges": [{"from": "a", "to": "b"}, ["b", "c"], [7, "c"]], "agents": {"a": None, "b": {"card": "y"}},
        "options": {"deep": [1, {"er": None}]}, "on": True, "seconds": 0,
    }  # fmt: skip
    plan = read(Plan, json.loads(json.dumps(document)))
    assert plan == Plan(
        "a", 3, "local", (0.5, 64), (2, 5), (Machine("h100"), Machine("x", 1)),
        (Edge("a", "b"), Edge("b", "c"), Edge("7", "c")), {"a": None, "b": Machine("y")},
        {"deep": [1, {"er": None}]}, True, 0,
    )  # fmt: skip
    assert type(plan.budgets[1]) is int and type(plan.seconds) is int, "a number stays as it was written"
    assert read(Plan, GOOD | {"agents": ["a", "b"]}).agents == ("a", "b")
    assert Plan("a", 1, budgets=[0.5]).budgets == (0.5,), "a list in place of a tuple becomes one"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stepps": 1, "zzz": 2},
         r"job: got unknown fields stepps \(meant is perhaps steps\), zzz; accepted: name, steps"),
        ({"steps": 0}, "job: got 0 as steps; accepted: a whole number from 1 to 100"),
        ({"steps": True}, "got True as steps; accepted: a whole number"),
        ({"steps": 2.0}, "got 2.0 as steps; accepted: a whole number"),
        ({"name": None}, "got nothing as name; accepted: text"),
        ({"scope": "both"}, "got 'both' as scope; accepted: global, local"),
        ({"scope": ["global"]}, "got a list as scope; accepted: global, local"),
        ({"budgets": []}, "got a list of 0 as budgets; accepted: a list of 1 or more items, each a number"),
        ({"budgets": [0.5, 0.5]}, "got 0.5 twice in budgets"),
        ({"budgets": "0.5"}, "got '0.5' as budgets; accepted: a list"),
        ({"budgets": [0.5, "2e-4"]}, r"got '2e-4' as budgets\[1\]; accepted: a number .*after a dot"),
        ({"budgets": [float("inf")]}, r"got inf as budgets\[0\]; accepted: a number"),
        ({"span": [1]}, "got a list of 1 as span; accepted: a list of 2: a whole number, a whole number"),
        ({"span": [5, 2]}, r"job: got \(5, 2\) as span; accepted: rising numbers"),
        ({"machines": [{"card": "a"}, {"share": 1}]}, r"machines\[1\] lacks card; accepted fields: card, share"),
        ({"machines": [{"card": "a", "shar": 1}]}, r"got unknown fields shar .* in machines\[0\]; accepted: card"),
        ({"machines": [{"card": "a", "share": 0}]}, r"got 0 as machines\[0\].share; accepted: a number above 0 and up"),
        ({"machines": {"card": "a"}}, "got a dict as machines; accepted: a list"),
        ({"edges": [["a", "b"], ["a"]]}, r"edges\[1\] lacks to; accepted fields: from, to"),
        ({"edges": ["ab"]}, r"got 'ab' as edges\[0\]; accepted: a mapping of from, to"),
        ({"edges": [["a" * 9, "b"]]}, r"got 'aaaaaaaaa' as edges\[0\].from; accepted: text of 1 to 8 characters"),
        ({"agents": {"a": {"card": 3}}}, "got 3 as agents.a.card; accepted: text"),
        ({"agents": "a"}, "got 'a' as agents; accepted: a mapping or a list"),
        ({"options": {3: 4}}, "got 3 as a field's name in options; accepted: text"),
        ({"on": 1}, "got 1 as on; accepted: true or false"),
        ({"seconds": -1}, "got -1 as seconds; accepted: a number of 0 or more or nothing"),
        ({"name": "n" * 99, "steps": "s" * 99}, r"got 's{60}'… as steps"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named_with_its_place(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(Plan, GOOD | changes, "job")


def test_all_missing_fields_are_named_and_a_document_is_a_mapping() -> None:
    with pytest.raises(ValueError, match="job: the document lacks name, steps; accepted fields: name, steps, scope"):
        read(Plan, {}, "job")
    for document in (None, 3, "text", [1], [["name", "a"]]):
        with pytest.raises(ValueError, match=r"job: got .* as the document; accepted: a mapping of name, steps"):
            read(Plan, document, "job")


def test_unknown_fields_can_be_collected() -> None:
    unknown: set[str] = set()
    document = GOOD | {"x": 1, "machines": [{"card": "a", "y": 1}], "agents": {"b": {"card": "c", "z": {}}}}
    assert read(Plan, document, unknown=unknown).machines == (Machine("a"),)
    assert unknown == {"x", "machines[0].y", "agents.b.z"}


def test_a_part_of_the_fields() -> None:
    assert read_fields(Plan, {"steps": 4, "edges": [["a", "b"]]}, ["steps"]) == {"steps": 4, "edges": (Edge("a", "b"),)}
    with pytest.raises(ValueError, match="lacks name"):
        read_fields(Plan, {"steps": 4})


@pytest.mark.parametrize("text", ['{"a": NaN}', '{"a": [Infinity]}', '{"a": 1e999}'])
def test_json_numbers_are_finite(text: str) -> None:
    with pytest.raises(ValueError, match=r"got .*; accepted: a finite number"):
        parse_json(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "d is not JSON: Expecting property name"),
        ("[" * 100_000, "d is nested too deeply; accepted: up to 32 levels"),
        ("[" * 40 + "]" * 40, "got d nested deeper than 32 levels"),
        ('"' + "a" * 200 + '"', "got d of 202 characters; accepted: up to 128"),
        ("[1,1,1,1,1,1,1]", "got 7 items as d; accepted: up to 6"),
        ('{"a": {"b": "cccccccccc"}}', "got 10 characters as a.b; accepted: up to 9"),
        ("[[1,1,1,1,1],[1,1,1,1,1],[1,1,1,1,1],[1,1,1,1,1]]", "got more than 20 values in d"),
    ],
)
def test_json_is_bounded(text: str, message: str) -> None:
    limits = DocumentLimits(json_characters=128 if len(text) < 300 else 1 << 20, items=6, text=9, values=20)
    if "nested" in message:
        limits = DocumentLimits()
    with pytest.raises(ValueError, match=message):
        parse_json(text, "d", limits)


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGES = "a: &a {k0: 1, k1: 2, k2: 3}\n" + "".join(
    f"{new}: &{new} {{<<: [{', '.join([f'*{old}'] * 20)}]}}\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)

WIDE_MERGES = f"a: &a {{{', '.join(f'k{n}: 1' for n in range(1000))}}}\n" + "".join(
    f"b{n}: {{<<: *a}}\n" for n in range(100)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "d is not YAML: while parsing"),
        ("a: !!python/object/apply:os.system [ls]", "d is not YAML: could not determine a constructor"),
        ("a: .nan", "got nan as a; accepted: a finite number"),
        ("a: 2020-01-01", "got a date as a; accepted: plain values"),
        ("a: 2020-13-45", "d has a value that cannot be read"),
        ("a: !!set {b, c}", "got a set as a; accepted: plain values"),
        ("3: a", "got 3 as a field's name in d; accepted: text"),
        ("&a [*a]", "nested deeper than 32 levels"),
        (BOMB, "got more than 1048576 values in d"),
        (WIDE_MERGES, "merge keys that add more than 16384 fields"),
        ("[" * 20_000, "nested too deeply|is not YAML"),
        ("a" * 2_000_000, "got d of 2000000 characters; accepted: up to 1048576"),
    ],
)
def test_yaml_is_bounded_and_executes_nothing(text: str, message: str) -> None:
    start = time.perf_counter()
    with pytest.raises(ValueError, match=message):
        parse_yaml(text, "d")
    assert time.perf_counter() - start < 30


def test_merges_of_merges_are_bounded() -> None:
    """From 6.0.4 on PyYAML keeps one of the fields that are the same, so that nothing grows."""
    try:
        values = parse_yaml(MERGES, "d")
    except ValueError as error:
        assert "merge keys that add more than 16384 fields" in str(error)
    else:
        assert len(values) == 9 and values["i"] == {"k0": 1, "k1": 2, "k2": 3}


def test_ordinary_aliases_and_merges_are_read() -> None:
    assert parse_yaml("base: &b {x: 1}\nother: {<<: *b, y: 2}\nlist: [*b, *b]") == {
        "base": {"x": 1}, "other": {"x": 1, "y": 2}, "list": [{"x": 1}, {"x": 1}]
    }  # fmt: skip


def test_files(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("name: a\nsteps: 3\n")
    (tmp_path / "a.json").write_text(json.dumps(GOOD))
    assert read(Plan, load_yaml(tmp_path / "a.yaml")) == read(Plan, load_json(tmp_path / "a.json")) == Plan("a", 3)
    (tmp_path / "b.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"b.json is not UTF-8 text"):
        load_json(tmp_path / "b.json")
    with pytest.raises(ValueError, match=r"got .*a.json of \d+ bytes; accepted: up to 12"):
        load_json(tmp_path / "a.json", DocumentLimits(json_characters=3))
    with pytest.raises(FileNotFoundError):
        load_yaml(tmp_path / "absent.yaml")


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(PLAIN)
def test_plain_values_are_copied_and_nothing_else_escapes(value: Any) -> None:
    assert bounded(value) == value
    assert parse_json(json.dumps(value)) == value
    for document in (value, {"name": value, "steps": 1}, {"name": "a", "steps": 1, "machines": value, "edges": value}):
        try:
            read(Plan, document)
        except ValueError as error:
            assert len(str(error)) < 2000


@dataclass(frozen=True)
class Times:
    seconds: float
    calls: int = 1
    limit: Annotated[float, Range(0, above=True), OrInfinite()] = math.inf
    edges: tuple[Edge, ...] = ()


def test_numbers_of_numpy_become_plain_ones():
    given: tuple[Any, ...] = (numpy.float64(2.5), numpy.int64(3), numpy.float32(0.5))
    times = Times(*given)
    verify(times)
    assert (times.seconds, times.calls, times.limit) == (2.5, 3, 0.5)
    assert {type(times.seconds), type(times.limit)} == {float} and type(times.calls) is int
    with pytest.raises(ValueError, match=r"got a bool.* as calls"):
        verify(Times(1.0, *numpy.array([True])))


def test_an_infinity_is_accepted_only_where_it_may_be():
    verify(Times(1.0, limit=math.inf))
    for limit in (0, -math.inf, math.nan):
        with pytest.raises(ValueError, match=f"got {limit} as task.limit; accepted: a number above 0"):
            verify(Times(1.0, limit=limit), "task")
    with pytest.raises(ValueError, match="got inf as seconds; accepted: a number"):
        verify(Times(math.inf))


def test_whole_numbers_beyond_any_float_are_refused_as_floats():
    with pytest.raises(ValueError, match="got a whole number of 1329 bits as seconds; accepted: a number"):
        read(Times, {"seconds": 10**400})
    with pytest.raises(ValueError, match=r"got a whole number of 16610 bits as steps; accepted: a whole number"):
        read(Plan, {"name": "a", "steps": 10**5000})


@dataclass(frozen=True)
class Hook:
    weights: Annotated[Mapping[Annotated[int, Range(0)], float], Size(0, 2)] = field(default_factory=dict)
    call: Callable[[int], int] | None = None


def test_numbers_as_keys_are_digits_in_documents() -> None:
    assert read(Hook, {"weights": {"7": 1, 8: 2.5}}).weights == {7: 1, 8: 2.5}
    for weights, message in (
        ({"7": 1, "07": 2}, "got a number twice as a key of weights; accepted: a mapping, none twice"),
        ({"-7": 1}, "got -7 as a key of weights; accepted: a whole number of 0 or more"),
        ({"9" * 21: 1}, "as a key of weights; accepted: a whole number"),
        ({7.5: 1}, "got 7.5 as a key of weights"),
        ({True: 1}, "got True as a key of weights"),
        ({"7": "x"}, "got 'x' as weights.7; accepted: a number"),
        ({"1": 1, "2": 2, "3": 3}, "got 3 fields as weights; accepted: 0 to 2 fields"),
    ):
        with pytest.raises(ValueError) as error:
            read(Hook, {"weights": weights})
        assert message in str(error.value)


def test_a_field_may_be_a_callable() -> None:
    assert read(Hook, {"call": abs}).call is abs and read(Hook, {"call": None}).call is None
    with pytest.raises(ValueError, match="got 3 as call; accepted: something callable or nothing"):
        read(Hook, {"call": 3})
