"""Floors for groups of tokens: a share of the budget that an image's tokens, say, keep whatever text scores."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from .protected_tokens import ProtectedTokens

FLOOR_FORMS = "give pairs (tokens, share), tokens as in protect and a share of the budget in (0, 1]; shares add up to 1"


@dataclass(frozen=True)
class TokenFloor:
    """A share of each group's budget for the best entries of some tokens, before all entries compete.

    The floor is no allotment: these tokens may win more, and where they have fewer entries than the floor, others get
    the rest. Protected tokens among them count towards it; sinks and recent tokens give way to it, tokens of `protect`
    do not.

    Attributes:
        tokens: see `ProtectedTokens`; ranges may exceed what a row has seen.
        share: of the budget of the entries that compete (the row, a layer or a head, by scope), rounded down.

    Raises:
        ValueError: a share outside (0, 1].
    """

    tokens: ProtectedTokens
    share: float

    def __post_init__(self) -> None:
        number = isinstance(self.share, int | float) and not isinstance(self.share, bool)
        if not number or not 0 < self.share <= 1:
            raise ValueError(f"token_floors has the share {self.share!r}; {FLOOR_FORMS}")

    def for_rows(self, rows: Sequence[int]) -> TokenFloor:
        """A copy for a batch whose row `i` was row `rows[i]`."""
        return replace(self, tokens=self.tokens.for_rows(rows))

    def mask(self, positions: torch.Tensor, tokens: Sequence[int]) -> torch.Tensor:
        """bool like `positions`, int64 `(batch, heads, n)` with -1 for none: whether an entry is of these tokens."""
        table = self.tokens.table(tokens, positions.device).unsqueeze(1).expand(-1, positions.shape[1], -1)
        return table.gather(2, positions.clamp(min=0)) & (positions >= 0)


def token_floors(given: Any) -> tuple[TokenFloor, ...]:
    """From pairs `(tokens, share)`, tokens in any form of `ProtectedTokens.of`, or floors; None gives none.

    Raises:
        ValueError: something else, a share out of its range, or shares that exceed the budget together.
    """
    if given is None:
        return ()
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise ValueError(f"token_floors is {given!r}; {FLOOR_FORMS}")
    floors = []
    for one in given:
        if isinstance(one, TokenFloor):
            floors.append(one)
            continue
        try:
            tokens, share = one
        except (TypeError, ValueError):
            raise ValueError(f"token_floors has {one!r}; {FLOOR_FORMS}") from None
        floors.append(TokenFloor(ProtectedTokens.of(tokens), share))
    whole = sum(floor.share for floor in floors)
    if whole > 1 + 1e-9:
        raise ValueError(f"token_floors has shares that add up to {whole:g}; {FLOOR_FORMS}")
    return tuple(floors)
