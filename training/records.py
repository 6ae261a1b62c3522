"""Records of data sets: files of many kinds, folders with splits, saved data sets and the Hub, as plain dicts."""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tenure.documents import plain_line

KINDS = {
    ".jsonl": "lines", ".ndjson": "lines", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".tsv": "csv",
    ".arrow": "arrow", ".txt": "text", ".md": "text",
}  # fmt: skip
COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
# Files of a repository or a saved data set that hold no records.
NO_RECORDS = re.compile(r"(readme|license|licence|citation|notice)(\.\w+)?|dataset_infos?\.json|state\.json", re.I)
SPLIT_NAMES = {
    "train": ("train", "training"), "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}  # fmt: skip
MAX_EXPANSION = 200  # times its size, of a compressed file that holds more than `FREE_EXPANSION` bytes
FREE_EXPANSION = 256 << 20
MAX_JSON_CHARACTERS = 1 << 30  # of a `.json` file, which is read at once; lines are not
LINE = "line"
"""The one column of a data set whose records are lines of JSON."""
ROLES = {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}


class RecordError(ValueError):
    """A record that cannot be trained on; the message says why."""


def load_records(data: str, split: str, stream: bool = False) -> Any:
    """The records of `data` as a `datasets.Dataset`; those of JSON files have the one column `line`.

    Args:
        data: a file, a folder, a glob, a folder saved by `save_to_disk`, or a Hub id (`owner/name`,
            `owner/name:config`).
        split: of a Hub data set, a saved one, or a folder whose files or folders are named after splits.
        stream: a `datasets.IterableDataset` instead, which reads and unpacks a part at a time and copies nothing to the
            disk (nor from the Hub); a `.json` file is read at once.

    Raises:
        ValueError: nothing there, files of different kinds, an absent split, or no records.
        ImportError: `datasets` is not installed.
    """
    try:
        import datasets
    except ImportError:
        raise ImportError("reading data sets needs the datasets library: pip install 'tenure[train]'") from None
    path = Path(data).expanduser()
    if path.is_dir() and any((path / name).is_file() for name in ("dataset_dict.json", "dataset_info.json")):
        saved = _saved(path, split)
        return saved.to_iterable_dataset() if stream else saved
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if _holds_records(file, path))
        files = _of_split(path, [file for file in files if kind_of(file)] or files, split)
    elif path.is_file():
        files = [path]
    elif glob.has_magic(data):
        files = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file())
        if not files:
            raise ValueError(f"no file matches {data}")
    elif kind_of(path) is not None or path.is_absolute() or data.startswith("."):
        raise ValueError(f"there is no file or folder {data}")
    else:
        return _hub(data, split, stream)
    kinds = {kind_of(file) for file in files}
    if None in kinds or len(kinds) != 1:
        found = ", ".join(sorted({"".join(file.suffixes[-2:]) or file.name for file in files})) or "nothing"
        raise ValueError(f"{data} holds {found}; accepted: files of one kind out of {_accepted()}, a folder, a Hub id")
    if all(file.stat().st_size == 0 for file in files):
        raise ValueError(f"{data} holds no records: its files are empty")
    for file in () if stream else files:  # a stream is unpacked a part at a time
        _refuse_bomb(file)
    (kind,) = kinds
    names = [str(file) for file in files]
    if kind == "json":
        rows = [line for file in files for line in _json_lines(file)]
        whole = datasets.Dataset.from_dict({LINE: rows})
        return whole.to_iterable_dataset() if stream else whole
    given: dict[str, Any] = {"data_files": names, "split": "train", "streaming": stream}
    if kind == "lines":
        return _parsed(data, "text", given).rename_column("text", LINE)
    if kind == "text":
        return _parsed(data, "text", given, sample_by="document")
    options: dict[str, Any] = {"sep": "\t"} if files[0].name.partition(".")[2].startswith("tsv") else {}
    return _parsed(data, str(kind), given, **options)


def _refuse_bomb(file: Path) -> None:
    """Raises ValueError for a compressed file that holds far more than data of its size does."""
    import fsspec

    if file.suffix.lower() not in COMPRESSED:
        return
    limit, held = max(FREE_EXPANSION, MAX_EXPANSION * file.stat().st_size), 0
    try:
        source: Any = fsspec.open(str(file), "rb", compression="infer")
        with source as opened:
            while part := opened.read(1 << 20):
                held += len(part)
                if held > limit:
                    break
    except Exception:  # what is damaged is refused by its reader
        return
    if held > limit:
        raise ValueError(
            f"{file} holds more than {limit >> 20:,} MiB in {file.stat().st_size:,} bytes; accepted: up to "
            f"{FREE_EXPANSION >> 20} MiB or {MAX_EXPANSION} times the size of a compressed file"
        )


def _parsed(data: str, kind: str, given: dict[str, Any], **options: Any) -> Any:
    """The rows of files of one kind: parsed once and then kept in the cache of `datasets`, or as a stream."""
    import datasets

    try:
        return datasets.load_dataset(kind, **given, **options)
    except Exception as error:  # of any type; Arrow may ask for terabytes, too
        raise ValueError(f"{data} cannot be read as {kind}: {plain_line(error.__cause__ or error)}") from None


def kind_of(path: Path) -> str | None:
    """The kind of a file by its suffixes, compressed or not; None for an unknown one."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    while suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return KINDS.get(suffixes[-1]) if suffixes else None


def _accepted() -> str:
    return f"{', '.join(KINDS)} (also with {', '.join(COMPRESSED)})"


def _holds_records(file: Path, folder: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    return file.is_file() and not hidden and not NO_RECORDS.fullmatch(file.name)


def _of_split(folder: Path, files: list[Path], split: str) -> list[Path]:
    """The files named after a split, or in a folder that is; all of them where none is named after any."""

    def named(file: Path) -> str | None:
        for part in reversed(file.relative_to(folder).parts):
            words = set(re.split(r"[^a-z]+", part.lower()))
            for name, spellings in SPLIT_NAMES.items():
                if words & set(spellings):
                    return name
            if split.lower() in words:
                return split
        return None

    wanted = next((name for name, spellings in SPLIT_NAMES.items() if split.lower() in spellings), split)
    splits = {file: named(file) for file in files}
    found = {name for name in splits.values() if name is not None}
    if not found and wanted == "train":
        return files
    chosen = [file for file, name in splits.items() if name == wanted]
    if not chosen:
        holds = f"the splits {', '.join(sorted(found))}" if found else "no files named after splits"
        raise ValueError(f"{folder} holds {holds}; got split {split!r}")
    return chosen


def _saved(path: Path, split: str) -> Any:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
        if isinstance(loaded, datasets.DatasetDict):
            if split not in loaded:
                raise ValueError(f"it holds the splits {', '.join(sorted(map(str, loaded)))}; got split {split!r}")
            loaded = loaded[split]
        loaded.data.validate(full=True)  # the file is mapped, and wrong offsets would be followed
    except Exception as error:  # of any type
        raise ValueError(f"the saved data set {path} cannot be used: {plain_line(error)}") from None
    return loaded


def _hub(data: str, split: str, stream: bool) -> Any:
    import datasets

    name, _, config = data.partition(":")
    try:
        return datasets.load_dataset(name, config or None, split=split, streaming=stream)
    except (FileNotFoundError, ConnectionError, OSError, ValueError) as error:
        raise ValueError(
            f"cannot load split {split!r} of {data!r} (no such file or folder, nor Hub data set): {plain_line(error)}"
        ) from error


def _json_lines(path: Path) -> list[str]:
    """The records of a `.json` file, a list or one record a line, each as JSON on a line."""
    import fsspec

    opened: Any = fsspec.open(str(path), "rt", encoding="utf-8", compression="infer")
    with opened as file:
        parts: list[str] = []
        left = MAX_JSON_CHARACTERS
        while left >= 0 and (part := file.read(1 << 20)):
            parts.append(part)
            left -= len(part)
    text = "".join(parts)
    if left < 0:
        raise ValueError(f"{path} has more than {MAX_JSON_CHARACTERS} characters; accepted: JSONL, a record a line")
    if not text.lstrip().startswith("["):
        return text.splitlines()
    try:
        return [json.dumps(record) for record in json.loads(text)]
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {plain_line(error)}") from None


def parse_columns(columns: Sequence[str]) -> dict[str, str]:
    """`ours=theirs` pairs as a mapping of their columns to ours.

    Raises:
        ValueError: an entry of another form.
    """
    pairs = [entry.partition("=") for entry in columns]
    for entry, (ours, _, theirs) in zip(columns, pairs, strict=True):
        if not ours or not theirs:
            raise ValueError(f"got {entry!r} as a column; accepted: NAME=COLUMN, such as messages=dialog")
    return {theirs: ours for ours, _, theirs in pairs}


def plain_record(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """A row as a record under our names: a parsed line, columns renamed, ShareGPT's conversations as messages.

    Raises:
        RecordError: a line that is not a JSON object.
    """
    record: Any = row
    if set(row) == {LINE}:
        try:
            record = json.loads(row[LINE])
        except (ValueError, TypeError, RecursionError) as error:
            raise RecordError(f"it is not JSON: {plain_line(error)}") from None
        if not isinstance(record, dict):
            raise RecordError(f"it is a {type(record).__name__}, not a JSON object")
    else:  # Arrow gives every struct the fields of all, with nulls for the absent ones
        record = {name: _without_nulls(value) for name, value in row.items()}
    record = {columns.get(name, name): value for name, value in record.items()}
    turns = record.get("conversations")
    if "messages" not in record and isinstance(turns, list):
        record["messages"] = [_from_sharegpt(turn) for turn in turns]
    return record


def _from_sharegpt(turn: Any) -> Any:
    if not isinstance(turn, dict) or "from" not in turn:
        return turn
    role = turn["from"]
    role = ROLES.get(role, role) if isinstance(role, str) else role
    return {"role": role, "content": turn.get("value")}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(one) for name, one in value.items() if one is not None}
    return [_without_nulls(one) for one in value] if isinstance(value, list) else value


def known_columns(rows: Sequence[Mapping[str, Any]], names: Sequence[str], columns: Mapping[str, str]) -> set[str]:
    """Our names of the columns of a data set; for lines of JSON those of the first record that can be read.

    Args:
        rows: the first ones. names: of all columns.
    """
    if list(names) == [LINE]:
        for row in rows:
            try:
                return set(plain_record(row, columns))
            except RecordError:
                continue
        return set()
    found = {columns.get(name, name) for name in names}
    return found | {"messages"} if "conversations" in found else found
