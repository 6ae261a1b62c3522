"""Greedy decoding on a cache that already holds the context."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ..eviction import RaggedCache, Session


def agreed(
    gold: Sequence[int], logits: torch.Tensor, ends: Callable[[list[int]], bool]
) -> tuple[list[int], bool]:
    """The beginning of a greedy generation that costs nothing: as far as the model agrees with the gold answer.

    Where every teacher-forced choice is the gold token, greedy decoding would have taken the same path; so decoding
    proper starts only behind the first token that differs.

    Args:
        logits: `(1 + len(gold), vocab)`: of the question's last token and of the gold answer fed after it.
        ends: whether the generation ends behind these tokens.

    Returns:
        The tokens, and whether the generation ends with them.
    """
    generated: list[int] = []
    for choice, expected in zip(logits.argmax(-1).tolist(), [*gold, None], strict=True):
        generated.append(choice)
        if ends(generated):
            return generated, True
        if choice != expected:
            break
    return generated, False


def greedy_rows(
    session: Session,
    cache: RaggedCache,
    before: Sequence[Sequence[int]],
    ends: Callable[[list[int]], bool],
) -> list[list[int]]:
    """Greedy generations of all rows at once, each behind the tokens it has generated already.

    Args:
        cache: a row for each; it is extended and may lose rows.
        before: at least one token a row, of different numbers perhaps.
        ends: whether a generation ends behind these tokens.

    Returns:
        For each row the tokens of `before` and those after them.
    """
    generated = [list(tokens) for tokens in before]
    rows, live, fed = list(range(len(generated))), set(range(len(generated))), 0
    while live:
        width = min(len(generated[row]) for row in live) - fed
        ids = torch.tensor([(generated[row] + [0] * width)[fed : fed + width] if row in live else [0] * width
                            for row in rows])  # fmt: skip
        logits = session.extend(cache, ids, logits_to_keep=1)
        fed += width
        for row, choice in zip(rows, logits[:, -1].argmax(-1).tolist(), strict=True):
            if row in live and len(generated[row]) == fed:
                generated[row].append(choice)
                if ends(generated[row]):
                    live.remove(row)
        if live and 2 * len(live) <= len(rows):  # what is done is left out once it is worth the copy
            cache.select_rows(torch.tensor([place for place, row in enumerate(rows) if row in live]))
            rows = [row for row in rows if row in live]
    return generated
