"""Chooses the next tokens of a batch: one computation on the logits' device, one copy from it.

The filters of `SamplingParams` keep a prefix of the tokens ranked by probability, so that only the sorted values are
needed, and a token is drawn by inverting the cumulative distribution at one random number of its row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import groupby
from typing import Any

import numpy as np
import torch

from .params import MAX_LOGPROBS, FinishedBy, SamplingParams
from .row import SamplerRow

_BLOCK = 128  # columns whose weights are summed at once when a cumulative sum is searched
_BELOW_ONE = 1 - 2.0**-52
_FEW = 256  # the largest top_k for which a selection is faster than a sort


class _Method(IntEnum):
    """How a row's token is found; rows are computed in this order."""

    TOP_K = 0  # drawn from the few nearest
    RANKED = 1  # drawn from the first of all in order of probability
    ANY = 2  # drawn from all
    GREEDY = 3

    @classmethod
    def of(cls, params: SamplingParams) -> _Method:
        if params.greedy:
            return cls.GREEDY
        if 0 < params.top_k <= _FEW:
            return cls.TOP_K
        return cls.RANKED if params.top_k > 0 or params.top_p < 1 else cls.ANY


class SamplingError(RuntimeError):
    """No token can be chosen for a row: its logits are not finite, or none of its tokens is allowed."""


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities (natural) of a token in the model's own distribution.

    Attributes:
        logprob: of the chosen token.
        top_ids: the `SamplingParams.logprobs` most likely tokens, in falling order.
        top_logprobs: their log-probabilities.
    """

    logprob: float
    top_ids: tuple[int, ...]
    top_logprobs: tuple[float, ...]


@dataclass(frozen=True)
class SampledTokens:
    """The result of a step, an entry for each row in each list.

    Attributes:
        tokens: the chosen tokens; -1 where there is an error.
        finished: how the row's answer has ended with that token; None: it continues.
        logprobs: None where the row asks for none.
        errors: why a row has failed; its request cannot be continued. None: it has not.
    """

    tokens: list[int]
    finished: list[FinishedBy | None]
    logprobs: list[TokenLogprobs | None]
    errors: list[Exception | None]


class Sampler:
    """Samples for a model; used by one thread at a time, as its buffers are kept from step to step.

    The result for a row does not depend on the other rows or on their order.

    Args:
        vocab_size: width of the logits.
        eos_token_ids: the model's end tokens.
    """

    def __init__(self, vocab_size: int, eos_token_ids: Sequence[int] = ()) -> None:
        self.vocab_size, self.eos_token_ids = vocab_size, tuple(eos_token_ids)
        self._width = -(-vocab_size // _BLOCK) * _BLOCK
        self._buffers: dict[tuple[str, torch.device], torch.Tensor] = {}

    def new_row(self, params: SamplingParams, prompt: Any, output: Sequence[int] = ()) -> SamplerRow:
        """The state of a new answer, or of one that is resumed after `output`; raises as `SamplerRow` does.

        Args:
            prompt: token ids, a list, an array or a tensor in CPU memory.
        """
        return SamplerRow(params, self.vocab_size, self.eos_token_ids, prompt, output)

    @torch.no_grad()
    def sample(self, logits: torch.Tensor, rows: Sequence[SamplerRow]) -> SampledTokens:
        """Chooses a token for each row and appends it to the row's answer.

        A row that fails has its error in the result; the others are as without it.

        Args:
            logits: `(rows, vocab_size)` of a floating-point dtype; not changed. Computed with in float32.
            rows: in the logits' order, each once.

        Raises:
            ValueError: the shape or dtype of `logits` is another.
        """
        if logits.shape != (len(rows), self.vocab_size) or not logits.is_floating_point():
            raise ValueError(
                f"got logits of shape {tuple(logits.shape)} and {logits.dtype}; accepted: ({len(rows)}, "
                f"{self.vocab_size}) of a floating-point dtype"
            )
        errors: list[Exception | None] = [None] * len(rows)
        if all(row.plain for row in rows):
            order, logged = range(len(rows)), []
            tokens, top = _largest(self._float(logits))
            packed = [tokens.int(), _bits(top), _bits(top)]
        else:
            masks = self._masks(rows, errors)
            order = sorted(range(len(rows)), key=lambda place: _Method.of(rows[place].params))
            logged = [number for number, place in enumerate(order) if rows[place].params.logprobs is not None]
            packed = self._choose(logits, rows, order, logged, masks)
        host = torch.cat(packed).cpu().numpy()  # the one copy; before it, the host has not waited for the device
        return self._append(host, rows, order, logged, errors)

    def _masks(self, rows: Sequence[SamplerRow], errors: list[Exception | None]) -> dict[int, np.ndarray]:
        """Token masks by row, as words of 32 bits; a row whose mask raises gets its error."""
        found = {}
        for place, row in enumerate(rows):
            if row.mask is None:
                continue
            try:
                allowed = row.mask.allowed(row.tokens)
                if allowed is not None:
                    found[place] = _mask_words(allowed, self.vocab_size)
            except Exception as error:
                errors[place] = error
        return found

    def _choose(
        self,
        logits: torch.Tensor,
        rows: Sequence[SamplerRow],
        order: Sequence[int],
        logged: Sequence[int],
        masks: dict[int, np.ndarray],
    ) -> list[torch.Tensor]:
        """Chooses tokens on the device.

        Args:
            order: the rows in the order of their methods.
            logged: places in `order` of rows with log-probabilities.

        Returns:
            int32 vectors: tokens, largest logit of the model and largest changed logit of each row in `order`; with
            `logged`, what `_logprobs` returns.
        """
        device, ordered = logits.device, [rows[place] for place in order]
        if list(order) != list(range(len(rows))):
            logits = logits.index_select(0, _upload(np.array(order), device))
        scores = self._buffer("scores", (len(rows), self._width), device)
        scores[:, : self.vocab_size].copy_(logits)
        scores[:, self.vocab_size :] = -torch.inf
        model_top = scores.amax(-1)
        self._mask(scores, {number: masks[place] for number, place in enumerate(order) if place in masks})
        _change(scores, ordered)
        tokens, top = _largest(scores)
        drawn = sum(not row.params.greedy for row in ordered)
        if drawn:
            tokens[:drawn] = self._draw(scores[:drawn], top[:drawn], ordered[:drawn])
        packed = [tokens.int(), _bits(model_top), _bits(top)]
        if logged:
            if len(logged) < len(rows):
                places = _upload(np.array(logged), device)
                logits, tokens = logits.index_select(0, places), tokens[places]
            packed.append(self._logprobs(logits, tokens))
        return packed

    def _mask(self, scores: torch.Tensor, masks: dict[int, np.ndarray]) -> None:
        """Sets the tokens that are not allowed to -inf."""
        if not masks:
            return
        device = scores.device
        places = _upload(np.array(list(masks)), device)
        words = _upload(np.stack(list(masks.values())), device)
        bits = words.unsqueeze(-1) >> torch.arange(32, dtype=torch.int32, device=device)
        banned = (bits & 1).eq(0).flatten(1)[:, : self.vocab_size]
        changed = scores.index_select(0, places)
        changed[:, : self.vocab_size].masked_fill_(banned, -torch.inf)
        scores.index_copy_(0, places, changed)

    def _draw(self, scores: torch.Tensor, top: torch.Tensor, rows: Sequence[SamplerRow]) -> torch.Tensor:
        """Draws tokens from `scores`, which are overwritten.

        Args:
            scores: `(rows, width)` float32; `top`, `(rows,)`, is the largest of each row.
            rows: in the order of their methods.
        """
        options = [row.params for row in rows]
        with np.errstate(divide="ignore"):
            values = np.array(
                [
                    [one.temperature for one in options],
                    -np.log([one.min_p for one in options]),
                    [one.top_p for one in options],
                    [one.top_k if one.top_k > 0 else self.vocab_size for one in options],
                    [row.uniform() for row in rows],
                ]
            )
        values = _upload(values, scores.device)
        # Distances from the largest score: the probability is proportional to exp(-distance).
        distances = scores.sub_(top[:, None]).div_(-values[0].float()[:, None])
        tokens, begin = [], 0
        for method, group in groupby(options, _Method.of):
            group = list(group)
            end = begin + len(group)
            farthest, top_p, top_k, uniform = values[1:, begin:end]
            if method is _Method.ANY:
                limit = farthest if any(one.min_p for one in group) else None
                tokens.append(_draw_any(distances[begin:end], limit, uniform))
            else:
                few = max(one.top_k for one in group) if method is _Method.TOP_K else None
                near = self._nearest(distances[begin:end], few)
                weights = torch.neg(near, out=self._buffer("weights", near.shape, near.device)).exp_()
                tokens.append(_draw_ranked(distances[begin:end], near, weights, farthest, top_p, top_k, uniform))
            begin = end
        return torch.cat(tokens).clamp_(max=self.vocab_size - 1)  # a row that isn't finite may give any place

    def _nearest(self, distances: torch.Tensor, few: int | None) -> torch.Tensor:
        """Each row in rising order, or the `few` least distances of it; filled up with infinity to whole blocks."""
        rows = len(distances)
        if few is not None:
            few = min(few, self.vocab_size)
            near = self._buffer("near", (rows, -(-few // _BLOCK) * _BLOCK), distances.device)
            near[:, :few] = distances.topk(few, largest=False).values
            near[:, few:] = torch.inf
        elif distances.device.type == "cpu":
            near = self._buffer("near", distances.shape, distances.device).copy_(distances)
            near.numpy().sort(axis=-1)  # vectorised, and without indices: 20 to 30 times faster than torch's here
        else:
            near = distances.sort(-1).values
        return near

    def _logprobs(self, logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Per row the log-probability of its token, those of the most likely ones, and their ids; one int32 vector."""
        values = self._buffer("logprobs", logits.shape, logits.device).copy_(logits)
        top = values.topk(min(MAX_LOGPROBS, self.vocab_size))
        chosen = torch.cat([values.gather(1, tokens[:, None]), top.values], dim=1)
        largest = top.values[:, :1]
        total = values.sub_(largest).exp_().sum(-1, keepdim=True).log_().add_(largest)
        return torch.cat([_bits(chosen - total), top.indices.int()], dim=1).view(-1)

    def _float(self, logits: torch.Tensor) -> torch.Tensor:
        if logits.dtype is torch.float32:
            return logits
        return self._buffer("scores", logits.shape, logits.device).copy_(logits)

    def _buffer(self, name: str, shape: Sequence[int], device: torch.device) -> torch.Tensor:
        """Memory for a float32 tensor, `(rows, columns)`; the sampler owns it and uses it again at the next step.

        Fresh memory would cost more than the computation: every page of it is first cleared by the system.
        """
        rows, columns = shape
        found = self._buffers.get((name, device))
        if found is None or len(found) < rows * columns:
            with torch.inference_mode(False):  # may be written in either mode
                found = torch.empty(rows * columns, dtype=torch.float32, device=device)
            self._buffers[name, device] = found
        return found[: rows * columns].view(rows, columns)

    def _append(
        self,
        host: np.ndarray,
        rows: Sequence[SamplerRow],
        order: Sequence[int],
        logged: Sequence[int],
        errors: list[Exception | None],
    ) -> SampledTokens:
        """Appends the tokens to their rows and checks each row."""
        count = len(rows)
        result = SampledTokens([-1] * count, [None] * count, [None] * count, errors)
        columns = host[: 3 * count].reshape(3, count)
        tokens, model_top, top = columns[0].tolist(), columns[1].view(np.float32), columns[2].view(np.float32)
        finite, possible = np.isfinite(model_top).tolist(), np.isfinite(top).tolist()
        for number, place in enumerate(order):
            row = rows[place]
            if errors[place] is not None:
                continue
            if not (finite[number] and possible[number]):
                errors[place] = _not_finite(row, float(model_top[number]), float(top[number]))
                continue
            try:
                result.finished[place] = row.append(tokens[number])
            except Exception as error:
                errors[place] = error
                continue
            result.tokens[place] = tokens[number]
        if logged:
            width = min(MAX_LOGPROBS, self.vocab_size)
            table = host[3 * count :].reshape(len(logged), 1 + 2 * width)
            ids, values = table[:, 1 + width :].tolist(), table[:, : 1 + width].view(np.float32).tolist()
            for number, place in enumerate(order[one] for one in logged):
                wanted = min(rows[place].params.logprobs or 0, width)
                if errors[place] is None:
                    top_ids, top_logprobs = tuple(ids[number][:wanted]), tuple(values[number][1 : 1 + wanted])
                    result.logprobs[place] = TokenLogprobs(values[number][0], top_ids, top_logprobs)
        return result


class _CumulativeSums:
    """The cumulative sums of each row of `weights`, searched by blocks without computing all of them.

    Args:
        weights: float32 `(rows, width)`, not negative; width a multiple of the block size.

    Attributes:
        total: float64 `(rows,)`.
    """

    def __init__(self, weights: torch.Tensor) -> None:
        self._weights = weights.view(len(weights), -1, _BLOCK)
        self._blocks = self._weights.sum(-1).double().cumsum(-1)
        self.total = self._blocks[:, -1]

    def find(self, target: torch.Tensor, right: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """The first places where the sum is `target`, float64 `(rows,)`, or more; with `right`, more.

        A place has a positive weight, also where rounding leaves no sum that is large enough.

        Returns:
            int64 and float64 `(rows,)`: the places, and the sums up to and with them.
        """
        target = target[:, None]
        block = torch.searchsorted(self._blocks, target, right=right).clamp_(max=self._blocks.shape[1] - 1)
        before, inside = self._inside(block)
        target = torch.minimum(target - before, inside[:, -1:] * _BELOW_ONE)
        place = torch.searchsorted(inside, target, right=right).clamp_(max=_BLOCK - 1)
        return (block * _BLOCK + place).squeeze(1), (before + inside.gather(1, place)).squeeze(1)

    def at(self, place: torch.Tensor) -> torch.Tensor:
        """The sums, float64 `(rows,)`, up to and with a place of each row, int64 `(rows,)`."""
        before, inside = self._inside(place[:, None] // _BLOCK)
        return (before + inside.gather(1, place[:, None] % _BLOCK)).squeeze(1)

    def _inside(self, block: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The sum before a block of each row, `(rows, 1)`, and the cumulative sums inside it, `(rows, _BLOCK)`."""
        before = torch.nn.functional.pad(self._blocks, (1, 0)).gather(1, block)
        weights = self._weights.gather(1, block[:, :, None].expand(-1, -1, _BLOCK)).squeeze(1)
        return before, weights.double().cumsum(-1)


def _draw_any(distances: torch.Tensor, farthest: torch.Tensor | None, uniform: torch.Tensor) -> torch.Tensor:
    """Draws from all tokens, or those that are no farther; `distances` are overwritten."""
    if farthest is not None:
        distances.masked_fill_(distances > farthest.float()[:, None], torch.inf)
    sums = _CumulativeSums(distances.neg_().exp_())
    return sums.find(uniform * sums.total, right=True)[0]


def _draw_ranked(
    distances: torch.Tensor,
    near: torch.Tensor,
    weights: torch.Tensor,
    farthest: torch.Tensor,
    top_p: torch.Tensor,
    top_k: torch.Tensor,
    uniform: torch.Tensor,
) -> torch.Tensor:
    """Draws from the nucleus of share `top_p` of the `top_k` nearest tokens that are no farther than `farthest`.

    Args:
        distances: `(rows, width)`, of all tokens; overwritten.
        near, weights: `(rows, width of these)`, the least distances in rising order, and `exp(-near)`.
        farthest, top_p, top_k, uniform: float64 `(rows,)`.
    """
    within = torch.searchsorted(near, farthest.float()[:, None], right=True).squeeze(1)
    last = torch.minimum(within, top_k.long()).sub_(1).clamp_(min=0)
    sums = _CumulativeSums(weights)
    mass = sums.at(last)
    end, kept = sums.find(top_p * mass, right=False)
    # Sums of a block and inside it are rounded differently; neither may lead past the end.
    end, kept = torch.minimum(end, last), torch.minimum(kept, mass)
    place = torch.minimum(sums.find(uniform * kept, right=True)[0], end)[:, None]
    distance = near.gather(1, place)
    # Of the tokens at this distance the one with as many before it as in the sorted order.
    before = (place - torch.searchsorted(near, distance)).squeeze(1)
    return _CumulativeSums(distances.eq_(distance)).find(before.double(), right=True)[0]


def _largest(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Place and value of each row's largest score, of equal ones the first; scores are float32, NaN is the largest."""
    on_cpu = scores.device.type == "cpu"  # there numpy is 20 times faster
    places = torch.from_numpy(scores.numpy().argmax(-1)) if on_cpu else scores.argmax(-1)
    return places, scores.gather(1, places[:, None]).squeeze(1)


def _change(scores: torch.Tensor, rows: Sequence[SamplerRow]) -> None:
    """Applies the rows' `LogitChanges`."""
    found = [(number, row.changes) for number, row in enumerate(rows) if row.changes is not None]
    if not found:
        return
    ids = np.concatenate([changes.ids + number * scores.shape[1] for number, changes in found])
    values = np.concatenate([changes.values for _, changes in found], axis=1)
    places, (bias, factor, penalty) = _upload(ids, scores.device), _upload(values, scores.device)
    flat = scores.view(-1)
    changed = flat.index_select(0, places).add_(bias)
    flat.index_copy_(0, places, torch.where(changed > 0, changed / factor, changed * factor).sub_(penalty))


def _bits(values: torch.Tensor) -> torch.Tensor:
    """The bits of float32 values as int32, to be packed with integers."""
    return values.float().view(torch.int32)


def _mask_words(allowed: torch.Tensor, vocab_size: int) -> np.ndarray:
    """A token mask as int32 words.

    Raises:
        ValueError: it is not of a form that `TokenMask.allowed` may return.
    """
    words = -(-vocab_size // 32)
    if isinstance(allowed, torch.Tensor) and allowed.device.type == "cpu":
        if allowed.dtype is torch.bool and allowed.shape == (vocab_size,):
            packed = np.zeros(4 * words, np.uint8)
            packed[: -(-vocab_size // 8)] = np.packbits(allowed.numpy(), bitorder="little")
            return packed.view("<i4")
        if allowed.dtype is torch.int32 and allowed.shape == (words,):
            return allowed.numpy()
    given = f"{allowed.dtype} {tuple(allowed.shape)} on {allowed.device}" if isinstance(allowed, torch.Tensor) else None
    raise ValueError(
        f"got a token mask of {given or type(allowed).__name__}; accepted: torch.bool ({vocab_size},) or torch.int32 "
        f"({words},) in CPU memory"
    )


def _not_finite(row: SamplerRow, model_top: float, top: float) -> SamplingError:
    place = f"token {len(row.tokens) + 1} of the answer"
    if np.isfinite(model_top):
        return SamplingError(
            f"no token is left for {place}: the token mask, logit_bias and min_new_tokens exclude all of them"
            if top < 0
            else f"got a largest logit of {top} with logit_bias and penalties for {place}; accepted: a finite one"
        )
    return SamplingError(f"the model's largest logit is {model_top} for {place}; accepted: a finite one")


def _upload(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """A copy of an array on the device, for which the host does not wait."""
    tensor = torch.from_numpy(values)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
