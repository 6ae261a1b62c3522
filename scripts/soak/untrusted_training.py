"""Readers of training and of others' releases, as in `untrusted_readers`: records, states of runs, gates, chats."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from .reader import FEW, SOME, Reader, require

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ...retention import RetentionGates

CHATS = [
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": [{"type": "text", "text": "b"}]}]},
    {"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}], "tools": [{"name": "f"}]},
    {"prompt": "p", "completion": "q", "n": 1.5},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [
        {"type": "function", "function": {"name": "f", "arguments": "{\"x\": 1}"}}]}]},
]  # fmt: skip


def training_readers(gates: RetentionGates, model: PreTrainedModel, folder: Path) -> Iterator[Reader]:
    """All of them; valid inputs are made in `folder`."""
    yield from records(folder / "cache")
    yield from image_chats()
    yield from run_folders(gates, folder)
    yield from released(model)
    yield from conversations()


def records(cache: Path) -> Iterator[Reader]:
    """Chats and texts a line, encoded as `load_examples` does; and whole files of several kinds through it.

    Args:
        cache: a folder that `datasets` may fill; emptied after every attempt.
    """
    import zstandard
    from datasets import Dataset, config

    from ...training.data import encode_records, load_examples
    from ...training.records import LINE
    from .tiny_served import TEMPLATE, character_tokenizer

    tokenizer = character_tokenizer()
    shown = "{{ message.content }}{{ message.tool_calls | tojson if message.tool_calls }}"
    tokenizer.chat_template = TEMPLATE.replace("{{ message.content }}", shown)  # calls that it hid would be refused

    def encode(kind: str) -> Callable[[Path], None]:
        def read(folder: Path) -> None:
            lines = (folder / "a.jsonl").read_text(encoding="utf-8").splitlines()
            found = encode_records(
                {LINE: lines}, list(range(len(lines))), tokenizer=tokenizer, kind=kind, loss_on="completion",
                max_length=64, names={}, overlong="cut",
            )  # fmt: skip
            faults = [fault for fault in found["fault"] if fault]
            pairs = zip(found["input_ids"], found["loss_mask"], strict=True)
            require(all(len(ids) == len(mask) <= 64 for ids, mask in pairs), "masks of another length")
            if faults:
                raise ValueError(faults[0])

        return read

    lines = "\n".join(map(json.dumps, CHATS)).encode() + b"\n"
    yield Reader("records of chats", {"a.jsonl": lines}, encode("chat"), share=SOME)
    texts = b'{"text": "abc"}\n{"text": "x y z", "more": [1, null]}\n'
    yield Reader("records of texts", {"a.jsonl": texts}, encode("raw"), share=SOME)

    def load(name: str) -> Callable[[Path], None]:
        def read(folder: Path) -> None:
            config.HF_DATASETS_CACHE = cache
            try:
                source = load_examples(str(folder / name), tokenizer, max_length=64)
                require(len(source) > 0 and len(source[0].input_ids) > 1, "no examples")
            finally:
                shutil.rmtree(cache, ignore_errors=True)

        return read

    table = b"text,n\nabc,1\nxyz,2\n"
    yield Reader("records in json", {"a.json": json.dumps(CHATS[:1]).encode()}, load("a.json"), share=FEW / 10)
    yield Reader("records in csv", {"a.csv": table}, load("a.csv"), share=FEW / 10)
    for name, content in _columnar():
        yield Reader(f"records in {name}", {name: content}, load(name), share=FEW)
    Dataset.from_list([{"text": "abc"}, {"text": "xyz"}]).save_to_disk(cache / "saved")
    saved = {file.name: file.read_bytes() for file in (cache / "saved").iterdir()}
    yield Reader("records saved by datasets", saved, load(""), share=FEW)
    packed = zstandard.compress(lines)
    yield Reader("records in jsonl.zst", {"a.jsonl.zst": packed}, load("a.jsonl.zst"), share=FEW)


def _columnar() -> Iterator[tuple[str, bytes]]:
    """The same chats as a Parquet and as an Arrow file."""
    import pyarrow
    from pyarrow import parquet

    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 3
    table, packed = pyarrow.Table.from_pylist(rows), io.BytesIO()
    parquet.write_table(table, packed)
    yield "a.parquet", packed.getvalue()
    packed = io.BytesIO()
    with pyarrow.ipc.new_stream(packed, table.schema) as writer:
        writer.write_table(table)
    yield "a.arrow", packed.getvalue()


def image_chats() -> Iterator[Reader]:
    """Conversations with a picture, both of which vary."""
    from PIL import Image

    from ...training.image_chats import load_image_chats
    from .tiny_served import image_processor

    processor = image_processor()

    def read(folder: Path) -> None:
        source = load_image_chats(str(folder / "a.jsonl"), processor, max_length=500, prompt_share=0.5)
        example = source[0]
        require(len(example.input_ids) == len(example.loss_mask) <= 500, "masks of another length")
        require(0 <= example.prompt_tokens < len(example.input_ids), "a prompt longer than the example")

    parts = [{"type": "image", "path": "a.png"}, {"type": "text", "text": "b"}]
    chat = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "c"}]}
    for suffix, kind in (("png", "PNG"), ("jpg", "JPEG"), ("webp", "WEBP"), ("gif", "GIF"), ("bmp", "BMP")):
        picture = io.BytesIO()
        Image.linear_gradient("L").resize((20, 12)).save(picture, kind)
        line = json.dumps(chat).replace("a.png", f"a.{suffix}").encode()
        files = {"a.jsonl": line, f"a.{suffix}": picture.getvalue()}
        yield Reader(f"chats with a {suffix}", files, read, share=SOME / 5)


def run_folders(gates: RetentionGates, folder: Path) -> Iterator[Reader]:
    """A checkpoint of a training run, and its log."""
    import torch

    from ...training.run_log import METRICS_FILE, MetricsLog
    from ...training.run_state import RunState, apply_state, read_state, save_state

    def optimizer_of(found: RetentionGates) -> Any:
        return torch.optim.AdamW(found.parameters(), lr=1e-3)

    optimizer = optimizer_of(gates)
    for parameter in gates.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    now = RunState(3, {"steps": 10, "lengths": [64]}, {"data": "abc"}, (1,), {"kl": 0.5}, 2, 0.5)
    made = save_state(folder / "run", now, gates, optimizer)
    files = {path.name: path.read_bytes() for path in made.iterdir()}

    def read(at: Path) -> None:
        _, tensors = read_state(at, now)
        own = type(gates)(gates.config)
        apply_state(tensors, own, optimizer_of(own))
        require(all(one.isfinite().all() for one in own.state_dict().values()), "gates that are not finite")

    yield Reader("state of a training run", files, read, share=SOME)

    def read_log(at: Path) -> None:
        MetricsLog(at, SimpleNamespace(is_main_process=True), 2)  # type: ignore[arg-type]

    lines = b'{"step": 1, "loss": 1.5}\n{"step": 2, "loss": 1.25}\n'
    yield Reader("log of a training run", {METRICS_FILE: lines}, read_log, share=SOME)


def released(model: PreTrainedModel) -> Iterator[Reader]:
    """TRIM-KV's pickle of tensors, KVzap's safetensors, and Fast KVzip's pickle of layers."""
    import torch
    from safetensors.torch import save

    from ...retention.released_gates import TRIMKV_FILE, read_released_gates

    config = model.config
    layers, hidden, heads = range(config.num_hidden_layers), config.hidden_size, config.num_key_value_heads
    prefix = "model.layers.{}.self_attn.retention_gate."
    parts = {"linear1.weight": (4, hidden), "linear1.bias": (4,), "linear2.weight": (heads, 4), "bias": (heads,)}
    state = {prefix.format(layer) + name: torch.randn(*shape) for layer in layers for name, shape in parts.items()}
    packed = io.BytesIO()
    torch.save(state, packed)
    described = {"hidden_size": hidden, "num_key_value_heads": heads, "retention_gate_intermediate_size": 4}

    def read(at: Path, name: str = "") -> None:
        found = read_released_gates(at / name, model).gates
        value = found.log_beta(found.layer_indices[0], torch.randn(1, 3, hidden))
        require(value.isfinite().all(), "log β is not finite")

    files = {TRIMKV_FILE: packed.getvalue(), "config.json": json.dumps(described).encode()}
    yield Reader("released gates of TRIM-KV", files, read, share=SOME)
    shapes = {"0.weight": (4, hidden), "0.bias": (4,), "2.weight": (heads, 4), "2.bias": (heads,)}
    zap = {f"layers.{layer}.{name}": torch.randn(*shape) for layer in layers for name, shape in shapes.items()}
    yield Reader("released gates of KVzap", {"model.safetensors": save(zap, {"format": "pt"})}, read, share=SOME)
    groups, dim, sinks = config.num_attention_heads // heads, 4, 2
    shapes = {
        "q_proj.weight": (heads * groups * dim, hidden), "q_proj.bias": (heads * groups * dim,),
        "k_proj.weight": (heads * dim, hidden), "q_norm.weight": (dim,), "k_norm.weight": (dim,),
        "k_base": (heads, 1, sinks, dim), "b": (heads, 1, groups),
    }  # fmt: skip
    packed = io.BytesIO()
    torch.save({"module": [{name: torch.randn(*shape) for name, shape in shapes.items()} for _ in layers]}, packed)
    yield Reader("released gates of Fast KVzip", {"q2.pt": packed.getvalue()}, lambda at: read(at, "q2.pt"), share=SOME)


def conversations() -> Iterator[Reader]:
    """Released files of several questions on one context."""
    from ...eval.turns.readers import read_conversations

    def read(name: str) -> Callable[[Path], None]:
        def all_texts(folder: Path) -> None:
            for one in read_conversations(folder / name):
                texts = [one.context, *(turn.question for turn in one.turns)]
                require(all(isinstance(text, str) for text in texts), "texts that are none")

        return all_texts

    kv = [{"id": 1, "context": "c", "multi_turns": [{"input": "q", "answer": "a"}, {"input": "r", "answer": ["b"]}]}]
    memory = [{
        "question_id": "q1", "question_type": "single", "question": "q", "question_date": "2023/05/01", "answer": "a",
        "haystack_dates": ["2023/04/01"], "haystack_sessions": [[{"role": "user", "content": "x"}]],
    }]  # fmt: skip
    album = [{"id": 1, "image": ["a.jpg"], "conversations": [{"value": "q"}, {"value": "a"}]}]
    for name, document in (
        ("scbench_kv.jsonl", kv[0]), ("longmemeval_s.json", memory), ("mmdu.json", album)
    ):  # fmt: skip
        yield Reader(f"conversations in {name}", {name: json.dumps(document).encode()}, read(name), share=SOME)
