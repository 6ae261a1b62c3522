"""Numbers that vary, drawn so that a draw depends on its name alone and not on what was drawn before it."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any

KINDS = ("constant", "uniform", "exponential", "lognormal", "pareto")


@dataclass(frozen=True)
class Spread:
    """A distribution by its mean.

    Attributes:
        kind: `constant`; `uniform` within mean · (1 ± shape); `exponential`; `lognormal` with standard deviation
            `shape` of the logarithm; `pareto` with tail index `shape` above 1 (below 2 its variance is infinite).
    """

    mean: float
    kind: str = "constant"
    shape: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"got kind={self.kind!r:.60} for a distribution; accepted: {', '.join(KINDS)}")
        low = {"uniform": 0 <= self.shape <= 1, "lognormal": self.shape >= 0, "pareto": self.shape > 1}
        if not 0 <= self.mean < math.inf or not low.get(self.kind, True):
            raise ValueError(
                f"got mean={self.mean}, shape={self.shape} for a {self.kind} distribution; accepted: a mean of 0 or "
                "more, and a shape of 0 to 1 (uniform), 0 or more (lognormal), above 1 (pareto)"
            )

    @classmethod
    def read(cls, given: Any) -> Spread:
        """A number is a constant; a mapping has `mean` and may have `kind` and `shape`."""
        if isinstance(given, (int, float)) and not isinstance(given, bool):
            return cls(float(given))
        if isinstance(given, dict) and "mean" in given and given.keys() <= {"mean", "kind", "shape"}:
            return cls(**given)
        raise ValueError(f"got {given!r:.80} for a distribution; accepted: a number, or mean, kind and shape")

    def draw(self, draws: random.Random) -> float:
        if self.kind == "constant":
            return self.mean
        if self.kind == "uniform":
            return self.mean * (1 + self.shape * (2 * draws.random() - 1))
        if self.kind == "exponential":
            return draws.expovariate(1.0) * self.mean
        if self.kind == "lognormal":
            return self.mean * math.exp(draws.gauss(-self.shape * self.shape / 2, self.shape))
        return self.mean * (self.shape - 1) / self.shape * draws.paretovariate(self.shape)


def seeded(*names: object) -> random.Random:
    """A generator that is the same wherever the same names are given."""
    return random.Random("/".join(map(str, names)))
