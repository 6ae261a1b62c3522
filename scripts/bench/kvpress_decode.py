"""Decoding under kvpress. Run by path in a Python with kvpress and without tenure; see `bench_decode`.

`python kvpress_decode.py JOB`: JOB is JSON with `model` (a folder), `prompt` (token ids), `share` (of the entries that
stay), `tokens`, `dtype` (of decoding; the prompt is in float32) and `threads`. Compresses the prompt with AdaKV
over SnapKV, then decodes `tokens` tokens for every line it reads, takes them back, and answers with the seconds.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any


def main(job: dict[str, Any]) -> None:
    import kvpress  # pyright: ignore[reportMissingImports]
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(job["threads"])
    model: Any = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32).eval()
    prompt = torch.tensor([job["prompt"]])
    cache: Any = DynamicCache()
    with torch.no_grad():
        with kvpress.AdaKVPress(kvpress.SnapKVPress(compression_ratio=1 - job["share"]))(model):
            model(prompt, past_key_values=cache, logits_to_keep=1)
        kind = getattr(torch, job["dtype"])
        model.to(kind)
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys.to(kind), layer.values.to(kind)
        print("ready", flush=True)
        for _ in sys.stdin:
            start = time.perf_counter()
            token = prompt[:, -1:]
            for _ in range(job["tokens"]):
                token = model(token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
            print(time.perf_counter() - start, flush=True)
            cache.crop(cache.get_seq_length() - job["tokens"])


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
