"""Every reader of files and texts from outside, with a valid input for each, of which hostile variants are made.

A reader's `read` raises one of `REFUSALS` or returns. It checks that what it accepted can be used, and raises
`WrongResult` if not.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import math
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .mutations import SCRIPT
from .reader import FEW, MANY, SOME, Reader, require

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ...eviction import Session
    from ...retention import RetentionGates


@contextmanager
def all_readers(folder: Path) -> Iterator[list[Reader]]:
    """All of them; valid inputs are made in `folder`, with a tiny model."""
    import torch

    from ...eviction import evict
    from .untrusted_training import training_readers

    warnings.simplefilter("ignore")  # of unknown fields, of which there are many
    logging.disable(logging.ERROR)
    model = tiny_model()
    gates = tiny_gates(model)
    observed = ["snapkv(window=4)", "expected_attention", "h2o"]
    with (
        torch.no_grad(),
        evict(
            model, "retention", 8, observe=observed, gates=gates, buffer=2, sinks=1, recent=2, protect=[(3, 5)]
        ) as session,
    ):
        yield [
            *documents(), *settings(), *texts(), gates_folder(gates, folder), saved_cache(session, folder), *runs(),
            trace(folder), *server(), prompt_file(folder),
            *training_readers(tiny_gates(model), model, folder),
        ]  # fmt: skip


def tiny_model() -> PreTrainedModel:
    """A random Llama of two layers, the same at every call."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.2, "max_position_embeddings": 256,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**sizes)).eval()


def tiny_gates(model: PreTrainedModel) -> RetentionGates:
    """Random gates for it."""
    import torch

    from ...retention import RetentionGates

    torch.manual_seed(1)
    return RetentionGates.for_model(model, gate_width=4, initial_bias=2.0)


# Documents and settings -------------------------------------------------------------------------------------------

DOCUMENT = {"a": 1, "b": [1.5, "x", None, True], "c": {"d": {"e": [[1], [2]]}, "f": "text"}}


def documents() -> Iterator[Reader]:
    """JSON and YAML of any content."""
    from tenure.documents import load_json, load_yaml

    def bounded(value: Any) -> None:
        require(len(json.dumps(value, allow_nan=False)) < 1 << 25, "more than the limits allow")

    yield Reader("json", {"a.json": json.dumps(DOCUMENT).encode()}, lambda at: bounded(load_json(at / "a.json")))
    yield Reader(
        "yaml", {"a.yaml": b"a: &a [1, 2]\nb: {c: *a, d: 1.5e-3}\ne: {<<: {f: g}}\n"},
        lambda at: bounded(load_yaml(at / "a.yaml")), share=SOME,
    )  # fmt: skip


def settings() -> Iterator[Reader]:
    """The YAML of sweeps, of training and of simulations, and lm-eval's."""
    from ...eval.harness.command import peek
    from ...eval.sweep import SweepConfig, all_units
    from ...serving.simulation.setup import load_setup
    from ...training.train_config import TrainConfig

    def sweep(folder: Path) -> None:
        config = SweepConfig.from_yaml(folder / "a.yaml")
        config.cells()
        if len(config.tasks) * len(config.lengths) * len(config.seeds) * config.cases < 10**5:
            all_units(config)

    def setup(folder: Path) -> None:
        for cell in load_setup(folder / "a.yaml").cells:
            sizes = cell.machine
            require(min(sizes.device_bytes, sizes.host_bytes, sizes.disk_bytes, sizes.page_size) >= 0, "negative sizes")
            require(all(math.isfinite(value) for value in cell.paper.values()), "speed-ups that are no numbers")

    yield Reader("sweep", {"a.yaml": SWEEP.encode()}, sweep, share=SOME)
    yield Reader("train", {"a.yaml": TRAIN.encode()}, lambda at: TrainConfig.from_yaml(at / "a.yaml"), share=SOME)
    yield Reader("simulate", {"a.yaml": SETUP.encode()}, setup, share=SOME)
    yield Reader("lm-eval", {"a.yaml": LM_EVAL.encode()}, lambda at: peek(["--config", str(at / "a.yaml")]), share=SOME)


SWEEP = """
policies: [full, retention, "snapkv(window=16):layer@256"]
budgets: [0.5, 128]
tasks: [needle, qa_2]
scopes: [global]
lengths: [1024]
seeds: [0, 1]
cases: 3
gates: examples/none
sinks: 4
output: runs/none
"""
TRAIN = """
model: demo
data: synthetic
lengths: [512, 1024]
facts: [4, 8]
eviction_budgets: [0.5]
prompt_share: 0.5
gradient_checkpointing: false
learning_rate: 2.0e-4
steps: 10
seed: 0
"""
SETUP = """
title: t
source: s
machine: {card: h100, model: llama-3.1-8b, card_share: 0.5, host_gb: 64, link_gb_s: 25, latency_s: 0.001,
  scheduler: {max_num_seqs: 4}, prefetch: {max_in_flight: 2}}
workload: {shape: ring, agents: 4, rounds: 2, fixed_tokens: {mean: 100, kind: uniform, shape: 0.5}}
policies: [lru, lru_reactive, ste]
repeats: 2
cells:
  - {name: a, workload: {fixed_tokens: 64, noise: 0.1}, paper: {lru: 1.4}}
  - {name: 7, machine: {host_gb: 1, disk_gb: 10, disk_gb_s: 2}}
"""
LM_EVAL = """
model: tenure
model_args: {pretrained: x, policy: snapkv}
tasks: [ruler_x, y]
metadata: {length: 100}
device: cpu
"""


def texts() -> Iterator[Reader]:
    """Policies, budgets and cells as text, as flags have them."""
    from ...eval import parse_cells
    from ...eviction import Budget, evict, get_policy
    from ...eviction.presets import make_plan

    model = tiny_model()

    def lines(kind: str) -> tuple[str, bytes]:
        return f"{kind}.txt", "\n".join(TEXT_LINES[kind]).encode()

    def each(kind: str, read: Callable[[str], object]) -> Callable[[Path], None]:
        def read_lines(folder: Path) -> None:
            for text in (folder / f"{kind}.txt").read_text(errors="replace").splitlines()[:3]:
                read(text)

        return read_lines

    def plan(text: str) -> None:
        import torch

        chosen = make_plan(get_policy(text), 4)
        if "log_beta" in chosen.policy.needs or chosen.policy.window_size > 10**6:
            return
        with torch.no_grad(), evict(model, chosen.policy, 4, recent=0, sinks=0) as session:
            session.extend(session.new_cache(), torch.arange(12).view(1, -1))

    for kind, read in (
        ("policy", plan), ("budget", Budget), ("cells", lambda text: parse_cells([text], [0.5]))
    ):  # fmt: skip
        yield Reader(kind, dict([lines(kind)]), each(kind, read), share=SOME if kind == "policy" else MANY)


TEXT_LINES = {
    "policy": ("snapkv(window=4,kernel=3)", "random(seed=3)", "defensive(mass=0.5,prior=0.1)"),
    "budget": ("512MiB", "20%", "65536 entries"),
    "cells": ("snapkv(window=16):layer@256", "retention+dbtrimkv:global", "full"),
}


# Gates, caches and files of the disk tier -------------------------------------------------------------------------


def gates_folder(gates: RetentionGates, folder: Path) -> Reader:
    """A folder of gates with a calibration."""
    import torch

    from ...retention import RetentionGates
    from ...retention.calibration import Calibration, TriedBudget, weights_digest
    from ...retention.checkpoint import CALIBRATION_FILE, CONFIG_FILE, WEIGHTS_FILE, CheckpointInfo

    made = folder / "gates"
    gates.calibration = Calibration(
        0.5, "kl", 0.1, 1.0, 0.9, "ltt", "retention", "global", 0.0, 4, 32, "m", "float32", ("needle",), (10, 20), 5, 2,
        "demo", 0, weights_digest(gates.state_dict()), (TriedBudget(0.5, 0.01, 0.02, True),),
    )  # fmt: skip
    gates.save_pretrained(made, CheckpointInfo("tiny", metrics={"a": 1.0}, training={"steps": 3}))
    gates.calibration = None
    hidden = torch.randn(1, 3, gates.config.hidden_size)

    def read(at: Path) -> None:
        found = RetentionGates.from_pretrained(at)
        for layer in found.layer_indices:
            width = found.config.hidden_size
            value = found.log_beta(layer, hidden if width == hidden.shape[2] else torch.zeros(1, 1, width))
            require(value.isfinite().all(), "log β is not finite")

    def seal(at: Path) -> None:
        document = json.loads((at / CONFIG_FILE).read_bytes())
        document["weights_sha256"] = hashlib.sha256((at / WEIGHTS_FILE).read_bytes()).hexdigest()
        (at / CONFIG_FILE).write_text(json.dumps(document))

    names = (CONFIG_FILE, WEIGHTS_FILE, CALIBRATION_FILE)
    return Reader("gates", {name: (made / name).read_bytes() for name in names}, read, seal, share=SOME)


def saved_cache(session: Session, folder: Path) -> Reader:
    """A cache of two rows, one of them padded, with all that sessions record."""
    import torch

    ids = torch.arange(40).view(2, 20) % 60 + 3
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[1, :4] = 0
    cache = session.new_cache()
    session.model(ids, attention_mask=mask, past_key_values=cache)
    cache.save(folder / "cache.safetensors")
    asked = torch.tensor([[5, 6, 7], [8, 9, 10]])

    def read(at: Path) -> None:
        found = session.load_cache(at / "cache.safetensors")
        require(not list(found.faults()), "the cache has faults")
        if len(found.tokens_seen) != 2:
            return
        seen = torch.ones(2, found.get_seq_length() + 3, dtype=torch.long)
        seen[:, : found.get_seq_length()] = found.rows.mask()
        answer = session.model(asked, attention_mask=seen, past_key_values=found)
        require(answer.logits.isfinite().all(), "logits are not finite")
        found.compress(budget=4)
        require(not list(found.faults()), "the cache has faults after an eviction")

    content = (folder / "cache.safetensors").read_bytes()
    return Reader("cache", {"cache.safetensors": content}, read, share=0.05)


def prompt_file(folder: Path) -> Reader:
    """A file of the disk tier."""
    import torch

    from ...serving import DiskPool, TensorPayload
    from ...serving.kvcache.base import PromptKey
    from ...serving.kvcache.prompt_file import DIGEST_BYTES, FilePayload, read_index

    pool = DiskPool(10**6, folder / "disk", "weights")
    torch.manual_seed(2)
    payload = TensorPayload(
        {f"layers.{layer}.{name}": torch.randn(1, 2, 80, 4) for layer in range(2) for name in ("key", "value")}, 80, -2
    )
    builder = pool.new_builder(payload, PromptKey(("client", None), bytes(320), ("agent",)))
    for layer in range(2):
        builder.write(layer, payload.read(layer))
    written = builder.commit()
    content, data_at, fingerprint = written.path.read_bytes(), written.file.layout.data_at, pool._store.fingerprint
    pool.close()
    assert fingerprint is not None

    def read(at: Path) -> None:
        file, prompt = read_index(at / "0.kv", fingerprint, 2**24)
        hash(prompt.namespace)
        for start, stop in file.live:
            found = FilePayload(file, start, stop)
            for layer in range(len(found.layers)):
                found.read(layer)

    def seal(at: Path) -> None:
        data = (at / "0.kv").read_bytes()
        index = data[: data_at - DIGEST_BYTES]
        (at / "0.kv").write_bytes(index + hashlib.sha256(index).digest() + data[data_at:])

    return Reader("disk tier", {"0.kv": content}, read, seal)


# Runs and traces --------------------------------------------------------------------------------------------------


def runs() -> Iterator[Reader]:
    """Folders of a sweep, of the demo and of another program, each rendered as a report."""
    from ...eval.cases import Record
    from ...eval.report import load_run, report_markdown, report_page
    from ...eval.sweep import Failure

    def read(folder: Path) -> None:
        run = load_run(folder)
        page = report_page([run], [], folder)
        markdown = report_markdown([run], [])
        tags = re.findall(r"<\s*(script|img|iframe|object|svg/onload)", page.replace("<img class", ""), re.IGNORECASE)
        require(not tags and SCRIPT not in page, "the page has a tag of the records")
        require(not re.search(r"<\s*/?[a-zA-Z!]", markdown), "the Markdown has a tag of the records")
        require(str(folder.parent) not in markdown and str(folder.parent) not in page, "a local path is shown")

    cells = [["full", "none", 1.0, False], ["snapkv", "head", 0.5, False], ["knorm", "head", 64, False]]
    lines = []
    for index in range(2):
        for policy, scope, budget, aware in cells:
            record = Record(
                "needle", 100, index, 0, 0.5, str(policy), str(scope), budget, index == 0, "an answer", "a text",
                0.1, 0.9, 10, 1000, 0.5, 1.0, 0.5, 0.5, float(index == 0), bool(aware),
            )  # fmt: skip
            lines.append(asdict(record))
    failed = asdict(Failure("needle", 100, 0, 1, "ValueError: a|b <x>", "Traceback", "knorm", "head", 64, False))
    failing = [*lines[:5], failed]
    document = {
        "cells": cells, "sweep": {"tasks": ["needle"], "lengths": [100]}, "model": {"id": "m", "sha": None}, "units": 2,
        "versions": {"torch": "2"}, "dtype": "float32", "device": "cpu", "sessions": [{"at": "now", "seconds": 1.5}],
    }  # fmt: skip
    part = ("\n".join(map(json.dumps, failing)) + "\n").encode()
    described = json.dumps(document).encode()
    yield Reader("report of a sweep", {"settings.json": described, "part-0.jsonl": part}, read, share=FEW)
    packed = {"settings.json": described, "part-0.jsonl.gz": gzip.compress(part)}
    yield Reader("report of packed parts", packed, read, share=FEW / 2)
    demo = json.dumps({"records": lines, "settings": {"a": [1, {"b": "c"}]}}).encode()
    yield Reader("report of the demo", {"results.json": demo}, read, share=FEW)
    names = ("task", "length", "seed", "index", "policy", "scope", "budget", "score")
    few = "\n".join(json.dumps({name: line[name] for name in names}) for line in lines).encode() + b"\n"
    others = {"a.jsonl": few, "settings.json": b'{"versions": {"x": 1}}'}
    yield Reader("report of others' records", others, read, share=FEW)


def trace(folder: Path) -> Reader:
    """A trace, replayed on the machine it names."""
    from ...serving.simulation.setup import read_setup
    from ...serving.simulation.simulator import machine_of, replay, simulate
    from ...serving.simulation.trace import TraceRecorder, read_trace

    workload = {"agents": 3, "rounds": 1, "fixed_tokens": 20, "dynamic_tokens": 4, "output_tokens": 3}
    machine = {"pool_tokens": 4000, "host_gb": 1, "link_gb_s": 20}
    cell = read_setup({"machine": machine, "workload": workload}, "x").cells[0]
    about = {
        "device_bytes": 10**9, "host_bytes": 10**9, "link_bytes_per_s": 1e9, "latency_s": 1e-5, "copy_parts": 2,
        "scheduler": {"max_num_seqs": 4}, "believed": [1e4, 1e9, 1e9, 0.0],
    }  # fmt: skip
    with TraceRecorder(folder / "a.jsonl", cell.machine.bytes_per_token, 16, about) as recorder:
        recorder.record_stored("agent0", [1, 2, 3] * 10, 30 * cell.machine.bytes_per_token)
        simulate(cell.machine, cell.workload, "ste_prefetch", recorder=recorder)

    def read(at: Path) -> None:
        found = read_trace(at / "a.jsonl")
        result = replay(machine_of(found), found, "lru_reactive")
        require(math.isfinite(result.makespan_s) and result.makespan_s >= 0, "a makespan that is no number")

    return Reader("trace", {"a.jsonl": (folder / "a.jsonl").read_bytes()}, read, share=0.05)


# The server's files and bodies ------------------------------------------------------------------------------------


def server() -> Iterator[Reader]:
    """The file of keys, workflows, bodies of chats and completions, and all dialects of hints."""
    from ...serving import StepGraph
    from ...serving.hints import HintReader
    from ...serving.server.api_errors import ApiError
    from ...serving.server.api_keys import ApiKeys
    from ...serving.server.api_requests import (
        HINT_FIELDS,
        ChatBody,
        CompletionBody,
        UnknownFields,
        decode_body,
        parse_body,
        read_body,
    )
    from ...serving.server.server_config import ServerConfig
    from ...serving.workflow.loaders import workflow_from_json, workflow_from_yaml

    def declare(spec: Any) -> None:
        graph = StepGraph(lambda: 0.0)
        graph.add_workflow(spec)
        for agent in spec.agents[:3]:
            require(not math.isnan(graph.steps(agent.name)), "steps that are no number")

    yield Reader("api keys", {"keys.txt": KEYS.encode()}, lambda at: ApiKeys.from_file(at / "keys.txt"))
    document = json.dumps(WORKFLOW)
    yield Reader(
        "workflow in json", {"a.json": document.encode()},
        lambda at: declare(workflow_from_json(decode_body((at / "a.json").read_bytes()), set())), share=SOME,
    )  # fmt: skip
    yield Reader(
        "workflow in yaml", {"a.yaml": document.encode()},
        lambda at: declare(workflow_from_yaml(decode_body((at / "a.yaml").read_bytes()), set())), share=SOME,
    )  # fmt: skip

    config, reader = ServerConfig(), HintReader()

    def body(kind: type) -> Callable[[Path], None]:
        def read(at: Path) -> None:
            try:
                found, hints = read_body(kind, parse_body((at / "a.json").read_bytes(), config), config, fields)
                found.sampling()
                for name, value in hints.items():
                    reader.read(HINT_FIELDS[name], value, "client", "agent", "session")
            except ApiError as error:
                require(error.status in (400, 413), f"status {error.status}")
                raise ValueError(str(error)) from None

        fields = UnknownFields(1000)
        return read

    yield Reader("body of a chat", {"a.json": json.dumps(CHAT | HINTS).encode()}, body(ChatBody))
    completion = COMPLETION | HINTS
    yield Reader("body of a completion", {"a.json": json.dumps(completion).encode()}, body(CompletionBody))


KEYS = """# clients
first abcdefghijklmnopqrstuvwx admin
second ABCDEFGHIJKLMNOPQRSTUVWX share=team tokens_per_min=100000
second ABCDEFGHIJKLMNOPQRST4567 concurrency=4 requests_per_min=60
"""
WORKFLOW = {
    "workflow": "w",
    "agents": {"a": {"call_s": 1.0, "pause_s": 0.5}, "b": {"join": "and", "call_spread_s": 0.1}, "c": None},
    "edges": [["a", "b"], ["b", "c", 0.5], {"from": "b", "to": "a", "probability": 0.5}],
    "start": ["a"],
}
SAMPLING = {
    "model": "m", "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 1, "max_tokens": 5, "n": 2,
    "stop": ["x"], "logit_bias": {"5": 1.5}, "presence_penalty": 0.1, "frequency_penalty": 0.1, "stream": True,
    "repetition_penalty": 1.1, "stop_token_ids": [3], "min_tokens": 1, "cache_salt": "s", "ignore_eos": False,
    "stream_options": {"include_usage": True},
}  # fmt: skip
CHAT = SAMPLING | {
    "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": [{"type": "text", "text": "t"}]}],
    "logprobs": True, "top_logprobs": 2,
}  # fmt: skip
COMPLETION = SAMPLING | {"prompt": ["a", "b"], "logprobs": 1}
HINTS = {
    "agent_hints": {"agent_id": "a", "children_step_ids": ["b"], "cache_ttl_ms": 10, "reuse_hint": "keep",
                    "step_index": 1, "total_steps": 2, "expected_tool_duration_ms": 5.5},
    "session_params": {"id": "s", "offset": 3, "replace": False},
    "nvext": {"agent_hints": {"priority": 3, "strict_priority": 1, "osl": 5, "speculative_prefill": True},
              "agent_context": {"session_id": "s", "parent_session_id": "p", "session_final": False},
              "session_control": {"action": "open", "timeout": 5}, "cache_salt": "x"},
    "agent_hint": {"agent_id": "a", "priority": 50},
    "kv_transfer_params": {"do_remote_prefill": True, "remote_block_ids": [1, 2]},
    "kv_hints": {"message_id": "m", "agent_id": "a", "actions": [
        {"action_type": "kv.retain", "payload": {"priority": 50, "ttl_ms": 1000, "token_range": [0, 10]}}]},
    "kv_cache_retention_config": {
        "token_range_retention_configs": [{"token_start": 0, "token_end": 4, "priority": 80, "duration_ms": 5}],
        "decode_retention_priority": 0},
    "kvflow": {"agent_id": "a", "timestep_cnt": 3, "agent_data": {"a": 1, "b": 2.5}, "timestep_data": {"1": ["c"]}},
}  # fmt: skip
