"""Agents of SmolLM2-135M with little room: the answers are those without any cache, token for token."""

from __future__ import annotations

import pytest
import torch

from tenure.eviction import evict
from tenure.retention import RetentionGates
from tenure.scripts.bench.agent_runs import AgentRunSetting, make_workload, one_run
from tenure.scripts.bench.bench_agents import prepared
from tenure.scripts.loading import find_gates
from tenure.serving import LinearCosts
from tenure.serving.prompt_cache import Compression, PromptKV

FIXED, SUFFIX, ANSWER = 64, 16, 4


@pytest.mark.real
def test_the_real_model_answers_as_without_a_cache(real_model_path, essay_texts):
    """A ring of ten with room for three prompts on the device; with the shipped gates a quarter of each is stored."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(real_model_path)(" ".join(essay_texts)[:40_000]).input_ids
    model = AutoModelForCausalLM.from_pretrained(real_model_path, dtype=torch.float32).eval()
    gates = RetentionGates.from_pretrained(find_gates("demo", None))
    workload = make_workload("ring", ids, 1, FIXED, SUFFIX, ANSWER, 0.0, 0)
    with evict(model, "full", gates=gates, observe=["retention"]) as session:
        kv = PromptKV(session)
        rate = kv.bytes_per_token()
        for how in (None, Compression("retention", 0.25)):
            wanted = []
            for call in workload.calls:
                cache, prompt = session.new_cache(), workload.prompt(call)
                if how is not None:
                    kv.forward(cache, prompt[:FIXED])
                    kv.compress(cache, how)
                    prompt = prompt[FIXED:]
                answer: list[int] = []
                while len(answer) < ANSWER:
                    answer.append(int(kv.forward(cache, prompt if not answer else answer[-1:]).argmax()))
                wanted.append(tuple(answer))
            room = int(3 * FIXED * (1.0 if how is None else 0.3) + FIXED + SUFFIX + ANSWER) * rate
            for system in ("lru_reactive", "ste_prefetch"):
                costs = LinearCosts(300.0, (1e8, 1e8), 0.0)
                setting = AgentRunSetting(system, how, room, 20 * FIXED * rate, 1e8, 1e8, costs)
                run = one_run(session, workload, setting, prepared(session, workload, how))
                assert run.answers == tuple(wanted), (system, how)
                assert run.bytes_moved > 0
