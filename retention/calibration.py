"""What `tenure calibrate` found for a set of gates: the file `calibration.json` beside them."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from .checkpoint import CALIBRATION_FILE, CheckpointError, write_atomic

SCHEMA_VERSION = 1
Method = Literal["ltt", "crc"]


@dataclass(frozen=True)
class TriedBudget:
    """One row of a calibration's table.

    Attributes:
        budget: what stays, as in `Calibration`.
        mean_loss: mean of the cases' losses.
        statistic: "ltt": the p-value of "the expected loss exceeds the bound"; "crc": (n · mean + max_loss)/(n + 1) of
            the losses made monotone.
        accepted: whether the method vouches for this budget.
    """

    budget: float | int
    mean_loss: float
    statistic: float
    accepted: bool


@dataclass(frozen=True)
class Calibration:
    """A budget with a guarantee: the expected loss of documents like those it was measured on is at most `bound`.

    With method "ltt" (Learn-then-Test, Angelopoulos et al. 2021) this holds with probability at least `confidence` over
    the draw of the calibration cases; with "crc" (conformal risk control, Angelopoulos et al. 2022) on average over it.

    Attributes:
        budget: the smallest accepted one: a share of the tokens seen, or entries per head on average.
        loss: "kl": mean KL to the full cache over question and answer, in nats, clipped at `max_loss`; "answers", or a
            retrieval task alone: 1 where the full cache answers right and the compressed one wrong, else 0.
        bound, max_loss: of the loss.
        confidence: of "ltt"; None for "crc".
        method: "ltt" or "crc".
        policy, scope, floor, sinks, recent: how was evicted; options of the policy stand behind its name.
        model, dtype: the model it was measured with.
        tasks: what the questions were about.
        lengths: tokens of the shortest and the longest document.
        cases, documents: how many were measured, and the texts that their documents were taken from.
        data: where the texts are from.
        seed: chose the cases.
        weights: `weights_digest` of the gates it belongs to.
        table: every budget that was tried, the largest first.

    Raises:
        ValueError: a value of the wrong kind or out of its range.
    """

    budget: float | int
    loss: str
    bound: float
    max_loss: float
    confidence: float | None
    method: Method
    policy: str
    scope: str
    floor: float
    sinks: int
    recent: int
    model: str
    dtype: str
    tasks: tuple[str, ...]
    lengths: tuple[int, int]
    cases: int
    documents: int
    data: str
    seed: int
    weights: str
    table: tuple[TriedBudget, ...]

    def __post_init__(self) -> None:
        wrong = [name for name, right in self._checks().items() if not right]
        if wrong:
            found = ", ".join(f"{name} = {getattr(self, name)!r}" for name in wrong)
            raise ValueError(f"out of range or of the wrong kind: {found}")

    def _checks(self) -> dict[str, bool]:
        texts = ("loss", "policy", "scope", "model", "dtype", "data", "weights")
        checks = {name: isinstance(getattr(self, name), str) for name in texts}
        checks |= {name: _whole(getattr(self, name), least) for name, least in _LEAST.items()}
        share = _number(self.confidence) and 0 < self.confidence < 1  # type: ignore[operator]  # it is a number
        return checks | {
            "method": self.method in get_args(Method),
            "budget": _is_budget(self.budget),
            "max_loss": _number(self.max_loss) and self.max_loss > 0,
            "bound": _number(self.bound) and _number(self.max_loss) and 0 < self.bound < self.max_loss,
            "confidence": share if self.method == "ltt" else self.confidence is None,
            "floor": _number(self.floor) and 0 <= self.floor <= 1,
            "tasks": all(isinstance(task, str) for task in self.tasks),
            "lengths": len(self.lengths) == 2 and all(_whole(length, 1) for length in self.lengths),
            "table": self.budget in [row.budget for row in self.table if row.accepted],
        }

    @property
    def promise(self) -> str:
        """The guarantee in words."""
        if self.loss == "kl":
            what = f"mean KL to the full cache (at most {self.max_loss:g} nats a case)"
        else:
            what = f"share of answers lost ({', '.join(self.tasks)})"
        how = "on average" if self.confidence is None else f"with confidence {self.confidence:g}"
        tokens = " to ".join(str(length) for length in dict.fromkeys(self.lengths))
        return f"{what} at most {self.bound:g} {how}, for documents of {tokens} tokens"

    def to_dict(self) -> dict[str, Any]:
        return {"schema_version": SCHEMA_VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Calibration:
        """Raises ValueError naming unknown and absent fields, or those that hold nonsense; a newer schema too."""
        given = dict(values)
        version = given.pop("schema_version", None)
        if not _whole(version, 1):
            raise ValueError(f"schema_version is {version!r}; a positive number is accepted")
        if version > SCHEMA_VERSION:
            raise ValueError(f"schema version {version}; this version of tenure reads up to {SCHEMA_VERSION}")
        known = {field.name for field in fields(cls)}
        unknown, absent = sorted(set(given) - known), sorted(known - set(given))
        if unknown or absent:
            raise ValueError(f"it has unknown fields {unknown} and lacks {absent}")
        for name in ("table", "tasks", "lengths"):
            if not isinstance(given[name], list | tuple):
                raise ValueError(f"{name} is {given[name]!r}; a list is accepted")
        try:
            rows = tuple(TriedBudget(**row) for row in given["table"])
        except TypeError as error:
            raise ValueError(f"a row of its table cannot be used: {error}") from None
        return cls(**given | {"table": rows, "tasks": tuple(given["tasks"]), "lengths": tuple(given["lengths"])})


def weights_digest(state: Mapping[str, torch.Tensor]) -> str:
    """16 hex digits of the gates' weights rounded to bf16: the same for gates saved in fp32 and in bf16."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].detach().to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def save_calibration(folder: Path, calibration: Calibration) -> None:
    """Writes `calibration.json` into `folder`, in one step."""
    text = json.dumps(calibration.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)
    write_atomic(folder / CALIBRATION_FILE, f"{text}\n".encode())


def load_calibration(folder: Path, state: Mapping[str, torch.Tensor]) -> Calibration | None:
    """The calibration in a gates folder; None if there is none.

    Args:
        state: the weights of the gates in that folder.

    Raises:
        CheckpointError: the file is broken, of a newer schema, or belongs to other weights.
    """
    path = folder / CALIBRATION_FILE
    if not path.is_file():
        return None
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(document, dict):
            raise ValueError(f"it holds a {type(document).__name__}, not an object")
        calibration = Calibration.from_dict(document)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} cannot be used: {error}; remove the file, then `tenure calibrate` makes a new one"
        ) from None
    if calibration.weights != weights_digest(state):
        raise CheckpointError(
            f"{path} was measured on other gates than those beside it; remove the file, then `tenure calibrate` makes "
            "a new one"
        )
    return calibration


_LEAST = {"sinks": 0, "recent": 0, "cases": 1, "documents": 1, "seed": -math.inf}


def _whole(value: object, least: float) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_budget(value: object) -> bool:
    return _whole(value, 1) or (isinstance(value, float) and 0 < value <= 1)
