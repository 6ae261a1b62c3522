"""The model type `tenure` of lmms-eval: a model with images whose KV cache is kept within a budget.

lmms-eval finds it by the entry point `lmms_eval.models` of tenure's package. `TenureChat` is made when it is first
asked for, since it derives from a class of lmms-eval. It answers the tasks that generate (`generate_until`), one at a
time.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cache as once
from typing import TYPE_CHECKING, Any

import torch

from ...eviction import RaggedCache, Session, evict, kept_by_modality, modality_ranges
from ..image_prompts import ImagePrompt, conversation_prompt
from .options import Options, check_config, find_config, load_gates
from .scoring import CacheMeter

if TYPE_CHECKING:
    TenureChat: type[EvictingChat]

logger = logging.getLogger(__name__)

MODEL_TYPE = "tenure"
MAX_NEW_TOKENS = 1024  # where a task does not say
_LMMS_OWN = ("max_batch_size",)  # arguments that lmms-eval adds


class EvictingChat:
    """A model of transformers with its processor, as lmms-eval asks it; `TenureChat` joins it with lmms-eval's class.

    With `question=agnostic` all before the last text of the last user's turn is read and compressed before that text,
    if all images come before it; other prompts, and those of `aware` and `auto`, are read whole and then compressed.

    Args:
        pretrained: a Hub id or a local folder.
        device: None: the GPU if there is one.
        dtype: `auto` is bfloat16 on a GPU and float32 on a CPU.
        batch_size: 1; prompts with images run one by one.
        arguments: of `Options`, but for the rules by which lm-eval's prompts are split.

    Attributes:
        meter: what the caches held after their compression.
        kept: by modality, the entries that were kept and those of a cache that evicts nothing.

    Raises:
        ValueError: see `Options`, `load_gates` and `check_config`, before the model is loaded; an unknown argument; a
            model without images.
    """

    is_simple = False  # lmms-eval's word for models that take messages
    _log = staticmethod(logger.info)

    def __init__(
        self, pretrained: str, device: str | None = None, dtype: str = "auto", batch_size: int | str = 1,
        **arguments: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self.options, others = Options.split(arguments)
        unknown = sorted(others.keys() - set(_LMMS_OWN))
        if unknown:
            raise ValueError(f"no option {unknown[0]!r}; accepted: pretrained, device, dtype and those of Options")
        if str(batch_size) not in ("1", "None"):
            raise ValueError(f"got batch_size {batch_size}; accepted: 1, as prompts with images run one by one")
        if self.options.question_field or self.options.question_pattern:
            raise ValueError("question_field and question_pattern split texts; accepted here: question=agnostic alone")
        gates = load_gates(self.options)
        source, config = find_config(pretrained, {})
        check_config(self.options, gates, config, {"dtype": dtype})
        self.processor, self._model = _loaded(pretrained, source, device, dtype)
        self.gates = None if gates is None else gates.to(self._model.device)
        self.meter = CacheMeter()
        self.kept: dict[str, tuple[int, int]] = {}
        with self._evicting():
            pass  # gates of another model are refused here, not after the first task is built

    @property
    def device(self) -> torch.device:
        return self._model.device

    @property
    def measured(self) -> dict[str, Any]:
        """The options, and means over the caches so far; `kept_share` also of each modality."""
        shares = {f"kept_share/{name}": kept / full for name, (kept, full) in self.kept.items()}
        return self.options.to_dict() | self.meter.summary() | shares

    def _evicting(self) -> Any:
        return evict(self._model, gates=self.gates, **self.options.evict_arguments)

    # What lmms-eval calls.

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Answers to requests whose `args` are `(context, doc_to_messages, generation_kwargs, doc_id, task, split)`."""
        answers = []
        for request in requests:
            _, doc_to_messages, settings, doc_id, task, split = request.args
            messages = doc_to_messages(self.task_dict[task][split][doc_id])  # type: ignore[attr-defined]
            answers.append(self.answer(messages, settings))
        self._log(f"tenure: {self.measured}")
        return answers

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        raise NotImplementedError(_only_generation("loglikelihood"))

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        raise NotImplementedError(_only_generation("generate_until_multi_round"))

    @torch.no_grad()
    def answer(self, messages: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> str:
        """The model's answer to a conversation.

        Args:
            messages: with role and content, a list of parts of type text or image (`url`: a PIL image or a file).
            settings: `max_new_tokens`, `do_sample`, `temperature`, `top_p`, `num_beams`, and `until`: texts that end
                an answer.

        Raises:
            ValueError: a part of another type.
        """
        turns = [(str(message["role"]), [_part(part) for part in message["content"]]) for message in messages]
        prompt = self._split(turns)
        ids = [*prompt.context_ids, *prompt.rest]
        extra = {name: self._placed(value) for name, value in prompt.extra.items()}
        ranges = modality_ranges(self._model.config, torch.tensor(ids))[0]
        row = torch.tensor([ids], device=self.device)
        with self._evicting() as session:
            cache, noting = session.new_cache(), []
            if self._agnostic(turns):
                session.extend(cache, prompt.context_ids, logits_to_keep=1, inputs=extra)
                self._count(cache, len(prompt.context_ids), ranges)
                extra = {}  # the images are in the cache
            else:
                noting = [self._noting(session, len(ids), ranges)]
            output = self._model.generate(
                row, **extra, attention_mask=torch.ones_like(row), past_key_values=cache, logits_processor=noting,
                pad_token_id=self._end_token(), **_generation(settings),
            )  # fmt: skip
            self.meter.seen(cache)
        text = self.processor.tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)
        for stop in _stops(settings):
            text = text.partition(stop)[0]
        return text

    def _agnostic(self, turns: Sequence[tuple[str, Sequence[Any]]]) -> bool:
        """Whether a conversation is compressed before its question: its last turn has texts and images before it."""
        return self.options.question == "agnostic" and len(turns[-1][1]) > 1 and isinstance(turns[-1][1][-1], str)

    def _split(self, turns: Sequence[tuple[str, Sequence[Any]]]) -> ImagePrompt:
        role, parts = turns[-1]
        if not self._agnostic(turns):
            return conversation_prompt(self.processor, turns)
        return conversation_prompt(self.processor, [*turns[:-1], (role, parts[:-1])], parts[-1])

    def _noting(self, session: Session, tokens: int, ranges: Any) -> Any:
        """A logits processor that changes nothing and counts the cache once, when the prompt has been read."""
        waiting = [tokens]

        def note(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            if waiting:
                self._count(session.last_cache, waiting.pop(), ranges)
            return scores

        return note

    def _count(self, cache: RaggedCache, tokens: int, ranges: Any) -> None:
        self.meter.compressed(cache, [tokens] * len(cache.tokens_seen))
        within = {name: tuple((a, min(b, tokens)) for a, b in spans if a < tokens) for name, spans in ranges.items()}
        for one in kept_by_modality(cache, within):
            kept, full = self.kept.get(one.modality, (0, 0))
            self.kept[one.modality] = kept + one.entries, full + one.full_entries

    def _placed(self, value: torch.Tensor) -> torch.Tensor:
        return value.to(self.device, self._model.dtype if value.is_floating_point() else None)

    def _end_token(self) -> int | None:
        tokenizer = self.processor.tokenizer
        return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def manifest() -> Any:
    """The entry of lmms-eval's registry, which the entry point asks for."""
    from lmms_eval.models.registry_v2 import ModelManifest  # pyright: ignore[reportMissingImports]

    return ModelManifest(MODEL_TYPE, chat_class_path=f"{__name__}.TenureChat")


@once
def model_class() -> type[EvictingChat]:
    """lmms-eval's model type.

    Raises:
        ImportError: lmms-eval is not installed.
    """
    try:
        from lmms_eval.api.model import lmms  # pyright: ignore[reportMissingImports]
        from loguru import logger as shown  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(f"the model type 'tenure' needs lmms-eval: pip install lmms-eval ({error})") from error
    own = {"__module__": __name__, "__doc__": EvictingChat.__doc__, "_log": staticmethod(shown.info)}
    return type("TenureChat", (EvictingChat, lmms), own)


def __getattr__(name: str) -> Any:
    if name == "TenureChat":
        return model_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _loaded(name: str, source: str, device: str | None, dtype: str) -> tuple[Any, Any]:
    """Processor and model, in eval mode on its device."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if dtype == "auto":
        dtype = "float32" if target.type == "cpu" else "bfloat16"
    processor = AutoProcessor.from_pretrained(source)
    if getattr(processor, "image_processor", None) is None or getattr(processor, "tokenizer", None) is None:
        raise ValueError(f"the model {name!r} takes no images: its processor is a {type(processor).__name__}")
    model: Any = AutoModelForImageTextToText.from_pretrained(source, dtype=getattr(torch, dtype))
    return processor, model.to(target).eval()


def _part(part: Mapping[str, Any]) -> Any:
    """A text, or an image."""
    kind = part.get("type")
    if kind == "text":
        return str(part["text"])
    if kind != "image":
        raise ValueError(f"got a part of type {kind!r}; accepted: text and image")
    image = part["url"]
    if isinstance(image, str):
        from tenure.images import open_image

        return open_image(image)
    return image.convert("RGB")


def _generation(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `generate` from those of a task; a temperature of 0 is greedy."""
    temperature = float(settings.get("temperature") or 0.0)
    sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if temperature > 0 and settings.get("do_sample", True):
        sampling = {"do_sample": True, "temperature": temperature, "top_p": settings.get("top_p")}
    tokens = int(settings.get("max_new_tokens") or MAX_NEW_TOKENS)
    return {"max_new_tokens": tokens, "num_beams": int(settings.get("num_beams") or 1), **sampling}


def _stops(settings: Mapping[str, Any]) -> list[str]:
    given = settings.get("until") or []
    return [stop for stop in ([given] if isinstance(given, str) else list(given)) if stop]


def _only_generation(kind: str) -> str:
    return f"the model type {MODEL_TYPE!r} answers tasks of lmms-eval that generate, not {kind!r}"
