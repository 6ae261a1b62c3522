"""Public functions and configs with hostile arguments: ValueError with one sentence, or a result that can be used."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tenure.documents import plain_line
from tenure.eval import evaluate, parse_cells
from tenure.eval.sweep import SweepConfig
from tenure.eviction import Budget, evict, get_policy, policy_names
from tenure.eviction.presets import make_plan
from tenure.retention import RetentionConfig, RetentionGates, attach
from tenure.scripts.soak.mutations import NASTY
from tenure.serving import (
    AgentSpec,
    Compression,
    EdgeSpec,
    PrefetchConfig,
    Request,
    SchedulerConfig,
    WorkflowSpec,
    build_system,
)
from tenure.serving.hints import HintConfig
from tenure.serving.kvcache.disk_store import DiskConfig
from tenure.serving.kvcache.eviction_policy import LinearCosts
from tenure.serving.sampling.params import SamplingParams
from tenure.serving.server.server_config import ServerConfig
from tenure.serving.simulation.cost_model import Links
from tenure.serving.simulation.workload import Distribution, WorkloadConfig
from tenure.training import GateObjective, TrainConfig

MAX_MESSAGE = 1500  # characters: the longest lists of accepted names are those of the settings of training
OTHERS: tuple[Any, ...] = (
    object(), torch.tensor(3), torch.zeros(2), np.float64("nan"), np.int64(3), np.zeros(3), b"x", 1j, (1, 2), {1, 2},
    lambda: 1, Path("x"), float, range(3), 10**4000,
)  # fmt: skip
HOSTILE = st.sampled_from([*NASTY, *OTHERS])
CALM = settings(
    max_examples=120, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)  # fmt: skip


@contextmanager
def refused_in_a_sentence(what: str):
    """Lets a ValueError pass whose message is one bounded line."""
    try:
        yield
    except ValueError as error:
        text = str(error)
        assert 0 < len(text) <= MAX_MESSAGE and text.isprintable(), f"{what}: {text!r:.600}"


OPTIONS: dict[str, Any] = {
    "policy": "knorm", "budget": 4, "scope": "head", "sinks": 1, "recent": 2, "buffer": 2, "floor": 0.1,
    "observe": ["snapkv(window=4)"], "protect": [(1, 2)], "prefill_chunk": 6, "schedule": "bounded", "preset": None,
    "gates": None,
}  # fmt: skip


@CALM
@given(st.dictionaries(st.sampled_from(list(OPTIONS)), HOSTILE, min_size=1, max_size=2))
@pytest.mark.filterwarnings("ignore")
def test_evict(tiny_llama, given: dict[str, Any]):
    ids = torch.arange(3, 15).view(1, -1)
    with (
        refused_in_a_sentence(f"evict(**{plain_line(given, 200)})"),
        torch.no_grad(),
        evict(tiny_llama, **OPTIONS | given) as session,
    ):
        assert session.extend(session.new_cache(), ids).isfinite().all()
    assert not any(module._forward_pre_hooks for module in tiny_llama.modules())


IDS = torch.arange(3, 15).view(1, -1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (IDS[0], r"got input_ids \(12,\); accepted: \(batch, tokens\) .*; input_ids\[None\] is a batch of one row"),
        (IDS[None], r"got input_ids \(1, 1, 12\); accepted: \(batch, tokens\) of at least one token"),
        (IDS[:, :0], r"got input_ids \(1, 0\); accepted: \(batch, tokens\) of at least one token"),
        (IDS.float(), "got input_ids in torch.float32; accepted: token ids in torch.int64"),
        ([[3, 4]], "got a list as input_ids; accepted: a tensor"),
        (IDS + 1000, r"got the token id 10\d\d; accepted: 0 to 127, the vocabulary of LlamaForCausalLM"),
        (IDS - 10, "got the token id -7; accepted: 0 to 127"),
    ],
)
@pytest.mark.parametrize("chunk", [None, 5])
def test_tokens_that_no_model_can_read(tiny_llama, given: Any, message: str, chunk: int | None):
    with torch.no_grad(), evict(tiny_llama, "knorm", 0.5, prefill_chunk=chunk) as session:
        with pytest.raises(ValueError, match=message):
            tiny_llama(given)
        assert tiny_llama(IDS).logits.isfinite().all(), "the block goes on"
        if isinstance(given, torch.Tensor) and given.ndim == 2 and given.shape[1]:
            with pytest.raises(ValueError, match=r"got the token id|got ids in torch.float32"):
                session.extend(session.new_cache(), given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"inputs": IDS[0]}, r"got input_ids \(12,\); .*; input_ids\[None\] is a batch of one row"),
        ({"input_ids": IDS[0]}, r"got input_ids \(12,\); accepted: \(batch, tokens\)"),
        ({"inputs": IDS[0][:0]}, r"got input_ids \(0,\); accepted: \(batch, tokens\) of at least one token$"),
        ({"inputs": IDS.tolist()}, "got a list as input_ids; accepted: a tensor, such as tokenizer"),
        ({"inputs": "text"}, "got 'text' as input_ids; accepted: a tensor"),
        ({"inputs": {"input_ids": IDS}}, "got a dict as input_ids"),
        (
            {"inputs_embeds": torch.ones(12, 64)},
            r"got inputs_embeds \(12, 64\); accepted: \(batch, tokens, hidden_size",
        ),
        ({"inputs": IDS, "attention_mask": torch.ones(12)}, r"got attention_mask \(12,\) for input_ids \(1, 12\)"),
        ({"inputs": IDS, "attention_mask": torch.ones(1, 5)}, r"accepted: a tensor \(1, 12\), 0 for padding"),
        ({"inputs": IDS, "attention_mask": [1]}, "got attention_mask a list for input_ids"),
        ({"inputs": IDS, "past_key_values": "x"}, "got 'x' as past_key_values; accepted: a cache, such as session"),
    ],
)
@pytest.mark.parametrize("filled", [None, False, True])
def test_what_generate_cannot_read(tiny_llama, given: dict[str, Any], message: str, filled: bool | None):
    """transformers would meet these first, and fail with an IndexError or the like."""
    with evict(tiny_llama, "knorm", 0.5) as session:
        if filled is not None and "past_key_values" not in given:
            given = given | {"past_key_values": session.new_cache()}
            if filled:
                session.extend(given["past_key_values"], IDS[:, :4])
        with pytest.raises(ValueError, match=message):
            tiny_llama.generate(**given, max_new_tokens=2)
        assert tiny_llama.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=2).shape == (1, 14)
        embeds = tiny_llama.get_input_embeddings()(IDS)
        assert tiny_llama.generate(inputs_embeds=embeds, max_new_tokens=2).shape == (1, 2)
    with (
        attach(tiny_llama, RetentionGates.for_model(tiny_llama, gate_width=4)),
        pytest.raises(ValueError, match="got "),
    ):
        tiny_llama.generate(**given, max_new_tokens=2)
    assert "_prepare_model_inputs" not in vars(tiny_llama)


@pytest.mark.parametrize("positions", [torch.arange(12), torch.arange(5)[None]])
def test_positions_of_other_tokens(tiny_llama, positions: torch.Tensor):
    with (
        evict(tiny_llama, "knorm", 0.5),
        pytest.raises(ValueError, match=r"got position_ids \(.*for input_ids \(1, 12"),
    ):
        tiny_llama(IDS, position_ids=positions)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda session, cache, path: cache.crop("x"), "got 'x' columns to remove; accepted: a whole number"),
        (lambda session, cache, path: cache.crop(-1.5), "got -1.5 columns to remove|got 1.5 columns to remove"),
        (lambda session, cache, path: cache.positions("x"), "layer 'x' does not evict; those that do: 0, 1"),
        (lambda session, cache, path: cache.save(None), "got nothing as path; accepted: that of a file"),
        (lambda session, cache, path: cache.save(path), "got '/.* as path; accepted: that of a file"),
        (lambda session, cache, path: cache.save(path / "none" / "x"), "in a folder that exists"),
        (lambda session, cache, path: session.load_cache(3), "got 3 as path; accepted: that of a file"),
        (lambda session, cache, path: session.report("x"), "got 'x' as cache; accepted: a cache of this session"),
    ],
)
def test_caches(tiny_llama, call: Callable[..., Any], message: str, tmp_path: Path):
    with evict(tiny_llama, "knorm", 1.0) as session:
        cache = session.new_cache()
        session.extend(cache, IDS)
        with pytest.raises(ValueError, match=message):
            call(session, cache, tmp_path)
        assert not list(cache.faults()) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"logits_to_keep": -1}, "got logits_to_keep=-1; accepted: a number of columns, 0 for all"),
        ({"logits_to_keep": "x"}, "got logits_to_keep='x'"),
        ({"inputs": "x"}, "got 'x' as inputs; accepted: arguments of the model by name"),
        ({"ids": "abc"}, "got 'abc' as ids; accepted: token ids"),
        ({"ids": None}, "got nothing as ids"),
        ({"ids": [[1, 2], [3]]}, "got a list as ids"),
        ({"ids": [0.5]}, "got ids in torch.float32; accepted: token ids"),
        ({"ids": []}, "of at least one token"),
        ({"cache": torch.ones(9, 9)}, "got a Tensor as cache; accepted: one of this session"),
        ({"attention_mask": [1]}, r"got attention_mask a list for ids \(1, 12\)"),
        ({"attention_mask": torch.ones(9, 9)}, r"got attention_mask \(9, 9\) for ids \(1, 12\)"),
        ({"position_ids": torch.ones(9)}, r"got position_ids \(9,\) for ids \(1, 12\)"),
    ],
)
def test_extend(tiny_llama, arguments: dict[str, Any], message: str):
    with evict(tiny_llama, "knorm", 0.5) as session:
        given = {"cache": session.new_cache(), "ids": IDS} | arguments
        with pytest.raises(ValueError, match=message):
            session.extend(**given)
        for caches in ([torch.ones(9, 9)], torch.ones(9, 9), []):
            with pytest.raises(ValueError, match="to stack; accepted: "):
                session.stack(caches)  # type: ignore[arg-type]


def test_a_question_alone_with_a_fork_of_its_context(tiny_llama):
    with evict(tiny_llama, "knorm", 0.5) as session:
        cache = session.new_cache()
        session.extend(cache, IDS)
        with pytest.raises(ValueError, match=r"no tokens beyond the 12 in the cache; accepted by generate: .*"):
            tiny_llama.generate(IDS[:, :4], past_key_values=cache.fork(), max_new_tokens=2)
        both = torch.cat([IDS, IDS[:, :4]], 1)
        assert tiny_llama.generate(both, past_key_values=cache.fork(), max_new_tokens=2).shape == (1, 18)


@pytest.mark.parametrize(("name", "said"), [("LlamaForCausalLM", False), ("another/model", True)])
def test_gates_and_a_model_in_float16(tiny_llama, name: str, said: bool, caplog: pytest.LogCaptureFixture):
    gates = RetentionGates.for_model(tiny_llama, gate_width=4)
    gates.info = replace(gates.info, base_model=name)
    half = copy.deepcopy(tiny_llama).to(torch.float16)
    half.config._name_or_path = "LlamaForCausalLM"
    gates.check_model(half)
    assert ("in float16 it cannot be told" in caplog.text) == said
    half.model.embed_tokens.weight.data.mul_(2)
    with pytest.raises(ValueError, match="same shape, other weights"):
        gates.check_model(half.to(torch.bfloat16))


@pytest.mark.parametrize("model", ["demo", None, 3, {}, torch.nn.Linear(2, 2)])
def test_evict_needs_a_model(model):
    with pytest.raises(ValueError, match="as model; accepted: a transformers model"), evict(model, "knorm", 4):
        pass


@CALM
@given(st.dictionaries(st.sampled_from(["policy", "budget", "scope", "sinks", "recent", "buffer", "floor", "protect"]),
                       HOSTILE, min_size=1, max_size=2))  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_compress(tiny_llama, given: dict[str, Any]):
    ids = torch.arange(3, 15).view(1, -1)
    with torch.no_grad(), evict(tiny_llama, "knorm", 1.0) as session:
        cache = session.new_cache()
        session.extend(cache, ids)
        with refused_in_a_sentence(f"compress(**{plain_line(given, 200)})"):
            cache.compress(**given)
        assert not list(cache.faults())
        assert session.extend(cache, ids[:, :1]).isfinite().all()


@CALM
@given(st.sampled_from(policy_names()), st.data())
def test_options_of_policies(name: str, data: st.DataObject):
    known = [one.name for one in fields(get_policy(name))]  # type: ignore[arg-type]
    given = data.draw(st.dictionaries(st.sampled_from([*known, "other"]), HOSTILE, max_size=2))
    with refused_in_a_sentence(f"get_policy({name}, {plain_line(given, 200)})"):
        policy = get_policy(name, **given)
        assert policy.window_size <= 1 << 16 and get_policy(policy) == policy


@CALM
@given(st.text(max_size=40) | st.from_regex(r"[0-9.e%]{1,12} ?(MiB|entries|%)?", fullmatch=True))
def test_texts_of_budgets_policies_and_cells(text: str):
    with refused_in_a_sentence("Budget"):
        budget = Budget(text)
        assert budget.in_bytes or isinstance(budget.amount, float | str)
    for read in (get_policy, lambda text: make_plan(policy="knorm", budget=0.5, preset=text), lambda text: parse_cells([text], [0.5])):  # fmt: skip  # noqa: E501
        with refused_in_a_sentence(f"{read} {text!r}"):
            read(text)


CONFIGS: dict[type, dict[str, Any]] = {
    AgentSpec: {"name": "a"}, EdgeSpec: {"source": "a", "target": "b"}, SchedulerConfig: {}, PrefetchConfig: {},
    WorkflowSpec: {"name": "w", "agents": [AgentSpec("a")]}, Request: {"id": "r", "prompt": [1], "max_new_tokens": 2},
    HintConfig: {}, DiskConfig: {}, SamplingParams: {}, ServerConfig: {}, Links: {"host_bytes_per_s": 1e9},
    LinearCosts: {"tokens_per_s": 1e4, "bytes_per_s": (1e9, 1e9)}, Distribution: {"mean": 3.0}, WorkloadConfig: {},
    TrainConfig: {}, Compression: {"policy": "knorm", "budget": 0.5},
    SweepConfig: {"policies": ("full",), "budgets": (0.5,), "tasks": ("needle",)},
    RetentionConfig: {"hidden_size": 8, "num_kv_heads": 2, "layer_indices": (0, 1)},
}  # fmt: skip


@settings(CALM, max_examples=60)
@given(data=st.data())
@pytest.mark.parametrize("cls", list(CONFIGS), ids=lambda cls: cls.__name__)
def test_configs(cls: type, data: st.DataObject):
    name = data.draw(st.sampled_from([one.name for one in fields(cls) if one.init]))
    value = data.draw(HOSTILE)
    with refused_in_a_sentence(f"{cls.__name__}({name}={plain_line(repr(value), 200)})"):
        made = cls(**CONFIGS[cls] | {name: value})
        numbers = [one for one in vars(made).values() if isinstance(one, float)]
        assert not any(math.isnan(one) for one in numbers), (
            f"{cls.__name__}({name}={plain_line(repr(value), 200)}) holds NaN"
        )
        defaults = {one.name: one.default for one in fields(cls) if one.default is not MISSING}
        for field, default in defaults.items():  # a negative size or time where the default is above 0
            if isinstance(default, int | float) and default > 0 and field not in ("presence_penalty", "initial_bias"):
                found = getattr(made, field)
                assert isinstance(found, str | type(None) | list | tuple) or found >= 0, (
                    f"{cls.__name__}.{field}={found}"
                )


def test_numbers_of_which_nothing_would_be_taken(tiny_llama):
    gates = RetentionGates.for_model(tiny_llama, gate_width=4)
    with pytest.raises(ValueError, match="got chunk=0; accepted: 1 or more target tokens"):
        GateObjective(tiny_llama, gates, 8, chunk=0)
    with pytest.raises(ValueError, match="got together=0; accepted: 1 or more cells"):
        evaluate(tiny_llama, None, [], [], together=0)
    with pytest.raises(ValueError, match="got page_size=0; accepted: 1 or more tokens"):
        build_system("belady", {}, None, clock=lambda: 0.0, costs=None, bytes_per_token=1, page_size=0, prompts=[[1]])  # type: ignore[arg-type]


@pytest.mark.parametrize("value", ["x", 3.5, b"x", [], object(), 10**400])
def test_gates_of_another_kind(tiny_llama, value):
    read: Callable[..., Any] = RetentionGates.from_pretrained
    with refused_in_a_sentence("evict"), evict(tiny_llama, "retention", gates=value):
        pytest.fail("accepted")
    if isinstance(value, str):
        with refused_in_a_sentence("from_pretrained"):
            read(value)


def test_a_small_whole_budget_gets_a_hint(tiny_llama):
    with (
        pytest.warns(UserWarning, match="budget=20 keeps 20 entries per head on average; .*'20%'"),
        evict(tiny_llama, "knorm", 20) as session,
    ):
        assert session.plan.budget.amount == 20
    with evict(tiny_llama, "knorm", "20%") as session:
        assert session.plan.budget.amount == 0.2
