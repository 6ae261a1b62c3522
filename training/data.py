"""Training examples out of a user's data: tokenised records, in another order each epoch, and mixtures of sources."""

import itertools
import json
import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from tenure.documents import plain_line

from .conversations import encode_messages, template_text
from .digests import column_digest, data_digest, digest
from .records import RecordError, known_columns, load_records, parse_columns, plain_record

logger = logging.getLogger(__name__)

Format = Literal["auto", "chat", "raw"]
LossOn = Literal["completion", "all"]
Overlong = Literal["cut", "windows", "drop"]
PEEKED = 100  # records whose columns are looked at
MIXTURE_BLOCK = 1024  # examples after which the shares of a mixture are exact


@dataclass
class Example:
    """One training document, or several packed into a row.

    `input_ids`: token ids; `loss_mask`: True at a token that is a target, i.e. to be predicted from those before it
    (never the first); `kind`: where it comes from (`retrieval`, `text`, `chat`, `raw`); `position_ids`:
    None for 0, 1, 2, …, else they restart at 0 with every packed document. `prompt_tokens`: number
    of first tokens that are a prompt, read without gates and compressed at its end; 0 in packed rows. `inputs`: what
    the model takes of the example's images (`pixel_values` and so on); never packed.
    """

    input_ids: list[int]
    loss_mask: list[bool]
    kind: str
    position_ids: list[int] | None = None
    prompt_tokens: int = 0
    inputs: Mapping[str, Any] | None = None


class ExampleSource(Protocol):
    """Examples by number, without end; the same number always gives the same example."""

    def __getitem__(self, index: int) -> Example: ...


def example_names(source: Any, indices: Sequence[int]) -> str:
    """The names of examples in their data, such as `chat.jsonl record 17`; "" for a source without names."""
    return ", ".join(source.name(index) for index in indices) if hasattr(source, "name") else ""


@dataclass
class DatasetSource:
    """The examples of a tokenised data set, over and over, in another order each epoch.

    `source[i]` depends on the data, `seed` and `i` only: a run resumes by going on counting.
    """

    dataset: Any
    kind: str
    seed: int = 0
    data: str = "data"
    _orders: dict[int, list[int]] = field(default_factory=dict, init=False, repr=False)
    lengths: list[int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.lengths = list(self.dataset["length"])

    def name(self, index: int) -> str:
        """The record that an example was made of, by its number in the data from 1 on."""
        epoch, place = divmod(index, len(self))
        return self.record_name(self._order(epoch)[place])

    def record_name(self, row: int) -> str:
        """The record that a row of the data set was made of."""
        return f"{self.data} record {self.dataset[row]['record']}"

    def digest(self) -> str:
        """Digest of all tokens and targets, in the data's order."""
        flat = self.dataset.flatten_indices() if self.dataset._indices is not None else self.dataset
        columns = (flat.data.column(name) for name in ("input_ids", "loss_mask"))
        return digest([self.kind.encode(), *(column_digest(column).encode() for column in columns)])

    def held_out(self, count: int) -> tuple["DatasetSource", list[Example]]:
        """The source without `count` examples, chosen by the seed, and these examples.

        Raises:
            ValueError: there are not more examples than that.
        """
        if count >= len(self):
            raise ValueError(f"got held_out {count} of the {len(self)} examples of {self.data}; accepted: fewer")
        rows = list(range(len(self)))
        random.Random(f"held-out:{self.seed}").shuffle(rows)
        chosen, rest = sorted(rows[:count]), sorted(rows[count:])
        records = (self.dataset[row] for row in chosen)
        examples = [Example(record["input_ids"], record["loss_mask"], self.kind) for record in records]
        return DatasetSource(self.dataset.select(rest), self.kind, self.seed, self.data), examples

    def __len__(self) -> int:
        """Examples per epoch."""
        return len(self.lengths)

    def __getitem__(self, index: int) -> Example:
        epoch, place = divmod(index, len(self))
        return self.example(self._order(epoch)[place])

    def example(self, row: int) -> Example:
        """The example of a row of the data set."""
        record = self.dataset[row]
        return Example(record["input_ids"], record["loss_mask"], self.kind)

    def epoch_lengths(self, epoch: int) -> Sequence[int]:
        """Number of tokens of each example of an epoch, in that epoch's order."""
        return [self.lengths[row] for row in self._order(epoch)]

    def _order(self, epoch: int) -> list[int]:
        if epoch not in self._orders:
            if len(self._orders) > 1:
                del self._orders[min(self._orders)]
            order = list(range(len(self)))
            random.Random(f"{self.seed}:{epoch}").shuffle(order)
            self._orders[epoch] = order
        return self._orders[epoch]


@dataclass
class ConcatenatedSource:
    """Several data sets as one: every epoch has each of their examples once, in one order over all of them."""

    parts: Sequence[DatasetSource]
    seed: int = 0
    _orders: dict[int, list[tuple[int, int]]] = field(default_factory=dict, init=False, repr=False)

    def __len__(self) -> int:
        """Examples per epoch."""
        return sum(len(part) for part in self.parts)

    def __getitem__(self, index: int) -> Example:
        part, row = self._row(index)
        return self.parts[part].example(row)

    def name(self, index: int) -> str:
        """The record that an example was made of."""
        part, row = self._row(index)
        return self.parts[part].record_name(row)

    def digest(self) -> str:
        return digest(part.digest().encode() for part in self.parts)

    def epoch_lengths(self, epoch: int) -> Sequence[int]:
        """Number of tokens of each example of an epoch, in that epoch's order."""
        return [self.parts[part].lengths[row] for part, row in self._order(epoch)]

    def _row(self, index: int) -> tuple[int, int]:
        epoch, place = divmod(index, len(self))
        return self._order(epoch)[place]

    def _order(self, epoch: int) -> list[tuple[int, int]]:
        if epoch not in self._orders:
            if len(self._orders) > 1:
                del self._orders[min(self._orders)]
            order = [(number, row) for number, part in enumerate(self.parts) for row in range(len(part))]
            random.Random(f"{self.seed}:{epoch}").shuffle(order)
            self._orders[epoch] = order
        return self._orders[epoch]


@dataclass
class MixtureSource:
    """Examples of several sources in given shares, each source in its own order.

    Every block of 1024 examples holds each source's share, to the nearest example, in an order that depends on the
    seed and the block only; so `source[i]` depends on `i` only.

    Attributes:
        sources: by name.
        weights: of the same names, positive.
    """

    sources: Mapping[str, ExampleSource]
    weights: Mapping[str, float]
    seed: int = 0
    _shares: dict[str, int] = field(init=False, repr=False)
    _blocks: dict[int, list[tuple[str, int]]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        total = sum(self.weights.values())
        exact = {name: MIXTURE_BLOCK * weight / total for name, weight in self.weights.items()}
        self._shares = {name: int(share) for name, share in exact.items()}
        rest = sorted(exact, key=lambda name: (self._shares[name] - exact[name], name))
        for name in itertools.islice(rest, MIXTURE_BLOCK - sum(self._shares.values())):
            self._shares[name] += 1

    def __getitem__(self, index: int) -> Example:
        name, place = self._place(index)
        return self.sources[name][place]

    def name(self, index: int) -> str:
        name, place = self._place(index)
        return example_names(self.sources[name], [place]) or name

    def digest(self) -> str:
        parts = [f"{name} {self._shares[name]} {data_digest(self.sources[name])}" for name in sorted(self.sources)]
        return digest(part.encode() for part in parts)

    def _place(self, index: int) -> tuple[str, int]:
        """The source of an example, and its number there."""
        block, place = divmod(index, MIXTURE_BLOCK)
        if block not in self._blocks:
            if len(self._blocks) > 1:
                del self._blocks[min(self._blocks)]
            names = [name for name, share in self._shares.items() for _ in range(share)]
            random.Random(f"mixture:{self.seed}:{block}").shuffle(names)
            numbers = {name: itertools.count(block * share) for name, share in self._shares.items()}
            self._blocks[block] = [(name, next(numbers[name])) for name in names]
        return self._blocks[block][place]


def load_examples(
    data: str, tokenizer: Any, *, max_length: int, min_length: int = 2, format: Format = "auto",
    loss_on: LossOn = "completion", split: str = "train", seed: int = 0, overlong: Overlong = "cut",
    columns: Sequence[str] = (), bad_records: int = 0, workers: int = 1, keep_thoughts: bool = False,
) -> DatasetSource:  # fmt: skip
    """Reads and tokenises `data` (tokenised data is cached on disk by `datasets`).

    Args:
        data: as `load_records` takes it; a text file is one document.
        tokenizer: a transformers tokenizer with offsets (a fast one).
        max_length: tokens of an example at most.
        min_length: shorter documents are left out, as are those without any target.
        format: `chat`: a `messages` column (or ShareGPT's `conversations`), or `prompt` and `completion` columns,
            through the tokenizer's chat template, with the tools of a column `tools`. `raw`: a `text` column. `auto`:
            chosen by the columns.
        loss_on: targets are the assistant's tokens, or `all`. Raw text is completion throughout.
        split: split of a Hub data set, a saved one, or a folder with files named after splits.
        seed: of the order.
        overlong: documents beyond `max_length` are cut, are split into windows of that length, or are left out;
            tokens that are lost are counted in a warning.
        columns: `ours=theirs` names of columns.
        bad_records: records that may be left out, counted and named, because they cannot be read.
        workers: processes that tokenise.
        keep_thoughts: thoughts are kept where the chat template leaves them out, see `encode_messages`.

    Raises:
        ValueError: data that does not exist or is empty, a file of an unknown kind, missing columns, no chat template,
            more bad records than allowed (the first is named), or no document left after `min_length`.
        ImportError: `datasets` is not installed.
    """
    if not 2 <= min_length <= max_length:
        raise ValueError(f"2 <= min_length <= max_length is accepted, got {min_length} and {max_length}")
    names = parse_columns(columns)
    dataset = load_records(data, split)
    total = len(dataset)
    if total == 0:
        raise ValueError(f"{data} holds no records")
    first = [dataset[place] for place in range(min(total, PEEKED))]
    kind = record_kind(sorted(known_columns(first, dataset.column_names, names)), format, data, tokenizer)
    encoder = {"tokenizer": tokenizer, "kind": kind, "loss_on": loss_on, "max_length": max_length, "names": names,
               "overlong": overlong, "keep_thoughts": keep_thoughts}  # fmt: skip
    with _tokenised_once(dataset, data):
        dataset = dataset.map(
            encode_records, fn_kwargs=encoder, remove_columns=dataset.column_names, desc=f"Tokenising {data}",
            batched=True, batch_size=100, with_indices=True, num_proc=workers if 1 < workers <= total else None,
        )  # fmt: skip
    _refuse_faults(dataset, data, bad_records)
    kept = [row for row, length in enumerate(dataset["length"]) if length >= min_length]
    if not kept:
        raise ValueError(
            f"none of the {total} documents of {data} has {min_length} tokens or more and a token to predict"
            f" (loss_on={loss_on!r}, max_length={max_length})"
        )
    _count_losses(dataset, data, overlong, max_length)
    if len(kept) < len(dataset):
        logger.warning("%s: %d of %d documents left out: shorter than %d tokens or without a token to predict",
                       data, len(dataset) - len(kept), len(dataset), min_length)  # fmt: skip
        dataset = dataset.select(kept)
    return DatasetSource(dataset, kind, seed, data)


def _tokenised_once(dataset: Any, data: str) -> Any:
    """A lock of this machine: the first process of a run tokenises, the others find its result in the cache."""
    from datasets import config
    from filelock import FileLock

    folder = config.HF_DATASETS_CACHE
    folder = type(folder)(folder) / "tenure"
    folder.mkdir(parents=True, exist_ok=True)
    return FileLock(str(folder / f"{digest([data.encode(), dataset._fingerprint.encode()])}.lock"))


def _refuse_faults(dataset: Any, data: str, allowed: int) -> None:
    faults = [(row, fault) for row, fault in enumerate(dataset["fault"]) if fault]
    if len(faults) > allowed:
        row, fault = faults[0]
        count = f"{len(faults)} records of {data} cannot be used, the first is" if len(faults) > 1 else f"{data}:"
        raise ValueError(f"{count} record {dataset[row]['record']}: {fault}; accepted: up to bad_records of them, "
                         f"got {allowed}")  # fmt: skip
    for row, fault in faults:
        logger.warning("%s record %d left out: %s", data, dataset[row]["record"], fault)


def _count_losses(dataset: Any, data: str, overlong: Overlong, max_length: int) -> None:
    cut = [count for count in dataset["lost"] if count]
    if cut:
        logger.warning("%s: %d of %d documents are longer than %d tokens and are %s: %d tokens lost (overlong=windows "
                       "keeps those of texts)", data, len(cut), len(dataset), max_length,
                       "left out" if overlong == "drop" else "cut", sum(cut))  # fmt: skip


def record_kind(columns: Sequence[str], format: Format, data: str, tokenizer: Any) -> str:
    """How records are read: `chat` or `raw`.

    Raises:
        ValueError: columns that do not fit the format, or a chat without a chat template.
    """
    kind = _kind(columns, format, data)
    if kind == "chat" and not getattr(tokenizer, "chat_template", None):
        raise ValueError("format='chat' needs a tokenizer with a chat template; this one has none: use format='raw'")
    if kind == "chat" and "tools" in columns and "tools" not in template_text(tokenizer):
        logger.warning("%s has a column tools, which the chat template does not show (see chat_template)", data)
    return kind


def _kind(columns: Sequence[str], format: Format, data: str) -> str:
    chat = "messages" in columns or {"prompt", "completion"} <= set(columns)
    holds = f"{data} has the columns {plain_line(', '.join(columns))}"
    if format == "auto":
        if not chat and "text" not in columns:
            raise ValueError(f"{holds}; needed: messages, or prompt and completion, or text (see columns)")
        return "chat" if chat else "raw"
    if format == "chat" and not chat:
        raise ValueError(f"format='chat' needs a column messages, or prompt and completion; {holds}")
    if format == "raw" and "text" not in columns:
        raise ValueError(f"format='raw' needs a column text; {holds}")
    if format not in ("chat", "raw"):
        raise ValueError(f"format must be auto, chat or raw, got {format!r}")
    return format


def encode_records(
    batch: dict[str, list[Any]], indices: list[int], tokenizer: Any, kind: str, loss_on: LossOn, max_length: int,
    names: Mapping[str, str], overlong: Overlong, keep_thoughts: bool = False,
) -> dict[str, list[Any]]:  # fmt: skip
    """Token ids and targets of records: one row each, or several windows.

    Besides these a row has `length`, 0 if nothing in it can be predicted; `record`, the number of its record from 1 on;
    `lost`, the tokens of it that are cut; and `fault`, the reason for leaving it out, "" without one.
    """
    out: dict[str, list[Any]] = {name: [] for name in ("input_ids", "loss_mask", "length", "record", "lost", "fault")}

    def add(input_ids: list[int], loss_mask: list[bool], index: int, lost: int = 0, fault: str = "") -> None:
        loss_mask = [False, *loss_mask[1:]][: len(input_ids)]
        row = (input_ids, loss_mask, len(input_ids) if any(loss_mask) else 0, index + 1, lost, fault)
        for name, value in zip(out, row, strict=True):
            out[name].append(value)

    for place, index in enumerate(indices):
        try:
            record = plain_record({name: column[place] for name, column in batch.items()}, names)
            input_ids, loss_mask = _encode(record, tokenizer, kind, loss_on, keep_thoughts)
        except RecordError as error:
            add([], [], index, fault=plain_line(error))
            continue
        except encoding_errors() as error:
            add([], [], index, fault=f"it cannot be encoded: {type(error).__name__} {plain_line(error)}")
            continue
        excess = max(0, len(input_ids) - max_length)
        if excess and overlong == "drop":
            add([], [], index, lost=len(input_ids))
        elif excess and overlong == "windows" and kind == "raw":
            for start in range(0, len(input_ids), max_length):
                add(input_ids[start : start + max_length], loss_mask[start : start + max_length], index)
        else:
            add(input_ids[:max_length], loss_mask[:max_length], index, lost=excess)
    return out


def encoding_errors() -> tuple[type[Exception], ...]:
    """Errors of chat templates and tokenizers that are given values of another type."""
    try:
        from jinja2 import TemplateError
    except ImportError:  # then there are no templates
        return TypeError, AttributeError, LookupError
    return TypeError, AttributeError, LookupError, TemplateError


def _encode(
    record: dict[str, Any], tokenizer: Any, kind: str, loss_on: LossOn, keep_thoughts: bool
) -> tuple[list[int], list[bool]]:
    if kind == "raw":
        text = record.get("text")
        if text is not None and not isinstance(text, str):
            raise RecordError(f"its text is a {type(text).__name__}")
        input_ids = tokenizer(text or "")["input_ids"]
        return input_ids, [True] * len(input_ids)
    input_ids, loss_mask = encode_messages(_messages(record), tokenizer, _tools(record), keep_thoughts=keep_thoughts)
    return input_ids, [True] * len(input_ids) if loss_on == "all" else loss_mask


def _messages(record: dict[str, Any]) -> list[dict[str, Any]]:
    messages = record.get("messages")
    if messages is None and "prompt" in record and "completion" in record:
        prompt, completion = record["prompt"], record["completion"]
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        if isinstance(completion, str):
            completion = [{"role": "assistant", "content": completion}]
        messages = [*prompt, *completion] if isinstance(prompt, list) and isinstance(completion, list) else None
    if not isinstance(messages, list) or not messages:
        raise RecordError("it has no messages (null or empty)")
    return messages


def _tools(record: dict[str, Any]) -> list[Any] | None:
    """The column `tools`: a list, or one as a text of JSON."""
    tools = record.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except json.JSONDecodeError as error:
            raise RecordError(f"its tools are not JSON: {error}") from None
    if tools is not None and not isinstance(tools, list):
        raise RecordError(f"its tools are a {type(tools).__name__}; accepted: a list of definitions")
    return tools or None
