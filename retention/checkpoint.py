"""Gates on disk: a folder with `tenure_config.json`, `gates.safetensors` and, once calibrated, `calibration.json`."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from transformers import PreTrainedModel

from tenure.checked import read, read_fields, verify
from tenure.documents import DocumentLimits, file_bytes, load_json, parse_json, plain_line

from .gate_config import RetentionConfig

CONFIG_FILE = "tenure_config.json"
WEIGHTS_FILE = "gates.safetensors"
CALIBRATION_FILE = "calibration.json"
SCHEMA_VERSION = 1
MAX_WEIGHT_BYTES = 16 << 30
HEADER_LIMITS = DocumentLimits(depth=4)
MAX_WEIGHT = 1e6  # by magnitude: up to it, log β is finite for all hidden states up to 1e3
FLOATS = (torch.float32, torch.bfloat16, torch.float16)  # dtypes of weights in files
# The gates that come with the library, by name. A wheel has the checkout's examples/ in its top-level package.
SHIPPED_GATES = {"demo": Path(__file__).resolve().parents[1] / "examples" / "smollm2-135m-gates"}
HUB_PREFIX = "hub:"
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)


@dataclass(frozen=True)
class _Versioned:
    """The field that every schema has."""

    schema_version: int


class CheckpointError(ValueError):
    """A folder that does not hold usable gates; the message names the file and the fault."""


@dataclass(frozen=True)
class CheckpointInfo:
    """The origin of a set of gates.

    Attributes:
        base_model: name of the model they were trained on.
        revision: its revision, "" if unknown.
        base_fingerprint: `fingerprint(model)` of it, "" if unknown; checked when gates meet a model.
        training: the settings they were trained with.
        metrics: their scores, by name.
    """

    base_model: str = ""
    revision: str = ""
    base_fingerprint: str = ""
    training: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        verify(self)

    @classmethod
    def for_model(cls, model: PreTrainedModel, **values: Any) -> CheckpointInfo:
        """Fills name, revision and fingerprint from `model`; `values` replace single fields."""
        found: dict[str, Any] = {
            "base_model": str(getattr(model.config, "_name_or_path", "") or type(model).__name__),
            "revision": str(getattr(model.config, "_commit_hash", None) or ""),
            "base_fingerprint": fingerprint(model),
        }
        return cls(**(found | values))


def fingerprint(model: PreTrainedModel) -> str:
    """16 hex digits that tell base models of the same shape apart: a hash over a few input embeddings in bf16.

    It is the same for a model that is loaded in fp32, in bf16, or from another path.
    """
    embedding = model.get_input_embeddings()
    if hasattr(embedding, "_hf_hook"):  # accelerate, which is installed then, may have offloaded the weight
        from accelerate.utils import align_module_device

        with align_module_device(embedding):
            return _digest_of_rows(embedding.weight)
    return _digest_of_rows(embedding.weight)


def _digest_of_rows(weight: Any) -> str:
    assert isinstance(weight, torch.Tensor)
    rows = torch.linspace(0, weight.shape[0] - 1, 16, dtype=torch.float32, device="cpu").long()
    sample = _rows_of(weight.detach(), rows.to(weight.device)).to("cpu", torch.bfloat16).contiguous()
    return hashlib.sha256(sample.view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def _rows_of(weight: Any, rows: torch.Tensor) -> torch.Tensor:
    """Rows of an embedding, which tensor parallelism may divide: then all processes make this call."""
    if not hasattr(weight, "full_tensor"):
        return weight[rows]
    from torch.distributed.tensor import DTensor, Replicate

    mesh: Any = weight.device_mesh
    everywhere = DTensor.from_local(rows, mesh, [Replicate()] * mesh.ndim, run_check=False)
    found: Any = torch.nn.functional.embedding(everywhere, weight)
    return found.full_tensor()


def save_checkpoint(
    folder: str | os.PathLike, config: RetentionConfig, state: dict[str, torch.Tensor], info: CheckpointInfo,
    dtype: torch.dtype = torch.float32,
) -> None:  # fmt: skip
    """Writes both files, each under a temporary name first; the configuration, renamed last, seals the weights.

    A calibration in the folder is removed: it belongs to the gates that were there before.
    """
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in state.items()}
    weights = save_safetensors(tensors, metadata={"format": "pt"})
    document = {
        "schema_version": SCHEMA_VERSION,
        "gates": config.to_dict(),
        **asdict(info),
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
    }
    write_atomic(path / WEIGHTS_FILE, weights)
    (path / CALIBRATION_FILE).unlink(missing_ok=True)
    write_atomic(path / CONFIG_FILE, (json.dumps(document, indent=2) + "\n").encode())


def write_atomic(path: Path, content: bytes) -> None:
    """Replaces `path` by `content` in one step; a reader sees the old file or the new one, never a part."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def load_checkpoint(path: Path) -> tuple[dict[str, Any], bytes]:
    """The parsed configuration and the raw weights of a folder, see `local_folder`.

    Raises:
        CheckpointError: a file is absent, truncated or altered, or the schema is newer than this version reads.
    """
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (path / name).is_file():
            raise CheckpointError(f"{path} has no {name}; a gates folder holds {CONFIG_FILE} and {WEIGHTS_FILE}")
    try:
        document = load_json(path / CONFIG_FILE)
        version = read_fields(_Versioned, document, unknown=set())["schema_version"]
    except ValueError as error:
        raise CheckpointError(f"{path / CONFIG_FILE} is not a gates configuration: {error}") from None
    if version > SCHEMA_VERSION:
        raise CheckpointError(
            f"{path / CONFIG_FILE} has schema version {version}; this version of tenure reads up to {SCHEMA_VERSION}, "
            "a newer one is needed"
        )
    try:
        weights = file_bytes(path / WEIGHTS_FILE, MAX_WEIGHT_BYTES)
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    if hashlib.sha256(weights).hexdigest() != document.get("weights_sha256"):
        raise CheckpointError(
            f"{path / WEIGHTS_FILE} ({len(weights)} bytes) is not the file {CONFIG_FILE} was saved with; it is "
            "truncated or altered, fetch it again"
        )
    return document, weights


def local_folder(source: str | os.PathLike, revision: str | None = None) -> Path:
    """The folder that gates are read from.

    Args:
        source: a folder; `demo` for the gates that come with the library; or `hub:owner/name`, whose files are fetched.
            A text without this prefix never reaches the Hub: a path that does not exist would name a repository that
            anybody may own.

    Raises:
        CheckpointError: there is no such folder, or the Hub does not give the repository.
    """
    text = str(source)
    if text in SHIPPED_GATES:
        return SHIPPED_GATES[text]
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    repository = text.removeprefix(HUB_PREFIX)
    if repository == text or not _HUB_ID.fullmatch(repository):
        names = ", ".join(SHIPPED_GATES)
        raise CheckpointError(f"no gates at {text!r}; accepted: a folder, {names}, or {HUB_PREFIX}owner/name")
    from huggingface_hub import snapshot_download

    try:
        files = [CONFIG_FILE, WEIGHTS_FILE, CALIBRATION_FILE]
        return Path(snapshot_download(repository, revision=revision, allow_patterns=files))
    except Exception as error:  # the Hub client raises many types, from requests to its own
        raise CheckpointError(f"the Hub did not give the gates {text!r}: {error}") from error


def parse_config(document: dict[str, Any], where: str) -> tuple[RetentionConfig, CheckpointInfo]:
    """Raises CheckpointError when the document lacks a field or holds one of the wrong kind."""
    try:
        config = RetentionConfig.from_dict(document.get("gates", {}))
        info = read(CheckpointInfo, document, unknown=set())
    except ValueError as error:
        raise CheckpointError(f"{where}: {CONFIG_FILE} cannot be used: {error}") from None
    return config, info


def check_layers(weights: bytes, layer_indices: Sequence[int], where: str) -> None:
    """Raises CheckpointError unless the file has weights for exactly these layers; nothing of their size is made."""
    names = _header_names(weights, where)
    stored = {name.split(".")[1] for name in names if name.startswith("bodies.") and name.count(".") > 1}
    wanted = set(map(str, layer_indices))
    if stored != wanted:
        raise CheckpointError(
            f"{where}: {WEIGHTS_FILE} does not hold these gates: it lacks those of {_some(wanted - stored)}, and has "
            f"those of {_some(stored - wanted)}, which {CONFIG_FILE} does not name"
        )


def _some(layers: Iterable[str]) -> str:
    names = sorted(layers, key=lambda name: (len(name), name))
    if not names:
        return "no other layer"
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return f"the layers {', '.join(plain_line(name, 20) for name in names[:10])}{more}"


def _header_names(weights: bytes, where: str) -> list[str]:
    """The names of the tensors in a safetensors file."""
    try:
        size = int.from_bytes(weights[:8], "little")
        return list(parse_json(weights[8 : 8 + size], "its header", HEADER_LIMITS))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{where}: {WEIGHTS_FILE} is not a safetensors file: {error}") from None


def parse_weights(weights: bytes, expected: Mapping[str, torch.Tensor], where: str) -> dict[str, torch.Tensor]:
    """The tensors of a file in fp32.

    Args:
        expected: tensors of the same names and shapes; their values do not matter.

    Raises:
        CheckpointError: no safetensors file; missing keys, unexpected keys and wrong shapes, which are all named; a
            dtype that is no float; numbers that are not finite or beyond `MAX_WEIGHT`.
    """
    try:
        state = load_safetensors(weights)
    except (SafetensorError, KeyError) as error:  # KeyError: a dtype that torch does not have
        raise CheckpointError(f"{where}: {WEIGHTS_FILE} is not a safetensors file: {plain_line(error)}") from None
    missing = sorted(set(expected) - set(state))[:10]
    unexpected = [plain_line(name, 60) for name in sorted(set(state) - set(expected))[:10]]
    shapes = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(expected[name].shape)}"
        for name in sorted(set(state) & set(expected))
        if state[name].shape != expected[name].shape
    ][:10]
    if missing or unexpected or shapes:
        raise CheckpointError(
            f"{where}: {WEIGHTS_FILE} does not hold these gates: missing {missing}, unexpected {unexpected}, "
            f"wrong shapes {shapes}"
        )
    for name, tensor in state.items():
        if tensor.dtype not in FLOATS:
            raise CheckpointError(f"{where}: {name} in {WEIGHTS_FILE} is {tensor.dtype}; accepted: {FLOATS}")
        if not bool((tensor.float().abs() <= MAX_WEIGHT).all()):  # False for NaN, too
            raise CheckpointError(
                f"{where}: {name} in {WEIGHTS_FILE} has numbers that are not finite or beyond {MAX_WEIGHT:g}: the "
                "gates are damaged or their training diverged"
            )
    return {name: tensor.float() for name, tensor in state.items()}
