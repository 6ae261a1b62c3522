"""Training examples of data sets larger than the disk: read from start to end, a block at a time, and never copied."""

from __future__ import annotations

import logging
import random
import threading
from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from tenure.documents import plain_line

from .batching import concatenate, first_fit
from .data import PEEKED, Example, Format, LossOn, Overlong, encode_records, record_kind
from .digests import digest
from .records import known_columns, load_records, parse_columns

logger = logging.getLogger(__name__)

BATCH = 64  # records that are tokenised at a time
HELD_BLOCKS = 2  # a batch may begin in one block and end in the next


@dataclass(frozen=True)
class _Document:
    """A tokenised record, or a window of one: `record` is its number from 1 on."""

    input_ids: array[int]
    loss_mask: bytes
    record: int

    def example(self, kind: str) -> Example:
        return Example(list(self.input_ids), [bool(bit) for bit in self.loss_mask], kind)


@dataclass(frozen=True)
class _Block:
    """The rows of a part of the stream, from the number `start` on; each row is one or several documents."""

    start: int
    rows: list[list[_Document]]

    @property
    def stop(self) -> int:
        return self.start + len(self.rows)


@dataclass
class StreamedSource:
    """The examples of a data set in its order, over and over, shuffled within blocks.

    `source[i]` depends on the data, the settings and `i` only. A later example is found by reading on to it, one before
    the last two blocks by reading from the start again; so every process of a run reads and tokenises everything, and a
    resumed run reads up to its place first. At most three blocks of `buffer` examples are in memory, and nothing is on
    the disk but the data.

    Attributes:
        records: a `datasets.IterableDataset`.
        encoder: arguments of `encode_records`.
        buffer: examples of a block.
        row_length: tokens of rows that documents are packed into; None for a document a row.
        held_out_documents: first ones of every epoch, which are left out.
    """

    records: Any
    encoder: dict[str, Any]
    data: str
    min_length: int = 2
    buffer: int = 1024
    seed: int = 0
    row_length: int | None = None
    bad_records: int = 0
    held_out_documents: int = 0
    _blocks: deque[_Block] = field(init=False, repr=False)
    _read: int = field(init=False, repr=False)  # blocks
    _documents: Iterator[_Document] = field(init=False, repr=False)  # of the current epoch
    _found: int = field(init=False, repr=False)  # of these
    _counted: bool = field(default=False, init=False, repr=False)
    _faults: dict[int, str] = field(default_factory=dict, init=False, repr=False)
    _lock: Any = field(default_factory=threading.Lock, init=False, repr=False)

    def __post_init__(self) -> None:
        self._restart()

    def __getitem__(self, index: int) -> Example:
        documents = self._row(index)
        examples = [one.example(self.encoder["kind"]) for one in documents]
        return examples[0] if self.row_length is None else concatenate(examples)

    def name(self, index: int) -> str:
        """The records that an example was made of, by their numbers in the data from 1 on."""
        return ", ".join(f"{self.data} record {one.record}" for one in self._row(index))

    def digest(self) -> str:
        """Digest of the first block's tokens and targets: data that changed after it is not seen."""
        self._row(0)
        documents = [one for row in self._blocks[0].rows for one in row]
        parts = (part for one in documents for part in (one.input_ids.tobytes(), one.loss_mask))
        return digest([self.encoder["kind"].encode(), *parts])

    def _row(self, index: int) -> list[_Document]:
        with self._lock:  # the next batch is made in a thread
            if self._blocks and index < self._blocks[0].start:
                self._restart()
            while not self._blocks or index >= self._blocks[-1].stop:
                self._read_block()
            block = next(one for one in self._blocks if one.start <= index < one.stop)
            return block.rows[index - block.start]

    def _restart(self) -> None:
        self._blocks, self._read = deque(maxlen=HELD_BLOCKS), 0
        self._documents, self._found = islice(self._epoch(), self.held_out_documents, None), 0

    def _read_block(self) -> None:
        documents = self._next_documents()
        random.Random(f"{self.seed}:{self._read}").shuffle(documents)
        rows = [[one] for one in documents]
        if self.row_length is not None:
            places = first_fit([len(one.input_ids) for one in documents], self.row_length)
            rows = [[documents[place] for place in row] for row in places]
        self._blocks.append(_Block(self._blocks[-1].stop if self._blocks else 0, rows))
        self._read += 1

    def _next_documents(self) -> list[_Document]:
        """Those of a block; the last one of an epoch may have fewer.

        Raises:
            ValueError: an epoch without any.
        """
        while True:
            documents = list(islice(self._documents, self.buffer))
            self._found += len(documents)
            if documents:
                return documents
            if not self._found:
                rest = " besides those held out" if self.held_out_documents else ""
                raise ValueError(
                    f"{self.data} has no document of {self.min_length} tokens or more with a token to predict{rest}"
                )
            self._documents, self._found = islice(self._epoch(), self.held_out_documents, None), 0

    def _epoch(self) -> Iterator[_Document]:
        """The documents of the data once; the first time, a warning counts those that are left out or cut.

        Raises:
            ValueError: more faulty records than `bad_records`; a file that is damaged, or cannot be read any more.
        """
        number = short = lost = cut = 0
        rows = iter(self.records)
        while batch := _take(rows, BATCH, self.data, number):
            columns = {name: [row.get(name) for row in batch] for name in batch[0]}
            found = encode_records(columns, [*range(number, number + len(batch))], **self.encoder)
            number += len(batch)
            for ids, mask, length, record, gone, fault in zip(*found.values(), strict=True):
                if fault:
                    self._fault(record, fault)
                elif length < self.min_length:
                    short += 1
                else:
                    yield _Document(array("i", ids), bytes(mask), record)
                lost, cut = lost + gone, cut + bool(gone)
        if (short or cut) and not self._counted:
            self._counted = True
            logger.warning(
                "%s: %d documents of %d records were shorter than %d tokens or without a token to predict; %d tokens "
                "of %d documents longer than %d were lost",
                self.data, short, number, self.min_length, lost, cut, self.encoder["max_length"],
            )  # fmt: skip

    def _fault(self, record: int, fault: str) -> None:
        if record in self._faults:  # in an epoch before
            return
        self._faults[record] = fault
        if len(self._faults) > self.bad_records:
            raise ValueError(f"{self.data}: record {record}: {fault}; accepted: up to bad_records of them, got "
                             f"{self.bad_records}")  # fmt: skip
        logger.warning("%s record %d left out: %s", self.data, record, fault)

    def held_out(self, count: int) -> tuple[StreamedSource, list[Example]]:
        """The source without its first `count` documents, and these as examples.

        Raises:
            ValueError: there are not as many.
        """
        first = list(islice(self._epoch(), count))
        if len(first) < count:
            raise ValueError(f"got held_out {count} of the {len(first)} examples of {self.data}; accepted: fewer")
        rest = StreamedSource(
            self.records, self.encoder, self.data, self.min_length, self.buffer, self.seed, self.row_length,
            self.bad_records, count,
        )  # fmt: skip
        return rest, [one.example(self.encoder["kind"]) for one in first]


def _take(rows: Iterator[dict[str, Any]], count: int, data: str, number: int = 0) -> list[dict[str, Any]]:
    """The next records after record `number`.

    Raises:
        ValueError: a file that is damaged, or cannot be read any more.
    """
    try:
        return list(islice(rows, count))
    except Exception as error:  # readers and decompressors have types of their own
        raise ValueError(
            f"{data} cannot be read beyond record {number}: {type(error).__name__} {plain_line(error)}"
        ) from error


def stream_examples(
    data: str, tokenizer: Any, *, max_length: int, min_length: int = 2, format: Format = "auto",
    loss_on: LossOn = "completion", split: str = "train", seed: int = 0, overlong: Overlong = "cut",
    columns: Sequence[str] = (), bad_records: int = 0, keep_thoughts: bool = False, buffer: int = 1024,
    pack: bool = False,
) -> StreamedSource:  # fmt: skip
    """The examples of `data`, read as they are needed.

    Args:
        buffer: examples that are read ahead and shuffled.
        pack: documents of a block share rows of `max_length` tokens.
        others: as `load_examples` takes them.

    Raises:
        ValueError: data that does not exist or is empty, missing columns, no chat template; later, when they are read:
            faulty records, or no document.
    """
    names = parse_columns(columns)
    records = load_records(data, split, stream=True)
    first = _take(iter(records), PEEKED, data)
    if not first:
        raise ValueError(f"{data} holds no records")
    kind = record_kind(sorted(known_columns(first, list(first[0]), names)), format, data, tokenizer)
    encoder = {"tokenizer": tokenizer, "kind": kind, "loss_on": loss_on, "max_length": max_length, "names": names,
               "overlong": overlong, "keep_thoughts": keep_thoughts}  # fmt: skip
    return StreamedSource(records, encoder, data, min_length, buffer, seed, max_length if pack else None, bad_records)
