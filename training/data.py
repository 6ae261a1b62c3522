"""Training examples out of a user's data: Hub data sets, JSONL, parquet, text files and folders."""

import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from .chat import encode_messages

logger = logging.getLogger(__name__)

Format = Literal["auto", "chat", "raw"]
LossOn = Literal["completion", "all"]
_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text", ".md": "text"}


@dataclass
class Example:
    """One training document, or several packed into a row.

    `input_ids`: token ids; `loss_mask`: True at a token that is a target, i.e. to be predicted from those before it
    (never the first); `kind`: where it comes from (`retrieval`, `text`, `chat`, `raw`); `position_ids`:
    None for 0, 1, 2, …, else they restart at 0 with every packed document. `prompt_tokens`: number
    of first tokens that are a prompt, read without gates and compressed at its end; 0 in packed rows.
    """

    input_ids: list[int]
    loss_mask: list[bool]
    kind: str
    position_ids: list[int] | None = None
    prompt_tokens: int = 0


class ExampleSource(Protocol):
    """Examples by number, without end; the same number always gives the same example."""

    def __getitem__(self, index: int) -> Example: ...


@dataclass
class DatasetSource:
    """The examples of a tokenised data set, over and over, in another order each epoch.

    `source[i]` depends on the data, `seed` and `i` only: a run resumes by going on counting.
    """

    dataset: Any
    kind: str
    seed: int = 0
    _orders: dict[int, list[int]] = field(default_factory=dict, init=False, repr=False)
    _lengths: list[int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._lengths = list(self.dataset["length"])

    def __len__(self) -> int:
        """Examples per epoch."""
        return len(self._lengths)

    def __getitem__(self, index: int) -> Example:
        epoch, place = divmod(index, len(self))
        record = self.dataset[self._order(epoch)[place]]
        return Example(record["input_ids"], record["loss_mask"], self.kind)

    def epoch_lengths(self, epoch: int) -> Sequence[int]:
        """Number of tokens of each example of an epoch, in that epoch's order."""
        return [self._lengths[row] for row in self._order(epoch)]

    def _order(self, epoch: int) -> list[int]:
        if epoch not in self._orders:
            if len(self._orders) > 1:
                del self._orders[min(self._orders)]
            order = list(range(len(self)))
            random.Random(f"{self.seed}:{epoch}").shuffle(order)
            self._orders[epoch] = order
        return self._orders[epoch]


def load_examples(
    data: str, tokenizer: Any, *, max_length: int, min_length: int = 2, format: Format = "auto",
    loss_on: LossOn = "completion", split: str = "train", seed: int = 0,
) -> DatasetSource:  # fmt: skip
    """Reads and tokenises `data` (tokenised data is cached on disk by `datasets`).

    Args:
        data: Hub id (`owner/name` or `owner/name:config`), a `.jsonl`, `.json`, `.parquet`, `.txt` or
            `.md` file, or a folder of files of one of these kinds; a text file is one document.
        tokenizer: a transformers tokenizer with offsets (a fast one).
        max_length: documents are cut to this many tokens.
        min_length: shorter documents are left out, as are those without any target.
        format: `chat`: a `messages` column, or `prompt` and `completion` columns, through the tokenizer's chat
            template. `raw`: a `text` column. `auto`: chosen by the columns.
        loss_on: targets are the assistant's tokens, or `all`. Raw text is completion throughout.
        split: split of a Hub data set.
        seed: of the order.

    Raises:
        ValueError: data that does not exist or is empty, a file of an unknown kind, missing columns, no chat template,
            or no document left after `min_length`.
        ImportError: `datasets` is not installed.
    """
    if not 2 <= min_length <= max_length:
        raise ValueError(f"2 <= min_length <= max_length is accepted, got {min_length} and {max_length}")
    dataset = _load(data, split)
    kind = _kind(dataset.column_names, format, data)
    if kind == "chat" and not getattr(tokenizer, "chat_template", None):
        raise ValueError("format='chat' needs a tokenizer with a chat template; this one has none: use format='raw'")
    total = len(dataset)
    if total == 0:
        raise ValueError(f"{data} holds no records")
    encoder = {"tokenizer": tokenizer, "kind": kind, "loss_on": loss_on, "max_length": max_length}
    dataset = dataset.map(
        _encode_record, fn_kwargs=encoder, remove_columns=dataset.column_names, desc=f"Tokenising {data}"
    )
    kept = [row for row, length in enumerate(dataset["length"]) if length >= min_length]
    if not kept:
        raise ValueError(
            f"none of the {total} documents of {data} has {min_length} tokens or more and a token to predict"
            f" (loss_on={loss_on!r}, max_length={max_length})"
        )
    if len(kept) < total:
        logger.warning("%s: %d of %d documents left out: shorter than %d tokens or without a token to predict",
                       data, total - len(kept), total, min_length)  # fmt: skip
        dataset = dataset.select(kept)
    return DatasetSource(dataset, kind, seed)


def _load(data: str, split: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise ImportError("reading data sets needs the datasets library: pip install 'tenure[train]'") from None
    path = Path(data).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith("."))
        builders = {_BUILDERS[file.suffix] for file in files if file.suffix in _BUILDERS}
        if len(builders) != 1:
            found = ", ".join(sorted({file.suffix or file.name for file in files})) or "nothing"
            raise ValueError(f"the folder {data} holds {found}; files of one kind out of {_accepted()} are accepted")
        files = [file for file in files if file.suffix in _BUILDERS]
    elif path.is_file():
        if path.suffix not in _BUILDERS:
            raise ValueError(f"{data} has the suffix {path.suffix!r}; accepted are {_accepted()}, a folder, a Hub id")
        files = [path]
    elif path.suffix in _BUILDERS or path.is_absolute() or data.startswith("."):
        raise ValueError(f"there is no file or folder {data}")
    else:
        return _load_hub(data, split)
    if all(file.stat().st_size == 0 for file in files):
        raise ValueError(f"{data} holds no records: its files are empty")
    builder = _BUILDERS[files[0].suffix]
    names = [str(file) for file in files]
    if builder == "text":
        return datasets.load_dataset(builder, data_files=names, split="train", sample_by="document")
    return datasets.load_dataset(builder, data_files=names, split="train")


def _load_hub(data: str, split: str) -> Any:
    import datasets

    name, _, config = data.partition(":")
    try:
        return datasets.load_dataset(name, config or None, split=split)
    except (FileNotFoundError, ConnectionError, OSError, ValueError) as error:
        raise ValueError(
            f"cannot load split {split!r} of {data!r} (no such file or folder, nor Hub data set): {error}"
        ) from error


def _accepted() -> str:
    return ", ".join(_BUILDERS)


def _kind(columns: Sequence[str], format: Format, data: str) -> str:
    chat = "messages" in columns or {"prompt", "completion"} <= set(columns)
    if format == "auto":
        if not chat and "text" not in columns:
            raise ValueError(
                f"{data} has the columns {', '.join(columns)}; needed: messages, or prompt and completion, or text"
            )
        return "chat" if chat else "raw"
    if format == "chat" and not chat:
        raise ValueError(
            f"format='chat' needs a column messages, or prompt and completion; {data} has {', '.join(columns)}"
        )
    if format == "raw" and "text" not in columns:
        raise ValueError(f"format='raw' needs a column text; {data} has {', '.join(columns)}")
    if format not in ("chat", "raw"):
        raise ValueError(f"format must be auto, chat or raw, got {format!r}")
    return format


def _encode_record(
    record: dict[str, Any], tokenizer: Any, kind: str, loss_on: LossOn, max_length: int
) -> dict[str, Any]:
    """Token ids and targets of one record; `length` is 0 when nothing in it can be predicted."""
    if kind == "raw":
        input_ids = tokenizer(record["text"] or "")["input_ids"]
        loss_mask = [True] * len(input_ids)
    else:
        input_ids, loss_mask = encode_messages(_messages(record), tokenizer)
        if loss_on == "all":
            loss_mask = [True] * len(input_ids)
    input_ids, loss_mask = input_ids[:max_length], [False, *loss_mask[1:max_length]][: len(input_ids)]
    return {"input_ids": input_ids, "loss_mask": loss_mask, "length": len(input_ids) if any(loss_mask) else 0}


def _messages(record: dict[str, Any]) -> list[dict[str, Any]]:
    if record.get("messages") is not None:
        return record["messages"]
    prompt, completion = record["prompt"], record["completion"]
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    return [*prompt, *completion]
