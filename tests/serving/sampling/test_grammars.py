"""Constraints on answers: whatever a mask allows is valid, both libraries, bounds on compiling, and the cache."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import jsonschema
import pytest

from tenure.serving import SamplingParams
from tenure.serving.sampling.constraint import (
    Concatenation,
    Constraint,
    Ebnf,
    FixedText,
    JsonValue,
    Maybe,
    OneOf,
    Regex,
    Tagged,
    Tags,
    TextUntil,
)
from tenure.serving.sampling.grammar_compiler import GrammarCompiler, GrammarRefused
from tenure.serving.sampling.grammar_config import GrammarConfig
from tenure.serving.sampling.json_schema import FORMATS, check_schema, regex_gap, xgrammar_gap
from tenure.serving.sampling.sampler import Sampler

from ..server.conftest import byte_tokenizer

VOCAB, END = 259, 2
TOKENIZER = byte_tokenizer()


@pytest.fixture(scope="module")
def compiler() -> Iterator[GrammarCompiler]:
    made = GrammarCompiler(TOKENIZER, VOCAB, [END])
    yield made
    made.close()


@pytest.fixture(scope="module")
def only_llguidance() -> Iterator[GrammarCompiler]:
    made = GrammarCompiler(TOKENIZER, VOCAB, [END])
    made._missing.add("xgrammar")
    yield made
    made.close()


def allowed_tokens(mask: Any) -> list[int]:
    words = mask.allowed([]).tolist()
    return [token for token in range(VOCAB) if words[token // 32] >> token % 32 & 1]


def random_text(mask: Any, seed: int, max_tokens: int = 3000) -> str:
    """A text that the mask allows, to its end; closing characters and the end are preferred."""
    draw, tokens = random.Random(seed), []
    for _ in range(max_tokens):
        allowed = allowed_tokens(mask)
        assert allowed, "there is always a way to go on"
        ends = [token for token in allowed if token == END or str(TOKENIZER.decode([token])) in '"}]']
        token = draw.choice(ends if ends and draw.random() < 0.4 else allowed)
        mask.accept(token)
        if token == END:
            break
        tokens.append(token)
        if mask.is_finished:
            break
    else:
        pytest.fail("the text does not end")
    return bytes(_byte(token) for token in tokens).decode("utf-8")


def _byte(token: int) -> int:
    return _BYTES[str(TOKENIZER.convert_ids_to_tokens(token))]


def _bytes_by_character() -> dict[str, int]:
    """GPT-2's printable characters for bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + number): byte for number, byte in enumerate(rest)}


_BYTES = _bytes_by_character()


def accepts(mask: Any, text: str) -> bool:
    """Whether the text is allowed and may end."""
    for token in TOKENIZER(text)["input_ids"]:
        if mask.is_finished or token not in allowed_tokens(mask):
            return False
        mask.accept(token)
    return mask.is_finished or END in allowed_tokens(mask)


def new_mask(compiler: GrammarCompiler, constraint: Constraint) -> Any:
    return compiler.compile(constraint).new_mask(True)


NESTED = {
    "$defs": {"node": {"type": "object", "properties": {"v": {"type": "integer"}, "next": {"$ref": "#/$defs/node"}},
                       "required": ["v"], "additionalProperties": False}},
    "$ref": "#/$defs/node",
}  # fmt: skip
# A schema, the library that is expected to enforce it, a value that it forbids.
SCHEMAS: list[tuple[dict[str, Any], str, str]] = [
    ({"type": "string"}, "xgrammar", "1"),
    ({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}, "xgrammar", "{}"),
    ({"enum": ["a", 1, None, [2]]}, "xgrammar", '"b"'),
    ({"const": {"a": ["é", True]}}, "xgrammar", "{}"),
    ({"type": "integer", "minimum": -3, "maximum": 40}, "xgrammar", "41"),
    ({"type": "number", "exclusiveMinimum": 2, "maximum": 3}, "xgrammar", "2"),
    ({"type": ["string", "null"]}, "xgrammar", "1"),
    ({"anyOf": [{"type": "boolean"}, {"type": "array", "items": {"type": "null"}, "maxItems": 2}]}, "xgrammar", "[1]"),
    ({"type": "array", "prefixItems": [{"type": "boolean"}, {"type": "null"}], "items": False}, "xgrammar", "[null]"),
    ({"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3}, "xgrammar", "[]"),
    ({"type": "object", "additionalProperties": {"type": "boolean"}, "maxProperties": 2}, "xgrammar", '{"a": 1}'),
    ({"type": "object", "patternProperties": {"^x[a-c]$": {"type": "null"}}}, "xgrammar", '{"xa": 1}'),
    ({"type": "string", "pattern": "^[a-c]{2}$"}, "xgrammar", '"ad"'),
    (NESTED, "xgrammar", '{"v": 1, "next": {}}'),
    ({"type": "string", "minLength": 2, "maxLength": 3}, "llguidance", '"a"'),
    ({"type": "string", "pattern": "^a.c$"}, "llguidance", '"a\\nc"'),
    ({"type": "string", "pattern": "^[^a]{2}$"}, "llguidance", '"ab"'),
    ({"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 70}, "llguidance", "8"),
    ({"allOf": [{"type": "integer", "minimum": 5}, {"maximum": 9}]}, "llguidance", "3"),
    ({"oneOf": [{"type": "integer", "maximum": 9, "minimum": 0}, {"type": "null"}]}, "llguidance", '"a"'),
    ({"$defs": {"n": {"type": "integer"}}, "$ref": "#/$defs/n", "minimum": 3, "maximum": 5}, "llguidance", "9"),
    ({"type": "string", "enum": ["a", 1]}, "llguidance", "1"),
    ({"type": "object", "properties": {"a": {"type": "null"}}, "required": ["b"]}, "llguidance", '{"a": null}'),
    ({"anyOf": [{"minimum": 3}, {"type": "null"}], "type": ["integer", "null"], "maximum": 5}, "llguidance", "1"),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "library", "wrong"), SCHEMAS, ids=lambda value: str(value)[:40])
def test_whatever_a_schema_allows_is_valid(compiler, schema, library, wrong):
    compiled = compiler.compile(JsonValue(schema))
    assert compiled.library == library
    for seed in range(12):
        text = random_text(compiled.new_mask(True), seed)
        jsonschema.validate(json.loads(text), schema)
    assert not accepts(compiled.new_mask(True), wrong)


@pytest.mark.parametrize("format", sorted(FORMATS))
def test_formats(compiler, format):
    compiled = compiler.compile(JsonValue({"type": "string", "format": format}))
    assert compiled.library == "xgrammar"
    for seed in range(4):
        assert isinstance(json.loads(random_text(compiled.new_mask(True), seed)), str)
    assert not accepts(compiled.new_mask(True), '"\x16 \x16"')


COMPOSED: list[tuple[Constraint, list[str], list[str]]] = [
    (FixedText('né"\n/'), ['né"\n/'], ["n"]),
    (OneOf((FixedText("a"), FixedText("ab"), Regex("[0-9]+"))), ["a", "ab", "17"], ["b", "a1"]),
    (Concatenation((Maybe(FixedText("x")), FixedText("y"))), ["y", "xy"], ["x"]),
    (Concatenation((TextUntil("</think>"), Regex("[a-b]"))), ["hm\n<a></think>b", "</think>a"], ["a", "</think>"]),
    (Regex(r"a\/b/c\n"), ["a/b/c\n"], ["a\\/b/c"]),
    (
        Tags((Tagged("<f>", JsonValue({"const": 1}), "</f>"), Tagged("<g>", FixedText("2"), "</g>")), ", ", True),
        ["<f>1</f>", "<g>2</g>, <f>1</f>"], ["", "<f>2</f>", "<f>1</f><f>1</f>"],
    ),
    (Tags((Tagged("<f>", JsonValue({"const": 1}), "</f>"),), ", ", False), ["<f>1</f>"], ["<f>1</f>, <f>1</f>"]),
]  # fmt: skip


@pytest.mark.parametrize(("constraint", "right", "wrong"), COMPOSED, ids=lambda value: str(value)[:30])
@pytest.mark.parametrize("library", ["xgrammar", "llguidance"])
def test_both_libraries_read_a_constraint_alike(
    library: str, constraint: Constraint, right: list[str], wrong: list[str], request: pytest.FixtureRequest
) -> None:
    compiler = request.getfixturevalue("compiler" if library == "xgrammar" else "only_llguidance")
    assert compiler.compile(constraint).library == library
    for text in right:
        assert accepts(new_mask(compiler, constraint), text), text
    for text in wrong:
        assert not accepts(new_mask(compiler, constraint), text), text


def test_a_grammar_in_ebnf_needs_xgrammar(compiler, only_llguidance):
    grammar = Ebnf('root ::= "a" root | "b"')
    assert accepts(new_mask(compiler, grammar), "aab") and not accepts(new_mask(compiler, grammar), "aa")
    with pytest.raises(GrammarRefused, match="a grammar in EBNF needs xgrammar"):
        only_llguidance.compile(grammar)


def test_an_answer_ends_with_its_grammar_or_with_an_end_token(compiler):
    exact = new_mask(compiler, Regex("[a-b]{2}"))
    for token in TOKENIZER("ab")["input_ids"]:
        assert not exact.is_finished and END not in allowed_tokens(exact)
        exact.accept(token)
    assert exact.is_finished and allowed_tokens(exact) == [END]
    open_ended = compiler.compile(Regex("[a-b]+"))
    free, bound = open_ended.new_mask(True), open_ended.new_mask(False)
    for mask in (free, bound):
        mask.accept(TOKENIZER("a")["input_ids"][0])
    assert END in allowed_tokens(free) and END not in allowed_tokens(bound)
    free.accept(END)
    assert free.is_finished and not bound.is_finished
    with pytest.raises(ValueError, match="accepted: those that the grammar allows"):
        bound.accept(TOKENIZER("c")["input_ids"][0])


@pytest.mark.parametrize("library", ["xgrammar", "llguidance"])
def test_special_tokens_are_no_text(library, request):
    """An answer has nothing of them, so they would be a way around a pattern."""
    compiler = request.getfixturevalue("compiler" if library == "xgrammar" else "only_llguidance")
    for constraint, text in [(JsonValue({"type": "string"}), '"'), (TextUntil("</think>"), "")]:
        mask = new_mask(compiler, constraint)
        for token in TOKENIZER(text)["input_ids"]:
            mask.accept(token)
        assert not set(allowed_tokens(mask)) & set(TOKENIZER.all_special_ids), constraint


def test_a_row_that_is_resumed_continues_with_the_right_mask(compiler):
    sampler = Sampler(VOCAB, [END])
    params = compiler.compile(Regex("a{3}b")).on(SamplingParams())
    a, b = (TOKENIZER(text)["input_ids"][0] for text in "ab")
    resumed = sampler.new_row(params, [1], output=[a, a, a])
    assert resumed.mask is not None and allowed_tokens(resumed.mask) == [b]
    fresh = sampler.new_row(params, [1])
    assert fresh.mask is not None and allowed_tokens(fresh.mask) == [a], "rows share nothing"


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ([], "accepted: a JSON schema, which is an object"),
        ({"not": {}}, "the keyword 'not' in the schema"),
        ({"properties": {"a": {"if": {}}}}, "'if' in the schema.properties.a"),
        ({"items": {"anyOf": [{"minLenght": 1}]}}, "'minLenght' in the schema.items.anyOf[0]"),
        ({"properties": {"a": 3}}, "got 3 as the schema.properties.a"),
        ({"$ref": "other.json"}, "accepted: a place in the schema"),
        ({"description": "x" * 100_000}, "bytes as the schema; accepted: up to 65536"),
        ({"x-guidance": {}}, "'x-guidance'"),
    ],
)
def test_schemas_that_are_refused_by_name(schema, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        check_schema(schema, "the schema", 1 << 16)


def test_values_and_names_are_no_keywords():
    schema = {"properties": {"not": {"enum": [{"if": 1}]}, "properties": {"default": {"not": 1}}}, "$defs": {"if": {}}}
    check_schema(schema, "the schema", 1 << 16)
    assert xgrammar_gap({"properties": {"oneOf": {"type": "string"}}}) is None


@pytest.mark.parametrize(
    ("pattern", "gap"),
    [
        ("^[a-z]+$", False), (r"a\.b", False), ("[.]", False), (r"\d+", False), ("a|b", False), (r"\^a", False),
        ("a.b", True), ("[^a]", True), (r"\W", True), ("a^b", True), ("^a|b$", True), ("(^a)", True), (r"[\S]", True),
    ],
)  # fmt: skip
def test_regular_expressions_that_xgrammar_reads_otherwise(pattern, gap):
    assert (regex_gap(pattern) is not None) == gap


# Bounds -------------------------------------------------------------------------------------------------------------

EXPLOSIVE = Regex("(([a-z]{0,200}[0-9]{0,200}){0,200}[a-f]{0,300}){0,300}")


@pytest.fixture
def bounded() -> Iterator[Callable[..., GrammarCompiler]]:
    made: list[GrammarCompiler] = []

    def make(**config: Any) -> GrammarCompiler:
        made.append(GrammarCompiler(TOKENIZER, VOCAB, [END], GrammarConfig(**config)))
        made[-1].compile(FixedText("x"))  # starts the worker
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_time_and_memory_are_bounded_and_the_worker_goes_on(bounded):
    hasty = bounded(compile_s=0.05)
    begun = time.monotonic()
    with pytest.raises(GrammarRefused, match=r"takes more than 0.05 s, or more memory than 1024 MiB"):
        hasty.compile(EXPLOSIVE)
    assert time.monotonic() - begun < 5
    assert accepts(new_mask(hasty, FixedText("x")), "x")
    small = bounded(compile_memory_bytes=1 << 20)
    with pytest.raises(GrammarRefused):
        small.compile(EXPLOSIVE)
    assert accepts(new_mask(small, FixedText("x")), "x")


def test_other_bounds(bounded):
    compiler = bounded(max_regex_characters=10, max_choices=2, max_source_bytes=500, max_compiled_bytes=30_000)
    for constraint, text in [
        (Regex("a" * 11), "a regular expression of 11 characters; accepted: 1 to 10"),
        (Regex(""), "a regular expression of 0 characters"),
        (OneOf((FixedText("a"),) * 3), "got 3 choices; accepted: 1 to 2"),
        (FixedText("a" * 600), "characters of constraints; accepted: up to 500"),
        (Concatenation((FixedText("a"), OneOf(()))), "got 0 choices"),
    ]:
        with pytest.raises(GrammarRefused, match=re.escape(text)):
            compiler.compile(constraint)
    large = compiler.compile(JsonValue({"type": "object", "additionalProperties": True}))
    assert large.library == "llguidance", "it compiles nothing ahead"
    with pytest.raises(ValueError, match="compile_s"):
        GrammarConfig(compile_s=0)


def test_a_worker_that_was_killed_is_started_again(bounded):
    compiler = bounded()
    process = compiler._workers["xgrammar"]._process
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert accepts(new_mask(compiler, FixedText("y")), "y")
    assert compiler._workers["xgrammar"]._process.pid != process.pid


def test_workers_end_with_the_compiler_and_with_their_parent(bounded):
    compiler = bounded()
    process = compiler._workers["xgrammar"]._process
    compiler.close()
    assert process.poll() is not None
    code = (
        "from tests.serving.sampling.test_grammars import *\n"
        "made = GrammarCompiler(TOKENIZER, VOCAB, [END])\nmade.compile(FixedText('x'))\n"
        "print(made._workers['xgrammar']._process.pid, flush=True)\nos._exit(0)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    worker, end = int(found.stdout), time.monotonic() + 20
    while os.path.exists(f"/proc/{worker}"):
        assert time.monotonic() < end, "the worker ends with its parent"
        time.sleep(0.05)


def test_the_cache_is_each_clients_own_and_bounded(compiler):
    constraint = Regex("[a-z]{3}x")
    mine = compiler.compile(constraint, "a")
    assert compiler.compile(Regex("[a-z]{3}x"), "a") is mine is compiler.cached(constraint, "a")
    assert compiler.cached(constraint, "b") is None and compiler.compile(constraint, "b") is not mine
    small = GrammarCompiler(TOKENIZER, VOCAB, [END], GrammarConfig(client_cache_bytes=3 * mine.nbytes))
    try:
        for number in range(6):
            small.compile(Regex(f"[a-z]{{3}}{number}"), "a")
            small.compile(Regex(f"[a-z]{{3}}{number}"), f"other {number}")
        held = [key for key in small._cache if key[0] == "a"]
        assert len(held) == 3 and sum(small._cache[key].nbytes for key in held) <= 3 * mine.nbytes
        assert len(small._cache) == 9
        assert small.cached(Regex("[a-z]{3}5"), "a") is not None and small.cached(Regex("[a-z]{3}0"), "a") is None
    finally:
        small.close()


def test_a_mask_that_takes_too_long_ends_its_answer(compiler, monkeypatch):
    mask = new_mask(compiler, Regex("[a-b]{20}"))
    mask._config = replace(mask._config, max_step_s=0.1)
    fill = mask._fill

    def slow() -> None:
        end = time.thread_time() + 0.03
        while time.thread_time() < end:
            pass
        fill()

    monkeypatch.setattr(mask, "_fill", slow)
    mask.allowed([])
    with pytest.raises(RuntimeError, match=r"the grammar took 0\.\d\d s for \d+ tokens; accepted: 0.1 s, and 0.01 s"):
        for token in TOKENIZER("aaaaaaaa")["input_ids"]:
            mask.accept(token)
            mask.allowed([])


def test_nothing_is_imported_before_it_is_used():
    code = (
        "import sys, tenure.serving.server, tenure.serving.sampling.grammar_compiler\n"
        "assert not {'xgrammar', 'llguidance'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
