"""The smallest budget whose expected loss is below a bound, with a guarantee for finitely many calibration cases.

Losses lie in [0, max_loss] and the cases are independent draws. Two methods:

* Learn-then-Test (Angelopoulos, Bates, Candès, Jordan & Lei 2021) with fixed-sequence testing: the budgets are tested
  from the largest to the smallest, each with a p-value for "its expected loss exceeds the bound", until one is not
  rejected at level 1 − confidence. With probability at least `confidence` over the calibration cases, the expected loss
  of every accepted budget is within the bound. Losses need not fall as budgets grow.
* Conformal risk control (Angelopoulos, Bates, Fisch, Lei & Schuster 2022): the expected loss, averaged over the
  calibration cases too, is within the bound. It needs losses that never rise with the budget, so each case's loss is
  replaced by its largest at this budget or a larger one, which is an upper bound of it.

The p-values hold for every number of cases; no central limit theorem is used. `draw_cases` draws independent cases,
`losses_of` takes the losses from their records, and `resplit` checks the guarantee on held-out halves.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..retention import TriedBudget
from ..retention.calibration import Method
from .cases import Case, Record
from .prompts import encode
from .tasks.builder import RETRIEVAL, CaseBuilder, get_task


def binomial_cdf(successes: int, trials: int, probability: float) -> float:
    """P(X ≤ successes) for X ~ Binomial(trials, probability), summed in logarithms."""
    if successes >= trials or probability <= 0:
        return 1.0
    if successes < 0 or probability >= 1:
        return 0.0
    k = np.arange(successes + 1)
    steps = np.log((trials - k[:-1]) / (k[:-1] + 1.0))  # of log C(trials, k)
    terms = np.concatenate([[0.0], np.cumsum(steps)])
    terms += k * math.log(probability) + (trials - k) * math.log1p(-probability)
    top = terms.max()
    return min(1.0, float(np.exp(top) * np.exp(terms - top).sum()))


def hoeffding_bentkus(total: float, cases: int, bound: float) -> float:
    """A valid p-value of "the expected loss exceeds `bound`" for independent losses in [0, 1].

    The smaller of Hoeffding's inequality in its relative-entropy form (1963, theorem 1) and Bentkus' (2004):
    `min(exp(−n·h(min(R̂, α), α)), e · P(Bin(n, α) ≤ ⌈n·R̂⌉))` with `h(a, b) = a·log(a/b) + (1−a)·log((1−a)/(1−b))`,
    as in Bates et al. 2021 (section 3.1).

    Args:
        total: n·R̂, the sum of the losses.
        cases: n.
        bound: α in (0, 1).
    """
    hoeffding = math.exp(-cases * _relative_entropy(min(total / cases, bound), bound))
    return min(1.0, hoeffding, math.e * binomial_cdf(math.ceil(total), cases, bound))


def _relative_entropy(a: float, b: float) -> float:
    return sum(x * math.log(x / y) for x, y in ((a, b), (1 - a, 1 - b)) if x > 0)


def p_value(total: float, cases: int, bound: float, binary: bool) -> float:
    """A valid p-value of "the expected loss exceeds `bound`" from the sum of losses in [0, 1].

    The exact binomial tail where every loss is 0 or 1 (`binary`); else, or if more of them are 1 than the tail is valid
    for when the cases differ in their chance of a loss (Hoeffding 1956: up to n·α − 1), `hoeffding_bentkus`.
    """
    if binary and total <= cases * bound - 1:
        return binomial_cdf(round(total), cases, bound)
    return hoeffding_bentkus(total, cases, bound)


@dataclass(frozen=True)
class BudgetDecision:
    """The budget that a calibration accepted, and the tests of all budgets.

    Attributes:
        budget: the smallest accepted budget; None if none is.
        table: every budget, the largest first.
    """

    budget: float | int | None
    table: tuple[TriedBudget, ...]

    @property
    def accepted(self) -> int | None:
        """The chosen budget's place in the table."""
        count = sum(row.accepted for row in self.table)
        return count - 1 if count else None


LEAST_BOUND = 1e-9  # relative to the largest loss


@dataclass(frozen=True)
class RiskControl:
    """A bound on a budget's expected loss, and the method that decides about it.

    Attributes:
        bound: of the expected loss.
        max_loss: no loss is larger; larger ones were clipped.
        confidence: that the bound holds, for "ltt"; "crc" bounds the mean over calibrations and does not use it.
        method: "ltt" or "crc".
        binary: every loss is 0 or `max_loss`.

    Raises:
        ValueError: a number out of its range, or an unknown method.
    """

    bound: float
    max_loss: float = 1.0
    confidence: float = 0.9
    method: Method = "ltt"
    binary: bool = False

    def __post_init__(self) -> None:
        if self.method not in ("ltt", "crc"):
            raise ValueError(f"unknown method {self.method!r}; known: ltt, crc")
        if not 0 < self.confidence < 1:
            raise ValueError(f"confidence must be between 0 and 1, got {self.confidence}")
        if not 0 < self.bound < self.max_loss:
            raise ValueError(f"the bound must be between 0 and the largest loss, {self.max_loss:g}, got {self.bound}")
        if not self.bound / self.max_loss >= LEAST_BOUND:
            raise ValueError(
                f"got the bound {self.bound:g} of losses up to {self.max_loss:g}; accepted: {LEAST_BOUND:g} of the "
                "largest or more, as less needs more cases than there are"
            )

    @property
    def least_cases(self) -> int:
        """Fewer cases prove nothing, even if no case has any loss."""
        needed = self.cases_needed(0.0)
        assert needed is not None, "the bound is positive"
        return needed

    def decide(self, losses: np.ndarray, budgets: Sequence[float | int]) -> BudgetDecision:
        """Accepts budgets.

        Args:
            losses: float `(cases, budgets)` in [0, max_loss]; cases are independent, the budgets see the same ones.
            budgets: distinct, in falling order.

        Raises:
            ValueError: no cases or budgets, another shape or order, or losses out of their range.
        """
        self._check(losses, budgets)
        scaled = losses / self.max_loss
        if self.method == "crc":
            scaled = np.maximum.accumulate(scaled, axis=1)
        cases = len(losses)
        totals = [math.fsum(column) for column in scaled.T]
        statistics = [self._statistic(total, cases) for total in totals]
        passed = [value <= self._level for value in statistics]
        accepted = passed.index(False) if False in passed else len(passed)
        table = tuple(
            TriedBudget(budget, float(mean), value, place < accepted)
            for place, (budget, mean, value) in enumerate(zip(budgets, losses.mean(0), statistics, strict=True))
        )
        return BudgetDecision(budgets[accepted - 1] if accepted else None, table)

    def reachable(self, mean_loss: float, cases: int) -> float:
        """The smallest bound that a budget with this mean loss over that many cases meets."""
        mean = mean_loss / self.max_loss
        if self.method == "crc":
            return self._statistic(mean * cases, cases)
        low, high = mean, 1.0
        for _ in range(50):
            middle = (low + high) / 2
            passes = middle < 1 and self._statistic(mean * cases, cases, middle) <= self._level
            low, high = (low, middle) if passes else (middle, high)
        return high * self.max_loss

    def cases_needed(self, mean_loss: float) -> int | None:
        """Number of cases that suffices for the bound with this mean loss; None if the loss is not below it: none does.

        "ltt": from Hoeffding's inequality alone, so that fewer may do.
        """
        bound, mean = self.bound / self.max_loss, mean_loss / self.max_loss
        if mean >= bound:
            return None
        if self.method == "crc":
            return math.ceil((1 - bound) / (bound - mean))
        return math.ceil(-math.log(1 - self.confidence) / _relative_entropy(mean, bound))

    @property
    def _level(self) -> float:
        """A budget passes whose statistic is at most this."""
        return self.bound if self.method == "crc" else 1 - self.confidence

    def _statistic(self, total: float, cases: int, bound: float | None = None) -> float:
        """See `TriedBudget.statistic`; `total` and `bound` (by default its own) are shares of `max_loss`."""
        if self.method == "crc":
            return (total + 1) / (cases + 1) * self.max_loss
        return p_value(total, cases, self.bound / self.max_loss if bound is None else bound, self.binary)

    def _check(self, losses: np.ndarray, budgets: Sequence[float | int]) -> None:
        if losses.ndim != 2 or 0 in losses.shape or losses.shape[1] != len(budgets):
            raise ValueError(f"expected losses (cases, {len(budgets)}) with at least one of each, got {losses.shape}")
        if list(budgets) != sorted(set(budgets), reverse=True):
            raise ValueError(f"budgets must fall from each to the next, got {list(budgets)}")
        outside = losses[~((losses >= 0) & (losses <= self.max_loss))]
        if outside.size:
            raise ValueError(f"losses must lie in [0, {self.max_loss:g}], got {outside[0]}")
        if self.binary and not np.isin(losses, (0.0, self.max_loss)).all():
            raise ValueError(f"binary losses are 0 or {self.max_loss:g}")


KL, ANSWERS = "kl", "answers"


def long_enough(tokenizer: Any, texts: Sequence[str], tokens: int) -> list[int]:
    """Numbers of the texts with at least `tokens` tokens: a document cut from one of them does not repeat itself."""
    return [number for number, text in enumerate(texts) if len(encode(tokenizer, text, plain=True)) >= tokens]


def draw_cases(
    tokenizer: Any, texts: Sequence[str], count: int, lengths: Sequence[int], tasks: Sequence[str], seed: int
) -> Iterator[tuple[int, Case]]:
    """Cases with the number of the text that their document is a part of.

    The texts take turns in a random order, so that with no more cases than texts no two cases share one. Given the
    text, cases are independent: passage, task, length, facts and depth are drawn anew for each (`CaseBuilder`'s own
    sequence spreads the depths evenly instead). A document that starts near the end of its text continues at
    the beginning.

    Args:
        texts: each of at least as many tokens as the longest length.
        lengths, tasks: each case draws one of each.
        seed: the same seed gives the same cases.

    Raises:
        ValueError: no texts, an unknown task, or a length that cannot hold the frame and the facts.
    """
    if not texts:
        raise ValueError("there is no text to draw documents from")
    order = list(range(len(texts)))
    random.Random(f"{seed}/texts").shuffle(order)
    for number in range(count):
        rng = random.Random(f"{seed}/{number}")
        text = order[number % len(order)]
        builder = CaseBuilder(tokenizer, [texts[text]], rng.choice(list(lengths)), seed=rng.getrandbits(31))
        yield text, builder.case(rng.choice(list(tasks)), 0)


def tasks_of(loss: str, tasks: Sequence[str]) -> tuple[str, ...]:
    """The tasks whose questions a loss is measured on: those given, or the loss itself if it is a task.

    Raises:
        ValueError: neither "kl" nor "answers" nor a task, or an unknown task.
    """
    for task in tasks:
        get_task(task, RETRIEVAL)
    if loss in (KL, ANSWERS):
        return tuple(tasks)
    if loss not in RETRIEVAL:
        raise ValueError(f"unknown loss {loss!r}; known: {KL}, {ANSWERS}, {', '.join(RETRIEVAL)}")
    return (loss,)


def losses_of(
    records: Sequence[Record], budgets: Sequence[float | int], loss: str, max_loss: float = 1.0
) -> np.ndarray:
    """The losses that a calibration is about: float64 `(cases, budgets)` in [0, max_loss].

    Args:
        records: of one policy: for each case those of the full cache (needed for a task's loss) and of every budget, as
            `evaluate` returns them.
        loss: "kl": `min(KL to the full cache, max_loss)` in nats; anything else: `max_loss` where the full cache's
            answer is right and the compressed cache's wrong, 0 elsewhere.
    """
    cells: dict[float | int, list[Record]] = {budget: [] for budget in budgets}
    full: list[Record] = []
    for record in records:
        (full if record.policy == "full" else cells[record.budget]).append(record)
    columns = []
    for budget in budgets:
        if loss == KL:
            columns.append([min(record.kl, max_loss) for record in cells[budget]])
        else:
            pairs = zip(full, cells[budget], strict=True)
            columns.append([max_loss * (before.correct and not after.correct) for before, after in pairs])
    return np.array(columns, dtype=np.float64).T


@dataclass(frozen=True)
class Resplits:
    """The outcome of the guarantee in many splits.

    The splits share one pool of cases and are not independent experiments, and a held-out half is finite: a budget
    whose expected loss is just within the bound exceeds it in about half of the held-out halves.

    Attributes:
        splits: their number.
        broken: splits in which the chosen budget's mean loss on the held-out half exceeded the bound.
        none: splits in which no budget was accepted, so that nothing was guaranteed.
        chosen: how often each budget was chosen.
        mean_loss: of the chosen budgets on the held-out halves; NaN where none was ever chosen.
    """

    splits: int
    broken: int
    none: int
    chosen: dict[float | int, int] = field(default_factory=dict)
    mean_loss: float = float("nan")

    @property
    def rate(self) -> float:
        """Share of the splits in which the bound was broken."""
        return self.broken / self.splits


def resplit(
    losses: np.ndarray, budgets: Sequence[float | int], groups: Sequence[int], control: RiskControl, splits: int = 200,
    seed: int = 0,
) -> Resplits:  # fmt: skip
    """Calibrates on a random half of the groups and judges the chosen budget on the others, `splits` times.

    Args:
        losses, budgets: as in `RiskControl.decide`.
        groups: the group of each case; a group is never torn apart: its document, or its own number.

    Raises:
        ValueError: fewer than two groups, or what `RiskControl.decide` refuses.
    """
    labels = np.asarray(groups)
    distinct = np.unique(labels)
    if len(labels) != len(losses) or len(distinct) < 2:
        raise ValueError(f"expected the groups of {len(losses)} cases, two or more different ones, got {len(distinct)}")
    rng = np.random.default_rng(seed)
    chosen: Counter[float | int] = Counter()
    held_out = []
    for _ in range(splits):
        inside = np.isin(labels, rng.permutation(distinct)[: (len(distinct) + 1) // 2])
        outcome = control.decide(losses[inside], budgets)
        if outcome.accepted is not None:
            chosen[budgets[outcome.accepted]] += 1
            held_out.append(float(losses[~inside, outcome.accepted].mean()))
    broken = sum(loss > control.bound for loss in held_out)
    mean = float(np.mean(held_out)) if held_out else float("nan")
    in_order = {budget: chosen[budget] for budget in budgets if chosen[budget]}
    return Resplits(splits, broken, splits - len(held_out), in_order, mean)
