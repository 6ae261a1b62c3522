"""The example of docs/guides/serve-agents.md on sampling runs, on a tiny model."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models

ROOT = Path(__file__).parents[3]


def test_the_example_on_sampling_runs(tiny_llama) -> None:
    text = (ROOT / "docs" / "guides" / "serve-agents.md").read_text()
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "StopChecker(" in block]
    tokenizer = Tokenizer(models.WordLevel({f"w{number} ": number for number in range(128)}, unk_token="w0 "))
    tokenizer.decoder = decoders.Fuse()
    scopes = [{"model": tiny_llama, "tokenizer": tokenizer, "prompt": [1, 5, 9], "torch": torch} for _ in range(2)]
    for scope in scopes:
        exec(code, scope)  # our own documentation
    for scope in scopes:
        tokens, finished = scope["row"].tokens, scope["finished"]
        assert 0 < len(tokens) <= 20 and (finished is None) == (len(tokens) == 20)
        assert scope["text"] == "".join(f"w{token} " for token in tokens)
    assert scopes[0]["row"].tokens == scopes[1]["row"].tokens
