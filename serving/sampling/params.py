"""Sampling parameters of a request, and the protocol of token masks. Importing this module needs no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Protocol

from tenure.checked import Range, Size, verify

if TYPE_CHECKING:
    import torch

GREEDY_BELOW = 1e-5  # temperatures below this are greedy: the quotients of logits would overflow
MAX_COUNT = 2**31 - 1  # of tokens: it fits into every tensor of the sampler
MAX_LOGPROBS = 20  # alternatives of a token, as OpenAI has it

Probability = Annotated[float, Range(0, 1)]
TokenId = Annotated[int, Range(0)]


class FinishedBy(Enum):
    """How an answer ended by itself, before its limit of tokens."""

    EOS = "eos"  # an end token of the model
    STOP_TOKEN = "stop token"  # one of `stop_token_ids`
    STOP_TEXT = "stop text"  # one of `stop`
    MASK = "mask"  # the token mask's text is complete


class TokenMask(Protocol):
    """A constraint on the tokens of one answer, as a grammar; made for each answer, used by the sampler's thread.

    An exception raised here ends this answer only.
    """

    def allowed(self, tokens: Sequence[int]) -> torch.Tensor | None:
        """The tokens that may be next; read before the next call, never changed.

        Args:
            tokens: the answer so far; not to be changed.

        Returns:
            In CPU memory, bool `(vocab_size,)`, or int32 `(ceil(vocab_size / 32),)` with token `t` in bit `t % 32` of
            word `t // 32`, as xgrammar and llguidance write it; None: all tokens.
        """
        ...

    def accept(self, token: int) -> None:
        """The answer continues with `token`, one of those allowed."""
        ...

    @property
    def is_finished(self) -> bool:
        """The text is complete: the answer ends."""
        ...


@dataclass(frozen=True)
class SamplingParams:
    """The choice of each token from the model's logits, and the ends of the answer; the defaults are greedy.

    The order of the steps is vLLM's: token mask, `min_new_tokens`, `logit_bias`, `repetition_penalty`, frequency and
    presence penalties, temperature, `min_p`, `top_k`, `top_p` (each on what the one before it left, renormalised).
    Among equal logits the token with the lower id precedes.

    Attributes:
        temperature: the logits are divided by it; 0 (anything below 1e-5) takes the most likely token.
        top_p: the most likely tokens that together have at least this share of the probability (Holtzman et al. 2020).
        top_k: only so many most likely tokens; 0 and -1: all.
        min_p: only tokens with at least this share of the probability of the most likely one (Nguyen et al. 2024).
        seed: equal seeds draw equal random numbers for the n-th token of an answer, whatever else is computed with it;
            None: from the system's entropy.
        presence_penalty: subtracted from the logit of every token of the answer so far.
        frequency_penalty: the same for each time that the token is in the answer.
        repetition_penalty: positive logits of tokens of prompt and answer are divided by it, negative ones multiplied
            (Keskar et al. 2019, section 4.1); 1: none.
        logit_bias: added to logits, by token id.
        logprobs: log-probabilities of the chosen token and of so many most likely ones, of the model's own
            distribution, before any of the steps above; None: none, 0: of the chosen token only.
        stop: texts that end the answer and are not part of it.
        stop_token_ids: tokens that end the answer.
        ignore_eos: the model's end tokens are ordinary tokens.
        min_new_tokens: tokens before which no end token, stop token or stop text ends the answer.
        n: answers to the same prompt; the engine makes a request of each, see `for_choice`.
        make_mask: called without arguments for each answer; returns its `TokenMask`.

    Raises:
        ValueError: a value of another type or out of its range, by name.
    """

    temperature: Annotated[float, Range(0, 100)] = 0.0
    top_p: Annotated[float, Range(0, 1, above=True)] = 1.0
    top_k: Annotated[int, Range(-1, MAX_COUNT)] = 0
    min_p: Probability = 0.0
    seed: Annotated[int, Range(-(2**63), 2**63 - 1)] | None = None
    presence_penalty: Annotated[float, Range(-2, 2)] = 0.0
    frequency_penalty: Annotated[float, Range(-2, 2)] = 0.0
    repetition_penalty: Annotated[float, Range(0.01, 100)] = 1.0
    logit_bias: Annotated[Mapping[TokenId, Annotated[float, Range(-100, 100)]], Size(0, 1024)] = field(
        default_factory=dict, hash=False
    )
    logprobs: Annotated[int, Range(0, MAX_LOGPROBS)] | None = None
    stop: Annotated[tuple[Annotated[str, Size(1, 256)], ...], Size(0, 16)] = ()
    stop_token_ids: Annotated[tuple[TokenId, ...], Size(0, 256)] = ()
    ignore_eos: bool = False
    min_new_tokens: Annotated[int, Range(0, MAX_COUNT)] = 0
    n: Annotated[int, Range(1, 128)] = 1
    make_mask: Callable[[], TokenMask] | None = None

    def __post_init__(self) -> None:
        verify(self)
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))  # ours: the caller's may change

    @property
    def greedy(self) -> bool:
        """The most likely token is taken; nothing is drawn."""
        return self.temperature < GREEDY_BELOW

    @property
    def penalised(self) -> bool:
        """The logits depend on the tokens so far."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    def check_vocab(self, vocab_size: int) -> None:
        """Refuses token ids beyond the model's vocabulary.

        Raises:
            ValueError: an id of `logit_bias` or `stop_token_ids` is `vocab_size` or more.
        """
        for name, ids in (("logit_bias", self.logit_bias), ("stop_token_ids", self.stop_token_ids)):
            largest = max(ids, default=0)
            if largest >= vocab_size:
                raise ValueError(f"got token id {largest} in {name}; accepted: 0 to {vocab_size - 1}")

    def for_choice(self, index: int) -> SamplingParams:
        """The parameters of one of the `n` answers, each with its own random numbers; the first keeps the seed.

        Args:
            index: of the answer, from 0.

        Raises:
            ValueError: `index` is not below `n`.
        """
        if not 0 <= index < self.n:
            raise ValueError(f"got choice {index} of n={self.n}; accepted: 0 to {self.n - 1}")
        seed = self.seed
        if seed is not None and index:
            seed = random_bits(seed, index, b"choice") >> 1
        return replace(self, n=1, seed=seed)


def random_bits(seed: int, index: int, purpose: bytes) -> int:
    """64 random bits that depend on the arguments only: BLAKE2b as a counter-based generator (Salmon et al. 2011).

    Args:
        seed: from -2^63 to 2^63 - 1.
        index: of the draw, from 0.
        purpose: separates the numbers of different uses, up to 16 bytes.
    """
    counter = index.to_bytes(8, "little")
    digest = hashlib.blake2b(counter, digest_size=8, key=seed.to_bytes(8, "little", signed=True), person=purpose)
    return int.from_bytes(digest.digest(), "little")
