"""The model type `tenure` of lm-eval: its `hf` model, with a KV cache that is kept within a budget.

`TenureLM` is made when it is first asked for, since it derives from a class of lm-eval, which is an extra.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache as once
from typing import TYPE_CHECKING, Any

import torch

from ...eviction import Session, evict
from ...retention import RetentionGates
from ...retention.calibration import weights_digest
from ..prompts import shared_start
from .options import Options, check_config, find_config, load_gates
from .scoring import CacheMeter, Scored, Scorer, left_padded

if TYPE_CHECKING:
    TenureLM: type[Evicting]

_Hf: Any = object  # `TenureLM` puts lm-eval's class here

CPU_BATCH = 8  # rows of `batch_size=auto` on a CPU, which never runs out of memory, but of patience
SETTINGS_KEY = "tenure settings"  # of the answers in lm-eval's cache; its other keys are digests
_NO_SETTINGS = ("device", "batch_size", "max_batch_size", "tokenizer")  # they change no answer, or are not plain
_created: ContextVar[list[Evicting] | None] = ContextVar("created", default=None)


@contextmanager
def created_models() -> Iterator[list[Evicting]]:
    """The models made within the block, as lm-eval hands out none of them."""
    models: list[Evicting] = []
    token = _created.set(models)
    try:
        yield models
    finally:
        _created.reset(token)


def answer_settings(
    pretrained: Any, options: Options, others: Mapping[str, Any], gates: RetentionGates | None
) -> dict[str, Any]:
    """Every setting that changes answers, as plain values for JSON: the key of answers that were cached.

    Args:
        pretrained: the model's name, or the model.
        others: lm-eval's own model arguments.
        gates: those that the options name.
    """
    name = pretrained if isinstance(pretrained, str) else str(pretrained.config._name_or_path)
    plain = {key: str(value) for key, value in sorted(others.items()) if key not in _NO_SETTINGS}
    weights = None if gates is None else weights_digest(gates.state_dict())
    return {"pretrained": name, **options.to_dict(), "gates": weights, **plain}


def settings_digest(settings: Mapping[str, Any]) -> str:
    """Twelve hexadecimal digits that differ where settings do."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


class Evicting(_Hf):
    """The differences to lm-eval's `hf`; `TenureLM` joins the two.

    With nothing to evict (`policy=full`, or a budget of 1.0) every number is computed by `hf`'s own code.

    Args:
        pretrained: a Hub id, a local folder, `demo`, or a loaded model.
        arguments: of `Options`, and those of lm-eval's `hf`.

    Raises:
        ValueError: see `Options`, `load_gates` and `check_config`, before the model is loaded; gates of a model with
            other weights, after that.
    """

    def __init__(self, pretrained: Any, **arguments: Any) -> None:
        self.options, others = Options.split(arguments)
        gates = load_gates(self.options)
        self.settings = answer_settings(pretrained, self.options, others, gates)
        self._longest: int | None = None  # of the running requests: tokens of the longest one
        if isinstance(pretrained, str):
            pretrained, config = find_config(pretrained, others)
            others.setdefault("device", "cuda" if torch.cuda.is_available() else "cpu")
        else:
            config = pretrained.config
        check_config(self.options, gates, config, others)
        super().__init__(pretrained=pretrained, **others)
        self.gates = None if gates is None else gates.to(self.model.device)
        self.meter = CacheMeter()
        self._session: Session | None = None
        self._places: dict[str, int] = {}  # of the running requests: where each prompt's question begins
        self._tails: list[int] = []  # of the running batch: tokens of each row's question
        with self._evicting():
            pass  # gates of another model are refused here, not after the first task is built
        models = _created.get()
        if models is not None:
            models.append(self)

    def set_cache_hook(self, cache_hook: Any) -> None:
        """lm-eval's, for `use_cache`, whose keys know the requests alone.

        Raises:
            ValueError: the file has answers of other settings.
        """
        answers = getattr(cache_hook, "dbdict", None)
        if answers is not None:
            text = json.dumps(self.settings, sort_keys=True)
            found = answers.get(SETTINGS_KEY) if len(answers) else text
            if found != text:
                raise ValueError(
                    f"got a --use_cache with answers of {_difference(found, self.settings)}; accepted: a cache of "
                    "these settings, or a path of its own"
                )
            answers[SETTINGS_KEY] = text
        super().set_cache_hook(cache_hook)

    def _detect_batch_size(self, requests: Sequence[Any] | None = None, pos: int = 0) -> int:
        """lm-eval's, which tries rows of the model's maximal length; here, of the longest request."""
        if self.device.type == "cpu":
            return min(CPU_BATCH, self.max_batch_size)
        if requests or self._longest is None:
            return super()._detect_batch_size(requests, pos)
        before, self._max_length = self._max_length, min(self._longest, self.max_length)
        try:
            return super()._detect_batch_size()
        finally:
            self._max_length = before

    @contextmanager
    def _evicting(self) -> Iterator[Session]:
        """The `evict` block around all forwards of a kind of requests; an inner one is the outer one."""
        if self._session is not None:
            yield self._session
            return
        with evict(self.model, gates=self.gates, **self.options.evict_arguments) as session:
            self._session = session
            try:
                yield session
            finally:
                self._session = None

    # Requests whose context is compressed before the question run apart from those whose whole prompt is compressed.

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        return self._in_groups(requests, lambda group: super(Evicting, self).generate_until(group, disable_tqdm))

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return self._in_groups(requests, lambda group: super(Evicting, self).loglikelihood(group, disable_tqdm))

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        self._places = {}
        self._longest = self._tokens_of(requests)
        with self._evicting():
            return super().loglikelihood_rolling(requests, disable_tqdm)

    def _in_groups(self, requests: list[Any], run: Callable[[list[Any]], list[Any]]) -> list[Any]:
        places = [self._place(request) for request in requests]
        self._longest = self._tokens_of(requests)
        answers: list[Any] = [None] * len(requests)
        for agnostic in (False, True):
            chosen = [number for number, place in enumerate(places) if (place is not None) == agnostic]
            if not chosen:
                continue
            self._places = {requests[number].args[0]: places[number] or 0 for number in chosen} if agnostic else {}
            with self._evicting():
                results = run([requests[number] for number in chosen])
            for number, result in zip(chosen, results, strict=True):
                answers[number] = result
        return answers

    def _tokens_of(self, requests: list[Any]) -> int | None:
        """Tokens of the longest request with what is generated for it; None unless a batch size has to be found."""
        if self.batch_size != "auto" or not requests:
            return None
        lengths = []
        for request in requests:
            text, *rest = request.args
            written = rest[0] if rest else ""
            more = written.get("max_gen_toks", self.max_gen_toks) if isinstance(written, dict) else 0
            lengths.append(len(self.tok_encode(text + (written if isinstance(written, str) else ""))) + more)
        return max(lengths)

    def _place(self, request: Any) -> int | None:
        if not self.options.evicts:
            return None
        return self.options.boundaries.find(request.args[0], request.doc, request.task_name or "")

    # Generation.

    def tok_batch_encode(self, strings: Sequence[str], *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        ids, mask = super().tok_batch_encode(strings, *args, **kwargs)
        self._tails = []
        if self._places:
            for text in strings:
                whole = super().tok_batch_encode([text])[0][0].tolist()
                context = super().tok_batch_encode([text[: self._places[text]]])[0][0].tolist()
                self._tails.append(len(whole) - shared_start(context, whole))
        return ids, mask

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **kwargs: Any) -> torch.Tensor:
        session = self._session
        assert session is not None, "requests run inside the block"
        if not self._tails:
            kwargs["logits_processor"] = [*kwargs.get("logits_processor", ()), self._noting(kwargs["attention_mask"])]
            output = super()._model_generate(context, max_length, stop, **kwargs)
            self.meter.seen(session.last_cache)
            return output
        mask = kwargs.pop("attention_mask")
        contexts, questions = [], []
        for ids, real, tail in zip(context.tolist(), mask.sum(1).tolist(), self._tails, strict=True):
            if real <= tail:
                raise ValueError(f"a question of {tail} tokens leaves no room before it: raise max_length")
            contexts.append(ids[len(ids) - real : len(ids) - tail])
            questions.append(ids[len(ids) - tail :])
        pad = self.tokenizer.pad_token_id
        ids, mask = left_padded(contexts, pad, context.device)
        cache = session.new_cache()
        with torch.no_grad(), self._autocast():
            session.extend(cache, ids, mask, logits_to_keep=1)
        self.meter.compressed(cache, [len(one) for one in contexts])
        # Of the cache transformers makes no copies for beams, as it does of the prompts.
        cache.batch_repeat_interleave(kwargs.get("num_beams") or 1)
        asked, asked_mask = left_padded(questions, pad, context.device)
        ids, mask = torch.cat([ids, asked], 1), torch.cat([mask, asked_mask], 1)
        room = max_length - context.shape[1]
        output = super()._model_generate(
            ids, ids.shape[1] + room, stop, attention_mask=mask, past_key_values=cache, **kwargs
        )
        self.meter.seen(cache)
        return torch.cat([context, output[:, ids.shape[1] :]], dim=1)

    def _noting(self, mask: torch.Tensor) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        """A logits processor that changes nothing and counts the cache once, when the prompt has been read."""
        waiting = [mask.sum(1).tolist()]

        def note(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            if waiting and self._session is not None:
                lengths = waiting.pop()
                beams = scores.shape[0] // len(lengths)
                self.meter.compressed(self._session.last_cache, [n for n in lengths for _ in range(beams)])
            return scores

        return note

    # Log-likelihoods.

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        with self._evicting() as session:
            if not self.options.evicts:
                return self._as_hf(session, requests, disable_tqdm, override_bs)
            scorer = Scorer(session, self.meter, self.tokenizer.pad_token_id, self.softmax_dtype)
            return self._scored(scorer, requests, disable_tqdm, override_bs)

    def _as_hf(
        self, session: Session, requests: list[Any], disable_tqdm: bool, override_bs: int | None
    ) -> list[tuple[float, bool]]:
        answers = super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm, override_bs=override_bs)
        self.meter.full(session.last_cache, [len(context) for _, context, _ in requests])
        return answers

    def _scored(
        self, scorer: Scorer, requests: list[Any], disable_tqdm: bool, override_bs: int | None
    ) -> list[tuple[float, bool]]:
        from tqdm import tqdm

        parts = [self._parts(*request) for request in requests]
        same: dict[Any, list[int]] = {}
        for number, part in enumerate(parts):
            # Windows of rolling requests, which have no strings, share their first token only: nothing worth sharing.
            same.setdefault(number if requests[number][0] is None else part.context, []).append(number)
        groups = sorted(same.values(), key=lambda group: -len(parts[group[0]].context))
        size = override_bs or (self._detect_batch_size() if self.batch_size == "auto" else int(self.batch_size))
        answers: list[Any] = [None] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="Scoring under eviction") as bar:
            for start in range(0, len(groups), size):
                batch = groups[start : start + size]
                with self._autocast():
                    results = scorer.score([[parts[number] for number in group] for group in batch])
                for group, found in zip(batch, results, strict=True):
                    for number, answer in zip(group, found, strict=True):
                        answers[number] = answer
                        if requests[number][0] is not None:
                            self.cache_hook.add_partial("loglikelihood", requests[number][0], answer)
                    bar.update(len(group))
        return answers

    def _parts(self, strings: tuple[str, str] | None, context: list[int], continuation: list[int]) -> Scored:
        """A request cut where its question begins, and from the left where it is longer than the model's context."""
        kept = min(len(context), self.max_length + 1 - len(continuation))
        if kept < 1:
            raise ValueError(f"a continuation of {len(continuation)} tokens leaves no room in {self.max_length}")
        cut = len(context)
        if strings is not None and strings[0] in self._places:
            # As lm-eval cuts the context from the continuation: trailing spaces belong to the continuation.
            before = self.tok_encode(strings[0][: self._places[strings[0]]].rstrip())
            cut = shared_start(before, context)
        first = len(context) - kept
        if cut <= first:
            raise ValueError(f"a question of {len(context) - cut} tokens leaves no room before it: raise max_length")
        return Scored(tuple(context[first:cut]), tuple(context[cut:]), tuple(continuation))

    def _autocast(self) -> torch.autocast:
        kind = self.mixed_precision_dtype
        return torch.autocast(device_type=self.device.type, dtype=kind, enabled=kind is not None)

    def get_model_info(self) -> dict[str, Any]:
        """lm-eval's own, and under `tenure` the options and the measurements of the caches."""
        return super().get_model_info() | {"tenure": self.measured}

    @property
    def measured(self) -> dict[str, Any]:
        """The options, and the measurements of the caches so far."""
        return self.options.to_dict() | self.meter.summary()


def _difference(found: str | None, settings: Mapping[str, Any]) -> str:
    """Settings of cached answers that differ from those of now: `policy='retention' (now 'snapkv')`."""
    if found is None:
        return "unknown settings"
    before = json.loads(found)
    names = sorted({*before, *settings})
    pairs = [(name, before.get(name), settings.get(name)) for name in names]
    return ", ".join(f"{name}={old!r} (now {new!r})" for name, old, new in pairs if old != new)


@once
def model_class() -> type[Evicting]:
    """lm-eval's `hf` model with eviction.

    Raises:
        ImportError: lm-eval is not installed.
    """
    try:
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise ImportError(f"the model type 'tenure' needs lm-eval: pip install 'tenure[eval]' ({error})") from error
    return type("TenureLM", (Evicting, HFLM), {"__module__": __name__, "__doc__": Evicting.__doc__})


def __getattr__(name: str) -> Any:
    if name == "TenureLM":
        return model_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
