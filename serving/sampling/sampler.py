"""Chooses the next tokens of a batch: one computation on the logits' device, one copy from it.

The filters of `SamplingParams` keep a prefix of the tokens ranked by probability, so that only the sorted values are
needed, and a token is drawn by inverting the cumulative distribution at one random number of its row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .params import MAX_LOGPROBS, FinishedBy, SamplingParams
from .row import SamplerRow

_BLOCK = 128  # columns whose weights are summed at once when a cumulative sum is searched
_BELOW_ONE = 1 - 2.0**-52


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
        logits = logits.detach()
        errors: list[Exception | None] = [None] * len(rows)
        if all(row.plain for row in rows):
            order, logged = range(len(rows)), []
            tokens, top = _largest(logits)
            packed = [tokens.int(), _bits(top), _bits(top)]
        else:
            masks = self._masks(rows, errors)
            order = sorted(range(len(rows)), key=lambda place: _kind(rows[place].params))
            logged = [place for place in order if rows[place].params.logprobs is not None]
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
            order: rows with filters, then those drawn without, then greedy ones.
            logged: rows with log-probabilities, in that order.

        Returns:
            int32 vectors: tokens, largest logit of the model and largest changed logit of each row in `order`; with
            `logged`, what `_logprobs` returns.
        """
        device, ordered = logits.device, [rows[place] for place in order]
        scores = self._buffer("scores", len(rows), device)
        if list(order) == list(range(len(rows))):
            scores[:, : self.vocab_size].copy_(logits)
        else:
            scores[:, : self.vocab_size].copy_(logits.index_select(0, _upload(np.array(order), device)))
        scores[:, self.vocab_size :] = -torch.inf
        model_top = scores.amax(-1)
        self._mask(scores, {order.index(place): words for place, words in masks.items()})
        _change(scores, ordered)
        tokens, top = _largest(scores)
        drawn = sum(not row.params.greedy for row in ordered)
        if drawn:
            tokens[:drawn] = self._draw(scores[:drawn], top[:drawn], ordered[:drawn])
        packed = [tokens.int(), _bits(model_top), _bits(top)]
        if logged:
            places = {place: number for number, place in enumerate(order)}
            of = _upload(np.array([[place, places[place]] for place in logged]).T.copy(), device)
            packed += _logprobs(logits.index_select(0, of[0]).float(), tokens[of[1]])
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
        """Draws tokens from `scores`, which are overwritten; rows with `top_k` or `top_p` are first."""
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
        temperature, farthest, top_p, top_k, uniform = _upload(values, scores.device)
        # Distances from the largest score: the probability is proportional to exp(-distance).
        distances = scores.sub_(top[:, None]).div_(-temperature.float()[:, None])
        if any(one.min_p for one in options):
            distances.masked_fill_(distances > farthest.float()[:, None], torch.inf)
        ranked = sum(_kind(one) == 0 for one in options)
        tokens = []
        if ranked:
            k = top_k[:ranked] if any(one.top_k > 0 for one in options[:ranked]) else None
            tokens.append(self._draw_ranked(distances[:ranked], k, top_p[:ranked], uniform[:ranked]))
        if ranked < len(rows):
            sums = _CumulativeSums(distances[ranked:].neg_().exp_())
            tokens.append(sums.find(uniform[ranked:] * sums.total, right=True)[0])
        return torch.cat(tokens).clamp_(max=self.vocab_size - 1)  # a row that isn't finite may give any place

    def _draw_ranked(
        self, distances: torch.Tensor, top_k: torch.Tensor | None, top_p: torch.Tensor, uniform: torch.Tensor
    ) -> torch.Tensor:
        """Draws from the first `top_k` tokens in order of `distances`, of these from the nucleus of share `top_p`."""
        near = self._sorted(distances)
        if top_k is not None:
            near.masked_fill_(torch.arange(self._width, device=near.device) >= top_k[:, None], torch.inf)
        sums = _CumulativeSums(torch.neg(near, out=self._buffer("weights", len(near), near.device)).exp_())
        end, kept = sums.find(top_p * sums.total, right=False)
        place = torch.minimum(sums.find(uniform * kept, right=True)[0], end)
        distance = near.gather(1, place[:, None])
        # Of the tokens at this distance the one with as many before it as in the sorted order.
        before = place - torch.searchsorted(near, distance).squeeze(1)
        return _CumulativeSums(distances.eq_(distance)).find(before.double(), right=True)[0]

    def _sorted(self, distances: torch.Tensor) -> torch.Tensor:
        """A copy of each row in rising order."""
        if distances.device.type != "cpu":
            return distances.sort(-1).values
        near = self._buffer("near", len(distances), distances.device).copy_(distances)
        near.numpy().sort(axis=-1)  # vectorised, and without indices: 20 to 30 times faster than torch's here
        return near

    def _buffer(self, name: str, rows: int, device: torch.device) -> torch.Tensor:
        """Memory for `(rows, width)` float32; the sampler owns it and uses it again at the next step.

        Fresh memory would cost more than the computation: every page of it is first cleared by the system.
        """
        found = self._buffers.get((name, device))
        if found is None or len(found) < rows:
            with torch.inference_mode(False):  # may be written in either mode
                found = torch.empty(rows, self._width, dtype=torch.float32, device=device)
            self._buffers[name, device] = found
        return found[:rows]

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
            for number, place in enumerate(logged):
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
        before = torch.nn.functional.pad(self._blocks, (1, 0)).gather(1, block)
        weights = self._weights.gather(1, block[:, :, None].expand(-1, -1, _BLOCK)).squeeze(1)
        inside = weights.double().cumsum(-1)
        target = torch.minimum(target - before, inside[:, -1:] * _BELOW_ONE)
        place = torch.searchsorted(inside, target, right=right).clamp_(max=_BLOCK - 1)
        return (block * _BLOCK + place).squeeze(1), (before + inside.gather(1, place)).squeeze(1)


def _kind(params: SamplingParams) -> int:
    """0: drawn from the ranked tokens, 1: drawn from all, 2: greedy."""
    if params.greedy:
        return 2
    return 0 if params.top_k > 0 or params.top_p < 1 else 1


def _largest(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Place and value of each row's largest score, the first of equal ones; the value is NaN if any score is."""
    if scores.device.type != "cpu":
        places = scores.argmax(-1)
    elif scores.dtype is torch.float32:
        places = torch.from_numpy(scores.numpy().argmax(-1))  # 20 times faster than torch's here
    else:
        top = scores.amax(-1, keepdim=True)
        return torch.from_numpy((scores == top).numpy().argmax(-1)), top.squeeze(1)
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


def _logprobs(logits: torch.Tensor, tokens: torch.Tensor) -> list[torch.Tensor]:
    """Per row the log-probability of its token, those of the most likely ones, and their ids; as one int32 vector."""
    top = logits.topk(min(MAX_LOGPROBS, logits.shape[1]))
    chosen = torch.cat([logits.gather(1, tokens[:, None]), top.values], dim=1)
    return [torch.cat([_bits(chosen - logits.logsumexp(-1, keepdim=True)), top.indices.int()], dim=1).view(-1)]


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
