"""Answers under kvpress. Run by path in a Python with kvpress and without tenure; see `sweep_kvpress`.

`python kvpress_answers.py JOB`: JOB is JSON with `model` (a folder), `threads` and `cells`, a list of [press, share of
the entries that stay]. After "ready", every line read is JSON with `context_ids`, `question_ids`, `answer_ids`, `limit`
(of generated tokens) and `ending` (ids that end a generation); the line written for it is a JSON list of `{ids, kl,
top1, entries, bytes, seconds}`, for the full cache and then for each cell: the greedy answer, KL to the full cache and
agreement with it over question and gold answer, what is kept and held after the context, and what reading that and
compressing it took. Of a case that fails it is `{"error": …}`.

A press does not change what the layers compute while they read a context, so each context is read once, and each press
is given what its hooks would have seen.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Reading:
    """A context that has been read: its tokens, their cache, the hooks' arguments by layer, and what that took."""

    count: int
    cache: Any
    calls: list[tuple[Any, dict[str, Any], Any]] = field(default_factory=list)
    seconds: float = 0.0


class Answers:
    """A model that reads contexts under presses.

    kvpress's heads with budgets of their own evict nothing: the entries are masked until the mask is taken off.
    """

    def __init__(self, job: dict[str, Any]) -> None:
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        sys.path.append(str(Path(__file__).parent))  # python -I leaves it out; last, so that it hides nothing
        from kvpress_kept import presses  # pyright: ignore[reportMissingImports]

        logging.disable_progress_bar()
        torch.set_num_threads(job["threads"])
        torch.set_grad_enabled(False)
        self.cells = [(name, presses()[name], share) for name, share in job["cells"]]
        self.model: Any = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32).eval()

    def answer(self, case: dict[str, Any]) -> list[dict[str, Any]]:
        """Results of the full cache on a case, then of all cells."""
        results: list[dict[str, Any]] = []
        whole, readings = None, {}
        for name, press, share in [("full", None, 1.0), *self.cells]:
            # Only this one needs the attention weights, only AdaKV's refuse to have them.
            way = "eager" if name == "observed_attention" else "sdpa"
            self.model.set_attn_implementation(way)
            if way not in readings:
                readings[way] = self._read(case)
            start = time.perf_counter()
            cache = self._pressed(readings[way], press, share)
            seconds = readings[way].seconds + time.perf_counter() - start
            held = sum(layer.keys.shape[1] * layer.keys.shape[2] for layer in cache.layers) - self._masked()
            nbytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
            logits, ids = self._asked(case, cache)
            whole = logits if whole is None else whole
            log_p, log_q = whole.double().log_softmax(-1), logits.double().log_softmax(-1)
            results.append(
                {
                    "ids": ids,
                    "kl": float((log_p.exp() * (log_p - log_q)).sum(-1).mean().clamp(min=0.0)),
                    "top1": float((whole.argmax(-1) == logits.argmax(-1)).double().mean()),
                    "entries": held,
                    "bytes": nbytes,
                    "seconds": seconds,
                }
            )
            self._unmask()
        return results

    def _read(self, case: dict[str, Any]) -> Reading:
        """Reads the context and keeps what a press's hooks are given."""
        import torch
        from transformers import DynamicCache

        reading = Reading(len(case["context_ids"]), DynamicCache())

        def keep(module: Any, _: Any, kwargs: dict[str, Any], output: Any) -> None:
            reading.calls.append((module, kwargs, output))

        start = time.perf_counter()
        hooks = [layer.self_attn.register_forward_hook(keep, with_kwargs=True) for layer in self.model.model.layers]
        self.model(torch.tensor([case["context_ids"]]), past_key_values=reading.cache, logits_to_keep=1)
        for hook in hooks:
            hook.remove()
        reading.seconds = time.perf_counter() - start
        return reading

    def _pressed(self, reading: Reading, press: Any, share: float) -> Any:
        """The cache after the context, as `press` leaves it."""
        from transformers import DynamicCache

        cache = DynamicCache()
        for index, layer in enumerate(reading.cache.layers):
            cache.update(layer.keys, layer.values, index)
        if press is None:
            return cache
        # Presses keep int(n * (1 - ratio)), which rounding must not make one less.
        press.compression_ratio = 1 - (int(reading.count * share + 1e-6) + 0.5) / reading.count
        with press(self.model):
            for module, kwargs, output in reading.calls:
                for hook in module._forward_hooks.values():
                    hook(module, (), kwargs | {"past_key_values": cache}, output)
        return cache

    def _asked(self, case: dict[str, Any], cache: Any) -> tuple[Any, list[int]]:
        """Logits `(question + gold answer, vocab)`, and the greedy answer."""
        import torch

        place = len(case["context_ids"])
        question = self._forward(cache, case["question_ids"], place)
        place += len(case["question_ids"])
        asked = [(layer.keys, layer.values) for layer in cache.layers]
        gold = self._forward(cache, case["answer_ids"], place)
        for layer, (keys, values) in zip(cache.layers, asked, strict=True):
            layer.keys, layer.values = keys, values
        ids = [int(question[-1].argmax())]
        while ids[-1] not in case["ending"] and len(ids) < case["limit"]:
            ids.append(int(self._forward(cache, ids[-1:], place + len(ids) - 1)[-1].argmax()))
        return torch.cat([question, gold]), ids

    def _forward(self, cache: Any, ids: list[int], place: int) -> Any:
        import torch

        positions = torch.arange(place, place + len(ids)).unsqueeze(0)
        return self.model(torch.tensor([ids]), past_key_values=cache, position_ids=positions).logits[0]

    def _masked(self) -> int:
        masks = [getattr(layer.self_attn, "masked_key_indices", None) for layer in self.model.model.layers]
        return sum(len(mask[0]) for mask in masks if mask is not None)

    def _unmask(self) -> None:
        for layer in self.model.model.layers:
            if getattr(layer.self_attn, "masked_key_indices", None) is not None:
                layer.self_attn.masked_key_indices = None


def main(job: dict[str, Any]) -> None:
    answers = Answers(job)
    print("ready", flush=True)
    for line in sys.stdin:
        try:
            answer: Any = answers.answer(json.loads(line))
        except Exception as error:  # of a press, which must not stop the cases that follow
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
