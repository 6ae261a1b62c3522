"""Bounds of constraints on answers. A file of its own: what checks a constraint and what compiles it read it."""

from __future__ import annotations

from dataclasses import dataclass

from tenure.checked import Count, Positive, verify


@dataclass(frozen=True)
class GrammarConfig:
    """Bounds of grammars.

    Attributes:
        max_source_bytes: of a schema, a grammar, a choice, or all of these in a request together, as text.
        max_regex_characters: of a regular expression.
        max_choices: texts of a choice.
        max_whitespace: characters between two tokens of JSON; without a bound, weak models write nothing else.
        compile_s: seconds of computing for one grammar; then its process is ended.
        compile_memory_bytes: address space that compiling may add to the process.
        max_compiled_bytes: of a compiled grammar.
        start_s: seconds in which a worker process must have imported its library; it is started at the first use.
        max_step_s, mean_step_s: seconds of masks for the first token of an answer, and for each further one, beyond
            which the answer ends with an error: masks are computed between the steps of all answers.
        cache_bytes: of compiled grammars that are kept, of all clients.
        client_cache_bytes: the same, of one client; clients share none, as the time to an answer would tell.
        max_client_compiles: grammars of one client that are compiled at a time; more wait.
        max_client_waiting: grammars of one client that are compiled or wait; more get status 429.
        max_compiles: grammars of all clients that are compiled at a time; more wait.

    Raises:
        ValueError: a value of another type or out of range.
    """

    max_source_bytes: Count = 64 << 10
    max_regex_characters: Count = 4096
    max_choices: Count = 1024
    max_whitespace: Count = 8
    compile_s: Positive = 5.0
    compile_memory_bytes: Count = 1 << 30
    max_compiled_bytes: Count = 32 << 20
    start_s: Positive = 60.0
    max_step_s: Positive = 0.25
    mean_step_s: Positive = 0.01
    cache_bytes: Count = 256 << 20
    client_cache_bytes: Count = 32 << 20
    max_client_compiles: Count = 2
    max_client_waiting: Count = 256
    max_compiles: Count = 4

    def __post_init__(self) -> None:
        verify(self)
