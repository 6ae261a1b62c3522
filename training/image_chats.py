"""Training examples of conversations with images: JSONL files whose records name local image files.

    {"messages": [{"role": "user", "content": [{"type": "image", "path": "a.png"}, {"type": "text", "text": "…"}]},
                  {"role": "assistant", "content": "…"}]}

An image part without a path takes the next file of the record's `images`. Paths are relative to the JSONL file and stay
in its folder. Everything is read and checked once at the start, and images are read again when their turn comes: pixels
are not kept.
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tenure.documents import plain_line
from tenure.images import LIMITS, ImageError, ImageLimits, open_image

from .chat import is_special
from .data import Example, encoding_errors
from .digests import digest
from .records import RecordError

logger = logging.getLogger(__name__)

_SLOT = "slot<0>slot"


@dataclass(frozen=True)
class ImageChat:
    """A record that was checked.

    Attributes:
        number: of the record in its file, from 1 on.
        turns: messages as the processor's chat template takes them.
        images: files, in the order of the image parts.
        input_ids, loss_mask: of the whole conversation; True at what the assistant says.
        prompt_tokens: tokens before the last text of the last user's turn, if all images precede it; else 0.
    """

    number: int
    turns: tuple[dict[str, Any], ...]
    images: tuple[Path, ...]
    input_ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]
    prompt_tokens: int


@dataclass
class ImageChatSource:
    """The examples of image conversations, over and over, in another order each epoch.

    `source[i]` depends on the files, `seed` and `i` only: a run resumes by going on counting.

    Attributes:
        chats: checked records.
        processor: the model's.
        prompt_share: share of the examples that are split before their last question, see `Example.prompt_tokens`.
        data: its name in messages.
    """

    chats: Sequence[ImageChat]
    processor: Any
    prompt_share: float = 0.0
    seed: int = 0
    data: str = "data"
    limits: ImageLimits = LIMITS
    _orders: dict[int, list[int]] = field(default_factory=dict, init=False, repr=False)

    def __len__(self) -> int:
        """Examples per epoch."""
        return len(self.chats)

    def __getitem__(self, index: int) -> Example:
        chat = self.chats[self._place(index)]
        split = random.Random(f"prompt:{self.seed}:{index}").random() < self.prompt_share
        try:
            inputs = _encode(self.processor, chat.turns, [open_image(path, self.limits) for path in chat.images])
        except ImageError as error:
            raise ImageError(f"{self.name(index)}: {error}") from None
        further = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
        return Example(
            list(chat.input_ids), list(chat.loss_mask), "images", prompt_tokens=chat.prompt_tokens if split else 0,
            inputs=further,
        )  # fmt: skip

    def name(self, index: int) -> str:
        """The record that an example was made of."""
        return f"{self.data} record {self.chats[self._place(index)].number}"

    def digest(self) -> str:
        """Digest of all tokens, targets and image files' names and sizes."""
        parts = (
            repr((chat.input_ids, chat.loss_mask, [(path.name, path.stat().st_size) for path in chat.images]))
            for chat in self.chats
        )
        return digest(part.encode() for part in parts)

    def held_out(self, count: int) -> tuple[ImageChatSource, list[Example]]:
        """The source without `count` examples, chosen by the seed, and these examples, unsplit.

        Raises:
            ValueError: there are not more examples than that.
        """
        if count >= len(self):
            raise ValueError(f"got held_out {count} of the {len(self)} examples of {self.data}; accepted: fewer")
        rows = list(range(len(self)))
        random.Random(f"held-out:{self.seed}").shuffle(rows)
        chosen, rest = sorted(rows[:count]), sorted(rows[count:])
        options = {"processor": self.processor, "seed": self.seed, "data": self.data, "limits": self.limits}
        held = ImageChatSource([self.chats[row] for row in chosen], **options)
        examples = [held[held._order(0).index(place)] for place in range(len(held))]
        left = [self.chats[row] for row in rest]
        return ImageChatSource(left, prompt_share=self.prompt_share, **options), examples

    def _place(self, index: int) -> int:
        epoch, place = divmod(index, len(self.chats))
        return self._order(epoch)[place]

    def _order(self, epoch: int) -> list[int]:
        if epoch not in self._orders:
            if len(self._orders) > 1:
                del self._orders[min(self._orders)]
            order = list(range(len(self.chats)))
            random.Random(f"{self.seed}:{epoch}").shuffle(order)
            self._orders[epoch] = order
        return self._orders[epoch]


def load_image_chats(
    data: str, processor: Any, *, max_length: int, prompt_share: float = 0.0, seed: int = 0, bad_records: int = 0,
    limits: ImageLimits = LIMITS,
) -> ImageChatSource:  # fmt: skip
    """Reads and checks the conversations of `data`.

    Args:
        data: a `.jsonl` file, or a folder with such files (images beside them or in folders below).
        processor: the model's, with a chat template and a fast tokenizer.
        max_length: tokens of a conversation at most, images included; longer ones are left out with a warning, since an
            image cannot be cut.
        prompt_share: share of the examples whose prompt (all before the last question) is read without gates.
        seed: of the order and the split.
        bad_records: records that may be left out because they or their images cannot be read.
        limits: bounds on images.

    Raises:
        ValueError: nothing there, more bad records than allowed (the first is named), or none that can be used.
    """
    if not getattr(processor, "chat_template", None):
        raise ValueError(f"images need a chat template, which this {type(processor).__name__} has not")
    chats: list[ImageChat] = []
    faults: list[str] = []
    total = long = 0
    for file in _files(data):
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            if not line.strip():
                continue
            total += 1
            try:
                chat = _checked(line, number, file.resolve().parent, processor, limits)
            except (RecordError, ImageError) as error:
                faults.append(f"record {number} of {file.name}: {error}")
                continue
            if len(chat.input_ids) > max_length:
                long += 1
            else:
                chats.append(chat)
    if len(faults) > bad_records:
        raise ValueError(
            f"{data}: {faults[0]}; accepted: up to bad_records of them, got {bad_records} with "
            f"{len(faults)} that cannot be used"
        )
    for fault in faults:
        logger.warning("%s: %s; left out", data, fault)
    if long:
        logger.warning("%s: %d of %d conversations left out: longer than %d tokens", data, long, total, max_length)
    if not chats:
        raise ValueError(f"none of the {total} conversations of {data} can be used (max_length={max_length})")
    return ImageChatSource(chats, processor, prompt_share, seed, data, limits)


def _files(data: str) -> list[Path]:
    path = Path(data).expanduser()
    if path.is_dir():
        files = sorted(path.glob("*.jsonl"))
        if not files:
            raise ValueError(f"the folder {data} holds no .jsonl file; accepted: conversations as JSONL, with images")
        return files
    if not path.is_file():
        raise ValueError(f"there is no file or folder {data}; accepted: conversations with images as JSONL")
    if path.suffix != ".jsonl":
        raise ValueError(f"{data} has the suffix {path.suffix!r}; accepted: .jsonl for conversations with images")
    return [path]


def _checked(line: str, number: int, folder: Path, processor: Any, limits: ImageLimits) -> ImageChat:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"it is not JSON: {plain_line(error)}") from None
    if not isinstance(record, dict) or not isinstance(record.get("messages"), list) or not record["messages"]:
        raise RecordError("it has no messages (a list of objects with role and content)")
    names = _names(record.get("images", []))
    turns, files = [], []
    for message in record["messages"]:
        turn, found = _turn(message, names)
        turns.append(turn)
        files += [_inside(folder, name) for name in found]
    if next(names, None) is not None:
        raise RecordError(f"it has images for which there is no image part: {len(files)} parts")
    images = [open_image(file, limits) for file in files]
    ids, mask = _targets(processor, turns, images)
    if not any(mask[1:]):
        raise RecordError("nothing in it is said by the assistant")
    start = _question_start(processor, turns, images)
    return ImageChat(number, tuple(turns), tuple(files), tuple(ids), (False, *mask[1:]), start)


def _names(images: Any) -> Iterator[str]:
    if not isinstance(images, list) or not all(isinstance(name, str) for name in images):
        raise RecordError("its images are not a list of file names")
    return iter(images)


def _turn(message: Any, names: Iterator[str]) -> tuple[dict[str, Any], list[str]]:
    """A message with content as a list of parts, and the names of its images."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise RecordError(f"a message is {json.dumps(message)[:60]}; accepted: an object with role and content")
    content = message.get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list):
        raise RecordError(f"a message has a {type(content).__name__} as content; accepted: text or a list of parts")
    made, files = [], []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            made.append({"type": "text", "text": part["text"]})
        elif kind == "image":
            given = part.get("path", part.get("image"))
            name = next(names, None) if given is None else given
            if not isinstance(name, str):
                raise RecordError("an image part has no file; accepted: a path, or another of the record's images")
            made.append({"type": "image"})
            files.append(name)
        else:
            raise RecordError(f"a message has a part {json.dumps(part)[:60]}; accepted: type text or image")
    return {"role": message["role"], "content": made}, files


def _inside(folder: Path, name: str) -> Path:
    """The file of a relative path that stays in `folder`, links followed."""
    try:
        path = (folder / name).resolve()
    except (OSError, ValueError, RuntimeError):
        raise RecordError(f"the image {name[:80]!r} is no file name") from None
    if "://" in name or not path.is_relative_to(folder):
        raise RecordError(f"the image {name[:80]!r} is not in the data's folder; accepted: relative paths in it")
    return path


def _render(processor: Any, turns: Sequence[Mapping[str, Any]], prompt: bool = False) -> str:
    try:
        return str(processor.apply_chat_template([dict(turn) for turn in turns], add_generation_prompt=prompt))
    except encoding_errors() as error:
        raise RecordError(f"the chat template refuses it: {plain_line(error)}") from None


def _encode(processor: Any, turns: Sequence[Mapping[str, Any]], images: Sequence[Any]) -> dict[str, Any]:
    return _process(processor, _render(processor, turns), images)


def _process(processor: Any, text: str, images: Sequence[Any]) -> dict[str, Any]:
    given: dict[str, Any] = {"images": [list(images)]} if images else {}
    try:
        return dict(processor(text=[text], **given, add_special_tokens=False, return_tensors="pt"))
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
        # A text that spells the placeholder or cannot be encoded, an image that is too thin for the processor.
        raise RecordError(f"the processor refuses it: {plain_line(error)}") from None


def _prefix(processor: Any, text: str, images: Sequence[Any], whole: list[int]) -> int:
    """Number of tokens of `text`, which the rendered conversation begins with.

    Raises:
        RecordError: its tokens are not those that the whole begins with.
    """
    token = str(getattr(processor, "image_token", "<image>"))
    ids = _process(processor, text, images[: text.count(token)])["input_ids"][0].tolist()
    if whole[: len(ids)] != ids:
        raise RecordError("the chat template joins turns so that their tokens cannot be told apart")
    return len(ids)


def _targets(
    processor: Any, turns: Sequence[Mapping[str, Any]], images: Sequence[Any]
) -> tuple[list[int], list[bool]]:  # fmt: skip
    """Token ids of a conversation, and a mask of those that the assistant says, the token that ends a turn included."""
    ids = _encode(processor, turns, images)["input_ids"][0].tolist()
    mask, text = [False] * len(ids), _render(processor, turns)
    for number, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        if number == 0:  # processors render no empty list of turns
            raise RecordError("it begins with the assistant; accepted: a turn of another role before it")
        before, after = _render(processor, turns[:number], prompt=True), _render(processor, turns[: number + 1])
        if not (text.startswith(after) and after.startswith(before)):
            raise RecordError("the chat template renders earlier turns differently once others follow")
        start, stop = (_prefix(processor, part, images, ids) for part in (before, after))
        ends = [place for place in range(start, stop) if is_special(processor.tokenizer, ids[place])]
        for place in range(start, ends[-1] + 1 if ends else stop):
            mask[place] = True
    return ids, mask


def _question_start(processor: Any, turns: Sequence[Mapping[str, Any]], images: Sequence[Any]) -> int:
    """Tokens before the last text of the last user's turn, where all images are; 0 if they are not, or it has none."""
    users = [number for number, turn in enumerate(turns) if turn["role"] == "user"]
    if not users:
        return 0
    content = list(turns[users[-1]]["content"])
    if len(content) < 2 or content[-1]["type"] != "text":
        return 0
    marked = [*turns[: users[-1]], {"role": "user", "content": [*content[:-1], {"type": "text", "text": _SLOT}]}]
    before, found, _ = _render(processor, marked).partition(_SLOT)
    token = str(getattr(processor, "image_token", "<image>"))
    if not found or before.count(token) != len(images):
        return 0
    ids = _encode(processor, turns, images)["input_ids"][0].tolist()
    return _prefix(processor, before, images, ids)
