"""The sampling state of one answer: its tokens, random numbers, changed logits, and end."""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from .params import FinishedBy, SamplingParams, TokenMask, random_bits


class LogitChanges:
    """Changes of a row's logits `x`: to `y = x + bias`, then to `y / factor` (below 0 `y * factor`) `- penalty`.

    They are kept by token, since even a long answer has few different ones, and updated as the answer grows.

    Args:
        params: of the row.
        prompt: int64 `(tokens,)`, the prompt that the repetition penalty looks at; empty without one.
        banned: tokens that cannot be chosen before `lift_ban`.
    """

    def __init__(self, params: SamplingParams, prompt: np.ndarray, banned: Sequence[int]) -> None:
        self.params, self._banned = params, list(banned)
        self._counts: Counter[int] = Counter()  # of tokens of the answer
        bias, seen = params.logit_bias, np.unique(prompt)
        self._ids = np.unique(np.concatenate([seen, np.array([*bias, *banned], np.int64)]))
        self._places = {token: place for place, token in enumerate(self._ids.tolist())}
        self._values = np.zeros((3, len(self._ids)), np.float32)
        self._values[1] = 1.0
        for token, value in bias.items():
            self._values[0, self._places[token]] = value
        self._values[1, np.searchsorted(self._ids, seen)] = params.repetition_penalty
        self._values[0, [self._places[token] for token in banned]] = -np.inf

    @property
    def ids(self) -> np.ndarray:
        """The changed tokens, each once: int64 `(changed,)`."""
        return self._ids[: len(self._places)]

    @property
    def values(self) -> np.ndarray:
        """Their bias, factor and penalty: float32 `(3, changed)`."""
        return self._values[:, : len(self._places)]

    def count(self, token: int) -> None:
        """Updates the penalties for another `token` of the answer."""
        params = self.params
        if not params.penalised:
            return
        place = self._places.get(token)
        if place is None:
            place = self._places[token] = len(self._places)
            if place == len(self._ids):
                spare = max(64, place)
                self._ids = np.concatenate([self._ids, np.zeros(spare, np.int64)])
                self._values = np.concatenate([self._values, np.zeros((3, spare), np.float32)], axis=1)
            self._ids[place] = token
        self._counts[token] += 1
        self._values[1, place] = params.repetition_penalty
        self._values[2, place] = params.presence_penalty + params.frequency_penalty * self._counts[token]

    def lift_ban(self) -> None:
        """The banned tokens may be chosen from now on."""
        for token in self._banned:
            self._values[0, self._places[token]] = self.params.logit_bias.get(token, 0.0)
        self._banned = []


class SamplerRow:
    """The sampling state of one answer, made by `Sampler.new_row` and advanced by `Sampler.sample`.

    Args:
        params: of the request.
        vocab_size: of the model.
        eos_token_ids: the model's end tokens.
        prompt: token ids; read only for a repetition penalty, and not kept.
        output: tokens of the answer that have been chosen before, of a request that is resumed.

    Attributes:
        seed: of the row's random numbers.
        tokens: the answer so far.
        mask: the row's token mask, or None.
        changes: changed logits, or None.

    Raises:
        ValueError: a token id beyond the vocabulary.
        Exception: whatever `params.make_mask` raises.
    """

    def __init__(
        self,
        params: SamplingParams,
        vocab_size: int,
        eos_token_ids: Sequence[int],
        prompt: Any,
        output: Sequence[int] = (),
    ) -> None:
        params.check_vocab(vocab_size)
        self.params = params
        self.tokens: list[int] = []
        self.seed = secrets.randbits(63) if params.seed is None else params.seed
        self._ends = dict.fromkeys(params.stop_token_ids, FinishedBy.STOP_TOKEN)
        if not params.ignore_eos:
            self._ends |= dict.fromkeys(eos_token_ids, FinishedBy.EOS)
        self.mask: TokenMask | None = None if params.make_mask is None else params.make_mask()
        self.changes: LogitChanges | None = None
        if params.penalised or params.logit_bias or params.min_new_tokens:
            banned = list(self._ends) if params.min_new_tokens else []
            counted = np.asarray(prompt if params.repetition_penalty != 1 else (), np.int64).reshape(-1)
            for name, ids in (("the prompt", counted), ("the answer so far", np.asarray(output, np.int64))):
                if len(ids) and not 0 <= ids.min() <= ids.max() < vocab_size:
                    wrong = ids.min() if ids.min() < 0 else ids.max()
                    raise ValueError(f"got token id {wrong} in {name}; accepted: 0 to {vocab_size - 1}")
            self.changes = LogitChanges(params, counted, banned)
        for token in output:
            self.append(token)

    @property
    def plain(self) -> bool:
        """The next token is the one of the largest logit, and nothing else is wanted."""
        return self.mask is None and self.changes is None and self.params.greedy and self.params.logprobs is None

    def uniform(self) -> float:
        """The random number of the next token: a multiple of 2^-52 in [0, 1), of the seed and the token's index."""
        return (random_bits(self.seed, len(self.tokens), b"token") >> 12) * 2.0**-52

    def append(self, token: int) -> FinishedBy | None:
        """The answer continues with `token`; returns how it has ended by that, or None.

        Raises:
            Exception: whatever the token mask raises.
        """
        self.tokens.append(token)
        if self.changes is not None:
            self.changes.count(token)
            if len(self.tokens) == self.params.min_new_tokens:
                self.changes.lift_ban()
        if self.mask is not None:
            self.mask.accept(token)
        found = self._ends.get(token)
        if found is None and self.mask is not None and self.mask.is_finished:
            found = FinishedBy.MASK
        return found
