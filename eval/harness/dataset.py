"""The generated tasks as lm-eval wants them: documents, and the score of an answer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from ..cases import answer_score
from ..tasks.kinds import TaskBuilder, get_kind

LENGTH, CASES = 4096, 100
TAKEN = ("length", "cases", "seed", "texts", "tokenizer")  # of `--metadata`
FIELDS = ("context", "question", "aware", "outputs", "match")
PYDOC = "pydoc"


def build(kind: str, aware: bool, cases: int = CASES, **given: Any) -> dict[str, Any]:
    """`{"test": Dataset}`, a task's `custom_dataset`; arguments come from its YAML, `--metadata` and `--model_args`.

    Args:
        kind: the generated task.
        aware: the value of the documents' field `aware`: whether the question may be read before the compression.
        cases: how many.
        given: `length, seed, texts, tokenizer, pretrained` of `_builder`; others do not matter here.

    Raises:
        ValueError: an unknown kind, no tokenizer, a number below 1, texts that are not there, or a length that cannot
            hold a case.
    """
    from datasets import Dataset

    get_kind(kind)
    builder = _builder(cases=cases, **given)
    return {"test": Dataset.from_list([document(builder, kind, index, aware) for index in range(cases)])}


def check_kinds(kinds: Iterable[str], **given: Any) -> None:
    """Raises ValueError for what `build` would refuse, by making the first case of each of these kinds."""
    builder = _builder(**given)
    for kind in kinds:
        builder.text(kind, 0)


def _builder(
    length: int = LENGTH,
    cases: int = CASES,
    seed: int = 0,
    texts: str | Sequence[str] = "demo",
    tokenizer: Any = None,
    pretrained: Any = None,
    **others: Any,
) -> TaskBuilder:
    """What makes the cases.

    Args:
        length: tokens of every context, without special tokens and the chat template's.
        cases: how many there will be.
        seed: another seed gives other cases.
        texts: `demo` (held-out essays), `pydoc` (Python's own help), a text file, a folder, or texts.
        tokenizer: a tokenizer, or its name; by default that of the model, `pretrained`.
        others: what else the same flags give lm-eval.
    """
    for name, number in (("length", length), ("cases", cases)):
        if not isinstance(number, int) or number < 1:
            raise ValueError(f"{name} is {number!r}; an integer of at least 1 is accepted")
    return TaskBuilder(_tokenizer(tokenizer or pretrained), _texts(texts), length, seed)


def document(builder: TaskBuilder, kind: str, index: int, aware: bool) -> dict[str, Any]:
    """One case as lm-eval's document.

    `context`, `question` and `reply` make the prompt; `outputs` and `match` say what is right; the rest is for people.
    """
    made = builder.text(kind, index)
    draft = made.draft
    return {
        "context": made.document,
        "question": f"\n\n{draft.question}",
        "reply": draft.reply,
        "outputs": list(draft.answers),
        "match": draft.match,
        "aware": aware,
        "length": builder.length,
        "index": index,
        "seed": builder.seed,
        "key": draft.key,
        "evidence": list(draft.evidence),
    }


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """`{"accuracy": score}` of the first answer, see `answer_score`.

    Raises:
        ValueError: a document without one of the fields that the tasks need.
    """
    missing = [name for name in FIELDS if name not in doc]
    if missing:
        raise ValueError(f"a document needs the fields {', '.join(FIELDS)}; it has no {', '.join(missing)}")
    return {"accuracy": answer_score(results[0], doc["outputs"], doc["match"])}


def _tokenizer(source: Any) -> Any:
    if source is None:
        raise ValueError(
            "lengths are counted in tokens: give pretrained=NAME in --model_args, or a tokenizer in --metadata"
        )
    if not isinstance(source, str):
        from transformers import AutoTokenizer, PreTrainedModel

        return AutoTokenizer.from_pretrained(source.name_or_path) if isinstance(source, PreTrainedModel) else source
    return _named_tokenizer(source)


@cache
def _named_tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    from ...training.assets import resolve_model

    return AutoTokenizer.from_pretrained(resolve_model(name))


def _texts(source: str | Sequence[str]) -> list[str]:
    from ...training.assets import pydoc_topics, resolve_texts

    if not isinstance(source, str):
        return list(source)
    if source == PYDOC and not Path(source).exists():
        return [document.text for document in pydoc_topics()]
    return [document.text for document in resolve_texts(source, "eval")]
