"""How long calls and the pauses after them take, learned from observed waits."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

from .graph_config import DurationConfig
from .spec import AgentSpec

_DEFAULT = DurationConfig()


@dataclass
class Duration:
    """Distribution of one kind of wait, in seconds.

    While the spread is small the distribution is a constant plus an exponential rest with this mean and standard
    deviation: most calls have a floor and a tail, and both the discount and the remaining wait have a closed form.
    Above `DurationConfig.wide_spread` the last observations are used as an empirical distribution, together with the
    prior. There a mean says little: one tool that hung would make all its waits look endless, whereas it is one of
    many observations in the discount.

    Attributes:
        spread: standard deviation in seconds.
        count: observations; at 0, mean and spread are a guess that the first observation replaces.
        prior: distribution used while this one has few observations, once it has some itself: that of all agents.
        recent: the last `config.memory` observations in seconds.

    Raises:
        ValueError: mean or spread is negative, infinite or not a number.
    """

    mean: float
    spread: float
    count: int = 0
    prior: Duration | None = None
    config: DurationConfig = field(default=_DEFAULT, repr=False)
    recent: deque[float] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.recent = deque(maxlen=self.config.memory)
        self._guess = self.mean, self.spread
        for name, value in (("mean", self.mean), ("spread", self.spread)):
            if not (0 <= value < math.inf):
                raise ValueError(f"got the {name} {value} for a duration; accepted: seconds, 0 or more and finite")

    def observe(self, seconds: float) -> None:
        """Updates mean and variance: plain for the first `memory` observations, then weighted (West 1979).

        One observation carries no information on the spread, which keeps the guessed ratio to the mean. A negative
        value (a clock was set back) counts as 0.
        """
        seconds = max(0.0, seconds)
        self.count += 1
        self.recent.append(seconds)
        if self.count == 1:
            ratio = min(1.0, self.spread / self.mean) if self.mean else 1.0
            self.mean, self.spread = seconds, ratio * seconds
            return
        weight = 1 / min(self.count, self.config.memory)
        step = seconds - self.mean
        self.mean += weight * step
        self.spread = math.sqrt((1 - weight) * (self.spread**2 + weight * step**2))

    def without_observations(self) -> Duration:
        """The guess that this one began with."""
        return Duration(*self._guess, prior=self.prior, config=self.config)

    def discount(self, rate: float, elapsed: float = 0.0) -> float:
        """E[exp(-rate · remaining)] of a wait that has lasted `elapsed` seconds so far; `rate` in 1/s."""
        if not self.count or self.spread > self.config.wide_spread * self.mean:
            return self._empirical_discount(rate, elapsed)
        return _closed_form_discount(self.mean, self.spread, rate, elapsed)

    def _empirical_discount(self, rate: float, elapsed: float) -> float:
        """The mean over the observations longer than `elapsed`, and the prior."""
        if self.prior is not None and self.prior.count:
            before = self.prior.discount(rate, elapsed)
        else:  # a guessed mean of 0 is no information
            guess = self._guess if self._guess[0] else (self.mean, self.spread)
            before = _closed_form_discount(*guess, rate, elapsed)
        longer = [seconds - elapsed for seconds in self.recent if seconds > elapsed]
        observed = sum([math.exp(-rate * seconds) for seconds in longer])
        weight = self.config.prior_weight
        return (weight * before + observed) / (weight + len(longer))


def _closed_form_discount(mean: float, spread: float, rate: float, elapsed: float) -> float:
    """Of a constant and an exponential rest; a spread above the mean counts as equal to it."""
    tail = spread if spread < mean else mean
    left = mean - tail - elapsed
    return (math.exp(-rate * left) if left > 0.0 else 1.0) / (1 + rate * tail)


@dataclass
class AgentDurations:
    """An agent's call (prefill and decode), and the pause (a tool, a user) until the next call it leads to."""

    call: Duration
    pause: Duration
    _discount: tuple[int, int, float, float] = field(  # memo: observations of both, rate, value
        default=(-1, -1, 0.0, 0.0), init=False, repr=False, compare=False
    )

    @classmethod
    def guess(cls, spec: AgentSpec, default_call_s: float, config: DurationConfig = _DEFAULT) -> AgentDurations:
        """From `spec`; by default a call of `default_call_s` seconds and no pause, with a spread equal to the mean."""
        call = default_call_s if spec.call_s is None else spec.call_s
        pause = 0.0 if spec.pause_s is None else spec.pause_s
        return cls(
            Duration(call, call if spec.call_spread_s is None else spec.call_spread_s, config=config),
            Duration(pause, pause if spec.pause_spread_s is None else spec.pause_spread_s, config=config),
        )

    def without_observations(self) -> AgentDurations:
        """The same guesses, as of an agent that has not been called."""
        return AgentDurations(self.call.without_observations(), self.pause.without_observations())

    def discount(self, rate: float) -> float:
        """E[exp(-rate · (call + pause))], with `rate` in 1/s."""
        calls, pauses, at, known = self._discount
        if calls == self.call.count > 0 and pauses == self.pause.count and at == rate:
            return known
        known = self.call.discount(rate) * self.pause.discount(rate)
        self._discount = self.call.count, self.pause.count, rate, known
        return known
