"""How long a call and the pause after it take, learned from what is seen."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

from .spec import AgentSpec

MEMORY = 32  # observations that are kept, and after which the running mean and spread forget as fast as they learn
WIDE = 0.5  # spread, as a share of the mean, from which the observations are the law
PRIOR = 3.0  # observations that what was known before counts as much as there


@dataclass
class Duration:
    """One kind of waiting, in seconds, as it was last seen.

    As long as the spread is small the law is a fixed part and an exponential rest, of this mean and this standard
    deviation: most calls have a floor and a tail, and both the discount and what is left of a wait are in closed form.
    Beyond `WIDE` the last observations themselves are the law, and with them what was known before. There a mean says
    little: one tool that hung would make all its waits look endless, which in a discount is one in so many.

    Attributes:
        mean: seconds.
        spread: standard deviation in seconds.
        count: observations in it; at 0 the two are a guess, which the first observation replaces.
        like: what it is taken for until then, once that has been observed: the same of all agents.
        recent: the last `MEMORY` observations.
    """

    mean: float
    spread: float
    count: int = 0
    like: Duration | None = None
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=MEMORY), init=False, repr=False)

    def __post_init__(self) -> None:
        self._guess = self.mean, self.spread
        for name, value in (("mean", self.mean), ("spread", self.spread)):
            if not (0 <= value < math.inf):
                raise ValueError(f"got the {name} {value} for a duration; accepted: seconds, 0 or more and finite")

    def observe(self, seconds: float) -> None:
        """Exponentially weighted mean and variance (West 1979), plain ones for the first `MEMORY` observations.

        One observation says nothing of the spread, which keeps its share of the mean from the guess. A negative one (a
        clock was set back) counts as 0.
        """
        seconds = max(0.0, seconds)
        self.count += 1
        self.recent.append(seconds)
        if self.count == 1:
            share = min(1.0, self.spread / self.mean) if self.mean else 1.0
            self.mean, self.spread = seconds, share * seconds
            return
        weight = 1 / min(self.count, MEMORY)
        step = seconds - self.mean
        self.mean += weight * step
        self.spread = math.sqrt((1 - weight) * (self.spread**2 + weight * step**2))

    def discount(self, rate: float, elapsed: float = 0.0) -> float:
        """E[exp(-rate · what is left)] of a wait that has lasted `elapsed` seconds and is not over."""
        if not self.count or self.spread > WIDE * self.mean:
            return self._as_seen(rate, elapsed)
        return _discount(self.mean, self.spread, rate, elapsed)

    def _as_seen(self, rate: float, elapsed: float) -> float:
        """The mean over those observations that are longer than `elapsed`, and what was known before any."""
        if self.like is not None and self.like.count:
            before = self.like.discount(rate, elapsed)
        else:  # a guess of no time at all is none
            before = _discount(*(self._guess if self._guess[0] else (self.mean, self.spread)), rate, elapsed)
        longer = [seconds - elapsed for seconds in self.recent if seconds > elapsed]
        seen = sum([math.exp(-rate * seconds) for seconds in longer])
        return (PRIOR * before + seen) / (PRIOR + len(longer))


def _discount(mean: float, spread: float, rate: float, elapsed: float) -> float:
    """Of a fixed part and an exponential rest; a spread above the mean counts as one that is as large."""
    tail = spread if spread < mean else mean
    left = mean - tail - elapsed
    return (math.exp(-rate * left) if left > 0.0 else 1.0) / (1 + rate * tail)


@dataclass
class AgentDurations:
    """Of one agent: its call (prefill and decode), and the pause (a tool, a user) until the call it leads to."""

    call: Duration
    pause: Duration
    _discount: tuple[int, int, float, float] = field(  # as of so many observations, at that rate
        default=(-1, -1, 0.0, 0.0), init=False, repr=False, compare=False
    )

    @classmethod
    def guess(cls, spec: AgentSpec, default_s: float) -> AgentDurations:
        """As `spec` says; where it does not, a call of `default_s` and no pause, with a spread as large as the mean."""
        call = default_s if spec.call_s is None else spec.call_s
        pause = 0.0 if spec.pause_s is None else spec.pause_s
        return cls(
            Duration(call, call if spec.call_spread_s is None else spec.call_spread_s),
            Duration(pause, pause if spec.pause_spread_s is None else spec.pause_spread_s),
        )

    def discount(self, rate: float) -> float:
        """E[exp(-rate · (call + pause))]."""
        calls, pauses, at, known = self._discount
        if calls == self.call.count > 0 and pauses == self.pause.count and at == rate:
            return known
        known = self.call.discount(rate) * self.pause.discount(rate)
        self._discount = self.call.count, self.pause.count, rate, known
        return known
