"""Token masks of compiled grammars. A mask costs microseconds a token; one that takes too long ends its own answer."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .grammar_config import GrammarConfig

if TYPE_CHECKING:
    import torch


class MaskTooSlow(RuntimeError):
    """A grammar needs too long for a token: the answer ends, so that the others need not wait."""


class GrammarMask(ABC):
    """A `TokenMask` of one answer. The grammar's end ends the answer, whether or not an end token follows.

    Args:
        vocab_size: width of the model's logits.
        end_token_ids: the model's end tokens, which are allowed where the text is complete.
        config: its bounds of time. Only the time for which this thread computes counts, so that an answer does not
            depend on what else the machine does.
        may_end: end tokens are allowed where the text is complete; else the answer continues while the grammar can.
    """

    def __init__(
        self, vocab_size: int, end_token_ids: Sequence[int], config: GrammarConfig, may_end: bool = True
    ) -> None:
        import torch

        # int32 (1, words), token t in bit t % 32 of word t // 32; written by the library, read by the sampler.
        self._words: torch.Tensor = torch.zeros((1, -(-vocab_size // 32)), dtype=torch.int32)
        self._without_ends = np.full(self._words.shape[1], -1, np.int32)
        for token in end_token_ids:
            self._without_ends[token // 32] &= ~np.int32(np.uint32(1 << token % 32).view(np.int32))
        self._ends, self._config, self._may_end = frozenset(end_token_ids), config, may_end
        self._filled = self._finished = False
        self._spent_s, self._steps = 0.0, 0

    def allowed(self, tokens: Sequence[int]) -> torch.Tensor:
        """int32 `(ceil(vocab_size / 32),)`, the tokens that may be next.

        Raises:
            MaskTooSlow: it took too long.
        """
        if not self._filled:
            begun = time.thread_time()
            self._fill()
            self._count(begun)
            if not self._may_end:
                self._words.numpy()[0] &= self._without_ends
            self._filled = True
        return self._words[0]

    def accept(self, token: int) -> None:
        """The answer continues with `token`.

        Raises:
            ValueError: the grammar doesn't allow it.
            MaskTooSlow: as `allowed`.
        """
        if self._finished:
            return
        if token in self._ends and self._is_complete():
            self._finished = True
            return
        begun = time.thread_time()
        self._advance(token)
        self._filled = False
        self._steps += 1
        self._count(begun)
        if self._is_complete():
            self._finished = not np.any(self.allowed(()).numpy() & self._without_ends)

    def _count(self, begun: float) -> None:
        """Adds the time since `begun`; MaskTooSlow if the answer has had too much."""
        self._spent_s += time.thread_time() - begun
        burst_s, mean_s = self._config.max_step_s, self._config.mean_step_s
        if self._spent_s > burst_s + self._steps * mean_s:
            raise MaskTooSlow(
                f"the grammar took {self._spent_s:.2f} s for {self._steps + 1} tokens; accepted: {burst_s:g} s, and "
                f"{mean_s:g} s more for each token"
            )

    @property
    def is_finished(self) -> bool:
        """The text is complete, and nothing can follow."""
        return self._finished

    @abstractmethod
    def _fill(self) -> None:
        """Writes the mask into `_words`."""

    @abstractmethod
    def _advance(self, token: int) -> None:
        """Advances the matcher; ValueError if the token is not allowed."""

    @abstractmethod
    def _is_complete(self) -> bool:
        """Whether the text may end here."""


class XGrammarMask(GrammarMask):
    """Of xgrammar.

    Args:
        compiled: an `xgrammar.CompiledGrammar`, which several masks may share.
    """

    def __init__(self, compiled: Any, *args: Any) -> None:
        import xgrammar

        super().__init__(*args)
        self._matcher = xgrammar.GrammarMatcher(compiled)

    def _fill(self) -> None:
        if not self._matcher.fill_next_token_bitmask(self._words):
            self._words.fill_(-1)

    def _advance(self, token: int) -> None:
        if not self._matcher.accept_token(token):
            raise ValueError(f"got token {token}; accepted: those that the grammar allows")

    def _is_complete(self) -> bool:
        return self._matcher.is_completed()


class LLGuidanceMask(GrammarMask):
    """Of llguidance.

    Args:
        matcher: an `llguidance.LLMatcher` at the beginning of its grammar; it is copied.
    """

    def __init__(self, matcher: Any, *args: Any) -> None:
        super().__init__(*args)
        self._matcher = matcher.deep_copy()

    def _fill(self) -> None:
        self._matcher.unsafe_compute_mask_ptr(self._words.data_ptr(), self._words.numel() * 4)
        if self._matcher.is_error():
            raise MaskTooSlow(f"the grammar is too complex: {self._matcher.get_error().splitlines()[0]}")

    def _advance(self, token: int) -> None:
        if not self._matcher.consume_token(token):
            raise ValueError(f"got token {token}; accepted: those that the grammar allows")

    def _is_complete(self) -> bool:
        return self._matcher.is_accepting()
