"""Compiles constraints of clients into token masks, off every thread that others wait for.

A grammar is compiled in a process of its own, which is ended when it takes too long or too much memory
(`grammar_worker.py`); a client's regular expression can be at nobody's cost but its own. xgrammar is asked first,
llguidance where xgrammar is missing, refuses the constraint, or would not enforce all of it.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import re
import socket
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from .constraint import Constraint
from .grammar_config import GrammarConfig
from .grammar_masks import LLGuidanceMask, XGrammarMask
from .grammar_worker import BUSY, receive, send
from .params import SamplingParams, TokenMask

logger = logging.getLogger(__name__)
Library = Literal["xgrammar", "llguidance"]
LIBRARIES: tuple[Library, ...] = ("xgrammar", "llguidance")
_WORKER = Path(__file__).with_name("grammar_worker.py")


class GrammarRefused(ValueError):
    """A constraint that cannot be enforced, or not within the bounds."""


@dataclass(frozen=True)
class CompiledConstraint:
    """A constraint ready for use.

    Attributes:
        library: which enforces it.
        nbytes: about its size.
        new_mask: of an answer; its argument is the mask's `may_end`.
    """

    library: Library
    nbytes: int
    new_mask: Callable[[bool], TokenMask]

    def on(self, sampling: SamplingParams) -> SamplingParams:
        """The parameters with this constraint."""
        return replace(sampling, make_mask=partial(self.new_mask, not sampling.ignore_eos))


class _WorkerProcess:
    """A running `grammar_worker.py`."""

    def __init__(self, setup: dict[str, Any], start_s: float) -> None:
        self._parent, child = socket.socketpair()
        with child:
            # A session of its own: Ctrl-C is for the server, which may still be answering. -I: no file of the working
            # folder is imported.
            self._process = subprocess.Popen(
                [sys.executable, "-I", str(_WORKER)], stdin=child.fileno(), stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        self._parent.settimeout(start_s)
        self._lock = threading.Lock()
        try:
            send(self._parent, json.dumps(setup | {"path": sys.path}).encode())
            found = receive(self._parent, 1 << 20)
            error = "it has ended" if found is None else json.loads(found)["error"]
        except OSError as failed:
            error = repr(failed)
        if error is not None:
            self.close()
            raise RuntimeError(f"the process that compiles grammars with {setup['library']} has not started: {error}")

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def connect(self) -> socket.socket:
        """A connection to a new child; OSError if the process has ended."""
        mine, other = socket.socketpair()
        with other, self._lock:
            socket.send_fds(self._parent, [b"."], [other.fileno()])
        return mine

    def close(self) -> None:
        """Ends it; children that compile end in time by themselves."""
        self._parent.close()
        try:
            self._process.wait(1.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class GrammarCompiler:
    """Compiles constraints for one model. `compile` blocks and may be called by several threads.

    Args:
        tokenizer: of transformers, a fast one; copied by `prepare`.
        vocab_size: width of the model's logits.
        end_token_ids: the model's end tokens.
    """

    def __init__(
        self, tokenizer: Any, vocab_size: int, end_token_ids: Sequence[int], config: GrammarConfig | None = None
    ) -> None:
        self.config = config or GrammarConfig()
        self._tokenizer, self._vocab_size, self._end_token_ids = tokenizer, vocab_size, tuple(end_token_ids)
        self._missing = {name for name in LIBRARIES if find_spec(name) is None}
        self._lock = threading.Lock()  # guards the following; held while a worker starts
        self._vocabularies: dict[Library, Any] = {}
        self._workers: dict[Library, _WorkerProcess] = {}
        self._cache_lock = threading.Lock()
        self._cache: OrderedDict[tuple[str, bytes], CompiledConstraint] = OrderedDict()

    @property
    def available(self) -> bool:
        """Whether one of the libraries is installed."""
        return len(self._missing) < len(LIBRARIES)

    def cached(self, constraint: Constraint, client: str = "") -> CompiledConstraint | None:
        """The constraint, if it is in the client's cache; does not wait."""
        return self._cached(client, constraint.structural_tag(self.config.max_whitespace))

    def _cached(self, client: str, source: str) -> CompiledConstraint | None:
        key = _key(client, source)
        with self._cache_lock:
            found = self._cache.get(key)
            if found is not None:
                self._cache.move_to_end(key)
            return found

    def compile(self, constraint: Constraint, client: str = "") -> CompiledConstraint:
        """The constraint's masks, from the client's cache or compiled.

        Raises:
            GrammarRefused: it cannot be enforced, or takes too long.
            RuntimeError: no library is installed, or a worker does not start.
        """
        if not self.available:
            raise RuntimeError("constraints on answers need xgrammar or llguidance: pip install 'tenure[serve]'")
        try:
            constraint.check(self.config)
        except ValueError as error:
            raise GrammarRefused(str(error)) from None
        source, limit = constraint.structural_tag(self.config.max_whitespace), self.config.max_source_bytes
        if len(source) > limit:
            raise GrammarRefused(f"got {len(source)} characters of constraints; accepted: up to {limit}")
        compiled = self._cached(client, source) or self._compile(constraint, source)
        with self._cache_lock:
            self._cache[_key(client, source)] = compiled
            self._trim(client)
        return compiled

    def _trim(self, client: str) -> None:
        """Drops the compiled grammars that were used longest ago."""
        for limit, mine in ((self.config.client_cache_bytes, True), (self.config.cache_bytes, False)):
            keys = [key for key in self._cache if not mine or key[0] == client]
            excess = sum(self._cache[key].nbytes for key in keys) - limit
            for key in keys:
                if excess <= 0:
                    break
                excess -= self._cache.pop(key).nbytes

    def _compile(self, constraint: Constraint, source: str) -> CompiledConstraint:
        reasons = []
        if "xgrammar" not in self._missing:
            gap = constraint.gap
            if gap is None:
                try:
                    return self._with_xgrammar(source)
                except _TooMuch:
                    raise
                except GrammarRefused as error:
                    gap = str(error)
            reasons.append(f"xgrammar: {gap}")
        if "llguidance" not in self._missing:
            try:
                return self._with_llguidance(constraint)
            except _TooMuch:
                raise
            except ValueError as error:
                reasons.append(f"llguidance: {error}")
        raise GrammarRefused(f"got a constraint that cannot be enforced: {'; '.join(reasons)}")

    def _with_xgrammar(self, source: str) -> CompiledConstraint:
        compiled = self._run("xgrammar", source)
        import xgrammar

        grammar = xgrammar.CompiledGrammar.deserialize_json(compiled.decode(), self._vocabularies["xgrammar"])
        new_mask = partial(XGrammarMask, grammar, self._vocab_size, self._end_token_ids, self.config)
        return CompiledConstraint("xgrammar", len(compiled), new_mask)

    def _with_llguidance(self, constraint: Constraint) -> CompiledConstraint:
        source = constraint.lark_grammar(self.config.max_whitespace)
        self._run("llguidance", source)  # only to see that it stays within the bounds
        import llguidance

        matcher = llguidance.LLMatcher(self._vocabularies["llguidance"], source, log_level=0)
        new_mask = partial(LLGuidanceMask, matcher, self._vocab_size, self._end_token_ids, self.config)
        return CompiledConstraint("llguidance", len(source) + _MATCHER_BYTES, new_mask)

    def _run(self, library: Library, source: str) -> bytes:
        """The result of a worker's child.

        Raises:
            GrammarRefused: the library refuses the source, or the child was ended.
        """
        config, begun = self.config, time.perf_counter()
        try:
            connection = self._worker(library).connect()
        except OSError:  # it was ended from outside just now
            connection = self._worker(library).connect()
        with connection:
            connection.settimeout(config.compile_s * BUSY + config.start_s)
            try:
                send(connection, source.encode())
                answer = receive(connection, config.max_compiled_bytes)
                result = receive(connection, config.max_compiled_bytes)
            except OSError:
                answer = result = None
        took_s = time.perf_counter() - begun
        if answer is None or result is None:
            raise _TooMuch(
                f"got a constraint that takes more than {config.compile_s:g} s, or more memory than "
                f"{config.compile_memory_bytes >> 20} MiB, to compile; accepted: simpler ones"
            )
        logger.debug("%s compiled a constraint of %d characters in %.3f s", library, len(source), took_s)
        error = json.loads(answer)["error"]
        if error is not None:
            raise GrammarRefused(_first_words(error))
        return result

    def _worker(self, library: Library) -> _WorkerProcess:
        """The running worker of a library; started where there is none."""
        with self._lock:
            found = self._workers.get(library)
            if found is None or not found.alive:
                if library not in self._vocabularies:
                    self._vocabularies[library] = self._vocabulary(library)
                if found is not None:
                    found.close()
                found = self._workers[library] = _WorkerProcess(self._setup(library), self.config.start_s)
            return found

    def _vocabulary(self, library: Library) -> Any:
        """The tokenizer as the library has it, in this process."""
        tokenizer = copy.deepcopy(self._tokenizer)  # others encode with it meanwhile
        if library == "xgrammar":
            import xgrammar

            found = xgrammar.TokenizerInfo.from_huggingface(
                tokenizer, vocab_size=self._vocab_size, stop_token_ids=list(self._end_token_ids)
            )
            # It would take a special token for its name as text, of which a decoded answer has nothing.
            texts: list[bytes | str] = [""] * self._vocab_size
            special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
            for text, id in tokenizer.get_vocab().items():
                if id < self._vocab_size and id not in special:
                    texts[id] = text
            return xgrammar.TokenizerInfo.from_vocab_and_metadata(texts, found.dump_metadata())
        import llguidance

        return llguidance.LLTokenizer(
            self._tokenizer_json(), n_vocab=self._vocab_size, eos_token=list(self._end_token_ids)
        )

    def _tokenizer_json(self) -> str:
        backend = copy.copy(self._tokenizer.backend_tokenizer)
        backend.no_padding()
        backend.no_truncation()
        return backend.to_str()

    def _setup(self, library: Library) -> dict[str, Any]:
        config = self.config
        text = self._vocabularies[library].serialize_json() if library == "xgrammar" else self._tokenizer_json()
        return {
            "library": library, "tokenizer": text, "vocab_size": self._vocab_size,
            "end_token_ids": list(self._end_token_ids), "compile_s": config.compile_s,
            "memory_bytes": config.compile_memory_bytes, "max_bytes": config.max_compiled_bytes,
            "max_step_s": config.max_step_s,
        }  # fmt: skip

    def close(self) -> None:
        """Ends the workers; without it they end with this process."""
        with self._lock, suppress(OSError):
            while self._workers:
                self._workers.popitem()[1].close()


_MATCHER_BYTES = 1 << 20  # about the size of an llguidance matcher, which does not tell it


class _TooMuch(GrammarRefused):
    """Compiling exceeded a bound."""


def _key(client: str, source: str) -> tuple[str, bytes]:
    return client, hashlib.sha256(source.encode()).digest()


def _first_words(error: str) -> str:
    """A library's message without its place in the library's source, at most 300 characters."""
    text = re.sub(r"\s1 \|.*| ?<state>.*", "", " ".join(error.split()))  # llguidance repeats the grammar
    text = text.replace("NoExtensionBias", "no text is allowed")
    if text.startswith("["):
        text = text.partition(": ")[2] or text
    return text[:300]
