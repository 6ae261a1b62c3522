"""The generated tasks in lm-eval: their names and files, their documents, and the score of an answer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from tenure.checked import Range, verify

from ..cases import answer_score
from ..tasks.builder import GENERATED, CaseBuilder, get_task
from .registration import tasks_folder

FIELDS = ("context", "question", "aware", "outputs", "match")
PYDOC = "pydoc"


@dataclass(frozen=True)
class GeneratedCases:
    """The cases of a generated task, as `--metadata` and `--model_args` name them.

    Attributes:
        length: tokens of every context, without special tokens and the chat template's.
        cases: number of cases.
        seed: another seed gives other cases.
        texts: `demo` (held-out essays), `pydoc` (Python's own help), a text file, a folder, or the texts themselves.
        tokenizer: a tokenizer or its name; None for that of the model, `pretrained`.
        turns: of a generated conversation (`tenure_turns_*`).
        file: a released file of SCBench or LongMemEval, for the tasks that read one.

    Raises:
        ValueError: a value of another type, or a number below 1.
    """

    length: Annotated[int, Range(1)] = 4096
    cases: Annotated[int, Range(1)] = 100
    seed: int = 0
    texts: str | Sequence[str] = "demo"
    tokenizer: Any = None
    turns: Annotated[int, Range(1)] = 5
    file: str | None = None

    def __post_init__(self) -> None:
        verify(self)

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> GeneratedCases:
        """The settings among the arguments of lm-eval's flags, of which the others do not matter here."""
        named: dict[str, Any] = {one.name: given[one.name] for one in fields(cls) if one.name in given}
        named["tokenizer"] = named.get("tokenizer") or given.get("pretrained")
        return cls(**named)

    def builder(self) -> CaseBuilder:
        """Makes the cases.

        Raises:
            ValueError: no tokenizer, or texts that are not there.
        """
        return CaseBuilder(source_tokenizer(self.tokenizer), source_texts(self.texts), self.length, self.seed)


def build(kind: str, aware: bool, **given: Any) -> dict[str, Any]:
    """`{"test": Dataset}`, a task's `custom_dataset`; arguments come from its YAML, `--metadata` and `--model_args`.

    Args:
        kind: the generated task.
        aware: the value of the documents' field `aware`: whether the question may be read before the compression.
        given: `pretrained` and the fields of `GeneratedCases`; others do not matter here.

    Raises:
        ValueError: an unknown kind, no tokenizer, a number below 1, texts that are not there, or a length that cannot
            hold a case.
    """
    from datasets import Dataset

    get_task(kind, GENERATED)
    settings = GeneratedCases.of(given)
    builder = settings.builder()
    return {"test": Dataset.from_list([document(builder, kind, index, aware) for index in range(settings.cases)])}


def check_kinds(kinds: Iterable[str], **given: Any) -> None:
    """Raises ValueError for what `build` would refuse, by making the first case of each of these kinds."""
    builder = GeneratedCases.of(given).builder()
    for kind in kinds:
        builder.text(kind, 0)


def document(builder: CaseBuilder, kind: str, index: int, aware: bool) -> dict[str, Any]:
    """One case as lm-eval's document.

    `context`, `question` and `reply` make the prompt; `outputs` and `match` define the right answers; other
    fields are for readers.
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


def source_tokenizer(source: Any) -> Any:
    """The tokenizer that `GeneratedCases.tokenizer` names; ValueError without one."""
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


def source_texts(source: str | Sequence[str]) -> list[str]:
    """The texts that `GeneratedCases.texts` names; ValueError if they are not there."""
    from ...training.assets import pydoc_topics, resolve_texts

    if not isinstance(source, str):
        return list(source)
    if source == PYDOC and not Path(source).exists():
        return [document.text for document in pydoc_topics()]
    return [document.text for document in resolve_texts(source, "eval")]


PREFIX, AWARE, TURNS = "tenure_", "_aware", "turns"


def task_files(name: str) -> list[str]:
    """The YAML files of a generated task, or of all tasks of a group.

    Raises:
        ValueError: there is no such task.
    """
    path = tasks_folder() / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(one for one in task_names() if not one.endswith(AWARE) and TURNS not in one)
        turns = ", ".join(one for one in task_names() if TURNS in one)
        raise ValueError(f"no task {name!r}; known, each also with {AWARE}: {known}; and {turns}")
    lines = path.read_text(encoding="utf-8").splitlines()
    members = [line[4:] for line in lines if line.startswith(f"  - {PREFIX}")]
    return [str(tasks_folder() / f"{member}.yaml") for member in members] or [str(path)]


def task_names() -> list[str]:
    """Names of the generated tasks and groups in lm-eval, sorted."""
    return sorted(path.stem for path in tasks_folder().glob(f"{PREFIX}*.yaml"))


def kinds_of(tasks: Iterable[str]) -> list[str]:
    """The kinds of documents behind these names of tasks, groups and patterns, each once; other names are left out.

    Raises:
        ValueError: there is no such generated task.
    """
    kinds = {}
    for name in tasks:
        if not name.startswith(PREFIX):
            continue
        matching = [known for known in task_names() if fnmatch(known, name)] if "*" in name else [name]
        for path in (path for one in matching for path in task_files(one)):
            kinds[Path(path).stem.removeprefix(PREFIX).removesuffix(AWARE)] = None
    return list(kinds)
