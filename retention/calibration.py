"""The result of `tenure calibrate` for a set of gates: the file `calibration.json` next to them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch

from tenure.checked import KeptBudget, Range, read, read_fields, verify
from tenure.documents import load_json, shown

from .checkpoint import CALIBRATION_FILE, CheckpointError, write_atomic

SCHEMA_VERSION = 1
Method = Literal["ltt", "crc"]


@dataclass(frozen=True)
class TriedBudget:
    """One row of a calibration's table.

    Attributes:
        budget: share or number of entries kept, as in `Calibration`.
        mean_loss: mean of the cases' losses.
        statistic: "ltt": the p-value of "the expected loss exceeds the bound"; "crc": (n · mean + max_loss)/(n + 1) of
            the losses made monotone.
        accepted: whether the method vouches for this budget.
    """

    budget: KeptBudget
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
        policy, scope, floor, sinks, recent: the eviction; options of the policy follow its name in parentheses.
        model, dtype: the model it was measured with.
        tasks: names of the tasks that the questions are of.
        lengths: tokens of the shortest and the longest document.
        cases, documents: numbers of measured cases and of the texts that their documents were taken from.
        data: the source of the texts.
        seed: chose the cases.
        weights: `weights_digest` of the gates it belongs to.
        table: every budget that was tried, the largest first.

    Raises:
        ValueError: a value of the wrong kind or out of its range.
    """

    budget: KeptBudget
    loss: str
    bound: Annotated[float, Range(0, above=True)]
    max_loss: Annotated[float, Range(0, above=True)]
    confidence: Annotated[float, Range(0, 1, above=True, below=True)] | None
    method: Method
    policy: str
    scope: str
    floor: Annotated[float, Range(0, 1)]
    sinks: Annotated[int, Range(0)]
    recent: Annotated[int, Range(0)]
    model: str
    dtype: str
    tasks: tuple[str, ...]
    lengths: tuple[Annotated[int, Range(1)], Annotated[int, Range(1)]]
    cases: Annotated[int, Range(1)]
    documents: Annotated[int, Range(1)]
    data: str
    seed: int
    weights: str
    table: tuple[TriedBudget, ...]

    def __post_init__(self) -> None:
        verify(self)
        if not self.bound < self.max_loss:
            raise ValueError(f"got {self.bound} as bound; accepted: a number below max_loss, {self.max_loss}")
        if (self.confidence is None) != (self.method == "crc"):
            raise ValueError(
                f"got {shown(self.confidence)} as confidence of method {self.method!r}; accepted: a number with ltt, "
                "nothing with crc"
            )
        if self.budget not in [row.budget for row in self.table if row.accepted]:
            raise ValueError(f"got {self.budget} as budget; accepted: one that the table has as accepted")

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
        """Plain values by name and the schema's version, for JSON."""
        return {"schema_version": SCHEMA_VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Calibration:
        """The calibration of what `to_dict` gave.

        Raises:
            ValueError: a newer schema; unknown or missing fields (all are named), or a value that is refused.
        """
        version = read_fields(_Schema, values, unknown=set())["schema_version"]
        if version > SCHEMA_VERSION:
            raise ValueError(f"schema version {version}; this version of tenure reads up to {SCHEMA_VERSION}")
        return read(cls, {name: value for name, value in values.items() if name != "schema_version"})


@dataclass(frozen=True)
class _Schema:
    schema_version: Annotated[int, Range(1)]


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
        calibration = Calibration.from_dict(load_json(path))
    except ValueError as error:
        raise CheckpointError(
            f"{path} cannot be used: {error}; remove the file, then `tenure calibrate` makes a new one"
        ) from None
    if calibration.weights != weights_digest(state):
        raise CheckpointError(
            f"{path} was measured on other gates than those next to it; remove the file, then `tenure calibrate` makes "
            "a new one"
        )
    return calibration
