"""The runner's numbers against plain forwards, `generate`, and sessions that share nothing."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from tenure.eval import CaseBuilder, Cell, RetrievalProbe, check_inputs, evaluate, kl_to_full, parse_cells, summarise
from tenure.eval.predictions import agreed, greedy_rows
from tenure.eval.summary import markdown_tables
from tenure.eviction import SnapKV, evict
from tenure.eviction.presets import make_plan
from tenure.retention import RetentionGates

NAMES = ("full", "retention", "retention:head", "snapkv", "snapkv:layer", "keydiff", "knorm", "streaming_llm", "random")
LENGTH = 400


@pytest.fixture
def model(tiny_model):
    return tiny_model("llama", vocab_size=512, max_position_embeddings=1024)


@pytest.fixture
def gates(model):
    torch.manual_seed(1)
    gates = RetentionGates.for_model(model, gate_width=8, initial_bias=2.0)
    with torch.no_grad():  # wide enough that scores differ between tokens and heads
        for parameter in gates.parameters():
            parameter.normal_(std=0.5)
    return gates


@pytest.fixture
def builder(tokenizer, texts):
    return CaseBuilder(tokenizer, texts, LENGTH)


def row(ids) -> torch.Tensor:
    return torch.tensor([list(ids)])


def test_full_rows_change_nothing_and_match_the_model_outside(model, tokenizer, builder):
    case = builder.case("needle", 0)
    (record,) = evaluate(model, tokenizer, [case], [Cell.of("full")])
    assert record.kl < 1e-9 and record.top1 == 1.0
    assert record.kept_share == 1.0 and record.entries == 3 * 2 * LENGTH  # layers, heads, tokens
    prompt = row([*case.context_ids, *case.question_ids])
    limit = len(case.answer_ids) + case.extra_tokens
    output = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=limit, do_sample=False, pad_token_id=0
    )
    assert record.prediction == tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "full"])
def test_a_shared_prompt_gives_what_a_run_of_its_own_gives(name, model, gates, tokenizer, builder):
    case = builder.case("multikey", 1)
    records = evaluate(model, tokenizer, [case], parse_cells(NAMES, [0.2]), gates)
    cell = parse_cells([name], [0.2])[0]
    shared = next(record for record in records if (record.policy, record.scope) == (cell.policy.name, cell.scope))

    asked = [*case.question_ids, *case.answer_ids]
    with torch.no_grad():
        full = model(row([*case.context_ids, *asked])).logits[0, LENGTH:]
        options = {"gates": gates, "buffer": len(asked), "observe": ["retention"]}
        with evict(model, cell.policy, 0.2, cell.scope, **options) as session:
            cache = session.new_cache()
            model(row(case.context_ids), past_key_values=cache)
            report = session.report(cache)
            logits = model(row(asked), past_key_values=cache.fork()).logits[0]
            prompt = row([*case.context_ids, *case.question_ids])
            output = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                past_key_values=cache,
                max_new_tokens=len(case.answer_ids) + case.extra_tokens,
                do_sample=False,
                pad_token_id=0,
            )
    assert (shared.entries, shared.bytes) == (report.entries, report.bytes)
    assert shared.entries == int(0.2 * LENGTH) * 6
    assert shared.kl == pytest.approx(float(kl_to_full(full, logits).mean()), abs=1e-6)
    assert shared.kl > 1e-3
    assert shared.prediction == tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True)


def test_policies_are_really_different(model, gates, tokenizer, builder):
    records = evaluate(model, tokenizer, [builder.case("phrase", 0)], parse_cells(NAMES, [0.2]), gates)
    assert [record.policy for record in records] == [name.split(":")[0] for name in NAMES]
    assert len({round(record.kl, 9) for record in records}) == len(NAMES)


def continued(model, prompt: torch.Tensor, count: int) -> list[int]:
    """What `generate` appends to a row of tokens."""
    mask = torch.ones_like(prompt)
    output = model.generate(prompt, attention_mask=mask, max_new_tokens=count, do_sample=False, pad_token_id=0)
    return output[0, prompt.shape[1] :].tolist()


def test_rows_are_decoded_as_generate_does(model):
    """Rows that begin with other numbers of tokens and end at other times, and so leave the batch one by one."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, 500, (5, 30), generator=generator)
    expected = [continued(model, prompt[None], 25) for prompt in prompts]
    lengths = {tokens[0]: 5 + 4 * row for row, tokens in enumerate(expected)}
    assert len(lengths) == 5, "the rows can be told apart by their first token"
    with torch.no_grad(), evict(model, "full") as session:
        caches = []
        for prompt in prompts:
            caches.append(session.new_cache())
            session.extend(caches[-1], prompt.tolist())
        before = [tokens[: 1 + row] for row, tokens in enumerate(expected)]
        answers = greedy_rows(session, session.stack(caches), before, lambda tokens: len(tokens) == lengths[tokens[0]])
    assert answers == [tokens[: 5 + 4 * row] for row, tokens in enumerate(expected)]


@pytest.mark.parametrize("agreeing", [0, 1, 4, 9])
def test_decoding_from_the_teacher_is_greedy(model, agreeing):
    """Whatever part of the gold answer the model agrees with."""
    generator = torch.Generator().manual_seed(4)
    context, question = torch.randint(3, 500, (2, 20), generator=generator).tolist()
    expected = continued(model, row([*context, *question]), 12)
    with torch.no_grad(), evict(model, "full") as session:
        cache = session.new_cache()
        session.extend(cache, context)
        gold = expected[:agreeing] + [(token + 1) % 500 for token in expected[agreeing:9]]
        answered = session.extend(cache, question)[0, -1:]
        logits = torch.cat([answered, session.extend(cache.fork(), gold)[0]])
        for length in (12, 6):
            begun, ended = agreed(gold, logits, lambda tokens, full=length: len(tokens) >= full)
            assert begun == expected[: min(length, agreeing + 1)] and ended == (length <= agreeing + 1)
            if not ended:
                whole = greedy_rows(session, cache.fork(), [begun], lambda tokens, full=length: len(tokens) >= full)
                assert whole == [expected[:length]]


def test_a_generation_ends_where_the_model_ends_it(model, tokenizer, builder):
    """Not only behind the last token it may have."""
    case = builder.case("needle", 0)
    (free,) = evaluate(model, tokenizer, [case], [Cell.of("full")])
    tokens = continued(model, row([*case.context_ids, *case.question_ids]), len(case.answer_ids) + case.extra_tokens)
    assert free.prediction == tokenizer.decode(tokens, skip_special_tokens=True)
    model.generation_config.eos_token_id = [2, tokens[3]]
    (ended,) = evaluate(model, tokenizer, [case], [Cell.of("full")])
    assert ended.prediction == tokenizer.decode(tokens[: tokens.index(tokens[3]) + 1], skip_special_tokens=True)


@pytest.mark.parametrize("aware", [False, True])
def test_cells_that_are_asked_together_get_what_they_get_alone(model, gates, tokenizer, builder, aware):
    cells = parse_cells((*NAMES, "h2o", "snapkv@128"[: 6 if aware else None]), [0.5, 0.1], aware=(aware,))
    cases = [builder.case("needle", 1), builder.case("phrase", 2)]
    alone = evaluate(model, tokenizer, cases, cells, gates)
    seen = []
    records = evaluate(model, tokenizer, cases, cells, gates, progress=seen.append, together=7)
    assert seen == records and len(records) == 2 * len(cells)
    for one, other in zip(alone, records, strict=True):
        same = {"kl": 0.0, "seconds": 0.0, "compress_seconds": 0.0, "read_seconds": 0.0}
        assert replace(one, **same) == replace(other, **same)
        assert other.kl == pytest.approx(one.kl, abs=1e-6)
        assert other.seconds == pytest.approx(other.compress_seconds + other.read_seconds)


def test_callbacks_see_every_cell_before_the_question(model, gates, tokenizer, builder):
    cells = parse_cells(["full", "retention"], [0.5, 0.2])
    seen, looked = [], []

    def look(case, cell, cache):
        looked.append((case.index, cell.key, int(cache.tokens_seen[0]), cache.entries))

    records = evaluate(model, tokenizer, builder.cases(["needle"], 2), cells, gates, progress=seen.append, inspect=look)
    assert seen == records and len(records) == 6
    assert {tokens for _, _, tokens, _ in looked} == {LENGTH}
    assert [entries for *_, entries in looked] == [record.entries for record in records] == [2400, 1200, 480] * 2


def test_rows_have_the_promised_columns(model, gates, tokenizer, builder):
    records = evaluate(model, tokenizer, builder.cases(["needle", "phrase"], 2), parse_cells(NAMES, [0.2]), gates)
    rows = summarise(records)
    assert len(rows) == 2 * len(NAMES)
    for summary in rows:
        assert list(summary) == [
            "task", "length", "policy", "scope", "budget", "aware", "accuracy", "ci_low", "ci_high", "n", "kl",
            "entries", "bytes", "seconds",
        ]  # fmt: skip
        assert summary["n"] == 2 and summary["ci_low"] <= summary["accuracy"] <= summary["ci_high"]
        assert math.isfinite(summary["kl"]) and summary["seconds"] > 0
    first = [record.kl for record in records if record.task == "needle" and record.policy == "knorm"]
    knorm = next(summary for summary in rows if (summary["task"], summary["policy"]) == ("needle", "knorm"))
    assert knorm["kl"] == pytest.approx(sum(first) / 2)


def test_markdown_has_a_table_for_each_length_and_budget(model, tokenizer, builder, texts):
    cells = parse_cells(["full", "knorm"], [0.5, 0.2])
    records = evaluate(model, tokenizer, [builder.case("needle", 0)], cells)
    records += evaluate(model, tokenizer, [CaseBuilder(tokenizer, texts, 500).case("needle", 0)], cells)
    text = markdown_tables(records)
    assert [line for line in text.splitlines() if line.startswith("**")] == [
        f"**{length} tokens, {budget} kept** (1 cases a cell)" for length in (400, 500) for budget in ("50%", "20%")
    ]
    assert text.count("| full cache |") == text.count("| Knorm |") == 4
    assert "| 0.00 [.00–.79] |" in text


def test_wrong_answers_and_right_answers_are_told_apart(model, tokenizer, builder):
    """The model's own greedy continuation, made the answer, is found; any other is not."""
    case = builder.case("needle", 0)
    (before,) = evaluate(model, tokenizer, [case], [Cell.of("full")])
    assert not before.correct
    (after,) = evaluate(model, tokenizer, [replace(case, answer=before.prediction)], [Cell.of("full")])
    assert after.correct and after.prediction == before.prediction


def test_probe_gives_named_metrics_and_leaves_the_model_as_it_was(model, gates, tokenizer, texts):
    probe = RetrievalProbe(tokenizer, texts, tasks=("needle", "phrase"), length=LENGTH, cases=2, budgets=(0.2, 0.5))
    model.train()
    parameters = [parameter.clone() for parameter in model.parameters()]
    first = probe(model, gates)
    assert set(first) == {
        *(f"eval/{name}@{budget}" for name in ("accuracy", "needle", "phrase") for budget in ("full", "0.2", "0.5")),
        "eval/kl@0.2",
        "eval/kl@0.5",
    }
    assert 0 < first["eval/kl@0.5"] < first["eval/kl@0.2"]
    assert model.training and all(torch.equal(a, b) for a, b in zip(parameters, model.parameters(), strict=True))
    assert probe(model, gates) == first
    with torch.no_grad():
        for parameter in gates.parameters():
            parameter.mul_(-1.0)
    changed = probe(model, gates)
    assert changed["eval/kl@0.2"] != first["eval/kl@0.2"]
    assert changed["eval/accuracy@full"] == first["eval/accuracy@full"]


def test_gates_can_still_be_trained_after_a_probe(model, gates, tokenizer, texts):
    RetrievalProbe(tokenizer, texts, tasks=("needle",), length=LENGTH, cases=1)(model, gates)
    ids = torch.arange(3, 40)[None]
    model(ids, labels=ids).loss.backward()


def test_inputs_are_refused_before_work(model, gates):
    cells = parse_cells(["full", "retention"], [0.2])
    check_inputs(model.config, cells, 800, gates)
    with pytest.raises(ValueError, match=r"contexts of 1000 tokens .* 1024 positions; lengths up to 896"):
        check_inputs(model.config, cells, 1000, gates)
    with pytest.raises(ValueError, match=r"1024 positions; a model with more than 1024 is accepted"):
        check_inputs(model.config, cells, 1000, gates, question_tokens=1024)
    with pytest.raises(ValueError, match="'retention' needs gates"):
        check_inputs(model.config, cells, 800, None)
    with pytest.raises(ValueError, match="at least one policy"):
        check_inputs(model.config, [], 800, gates)


def test_cells_by_name():
    cells = parse_cells(["full", "snapkv:layer", "snapkv"], [0.5, 64])
    assert [cell.key for cell in cells] == [
        ("full", "none", 1.0), ("snapkv", "layer", 0.5), ("snapkv", "layer", 64), ("snapkv", "head", 0.5),
        ("snapkv", "head", 64),
    ]  # fmt: skip
    assert cells[1].label == "AdaKV (no floor)"
    with pytest.raises(ValueError, match="unknown policy 'snapkw'"):
        parse_cells(["snapkw"], [0.2])
    with pytest.raises(ValueError, match="unknown scope 'heads'; known: global, layer, head"):
        parse_cells(["snapkv:heads"], [0.2])
    with pytest.raises(ValueError, match=r"budget 1\.5 is out of range"):
        parse_cells(["snapkv"], [1.5])


def test_names_with_options_and_chunks():
    cells = parse_cells(["snapkv(window=16):layer@256", "retention_defensive(combine=max,kernel=3)"], [0.5])
    assert [cell.key for cell in cells] == [
        ("snapkv(window=16)@256", "layer", 0.5),
        ("retention_defensive(kernel=3,combine=max)", "global", 0.5),
    ]
    assert cells[0].policy == SnapKV(window=16) and cells[0].prefill_chunk == 256
    again = parse_cells([cell.name.partition("@")[0] for cell in cells], [0.5])
    assert [cell.policy for cell in again] == [cell.policy for cell in cells], "a name says all"
    for name, message in (
        ("snapkv@x", "after @ comes the number"),
        ("snapkv@0", "chunks must have at least 1 token, got 0"),
        ("snapkv(16)", "options are OPTION=VALUE"),
        ("snapkv(width=16)", "has no option width; known: window"),
        ("snapkv(", "is not understood"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_cells([name], [0.5])


def test_presets_by_name():
    cells = parse_cells(["snapkv+defensivekv", "layer_defensive+defensivekv", "retention+trimkv@256"], [0.5])
    assert [cell.name for cell in cells] == [
        "snapkv(window=32)+defensivekv", "layer_defensive+defensivekv", "retention+trimkv@256"
    ]  # fmt: skip
    assert [cell.scope for cell in cells] == ["head", "global", "head"]
    plan = cells[1].plan(make_plan("knorm", sinks=4), 9)
    assert (plan.sinks, plan.schedule, plan.rules.rounding, plan.buffer) == (0, "once", "group", 9)
    for name, message in (
        ("snapkv+none", "unknown preset 'none'; known: defensivekv"),
        ("snapkv+defensivekv@64", "preset 'defensivekv' has prefill_chunk=None, got 64"),
        ("snapkv+kvpress:layer", "preset 'kvpress' has scope='head', got 'layer'"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_cells([name], [0.5])


def test_a_cell_with_a_preset_keeps_what_evict_keeps(model, tokenizer, builder):
    case, kept = builder.case("needle", 0), []
    cells = parse_cells(["layer_defensive+defensivekv", "layer_defensive"], [0.45])
    evaluate(
        model, tokenizer, [case], cells,
        inspect=lambda case, cell, cache: kept.append([[head.tolist() for head in cache.kept(n)[0]] for n in range(3)]),
    )  # fmt: skip
    with torch.no_grad(), evict(model, preset="defensivekv", budget=0.45) as session:
        cache = session.new_cache()
        session.extend(cache, case.context_ids)
        assert kept[0] == [[head.tolist() for head in cache.kept(n)[0]] for n in range(3)]
    assert kept[0] != kept[1]


def test_a_context_in_chunks_is_compressed_after_each(model, gates, tokenizer, builder):
    case = builder.case("needle", 0)
    names = ["retention", "retention@64", "streaming_llm@64"]
    peaks = {}
    records = evaluate(
        model, tokenizer, [case], parse_cells(names, [0.2]), gates,
        inspect=lambda case, cell, cache: peaks.update({cell.name: cache.report().peak_entries}),
    )  # fmt: skip
    assert [record.policy for record in records] == names
    segments = 3 * 2
    assert len({record.entries for record in records}) == 1 and records[0].entries == segments * LENGTH // 5
    assert peaks["retention"] == segments * LENGTH
    assert peaks["retention@64"] == peaks["streaming_llm@64"] == segments * (LENGTH // 5 + 64)
    assert records[0].kl > 0 and records[1].kl > 0


@pytest.mark.parametrize("name", ["snapkv(window=16)", "retention", "knorm", "h2o"])
def test_a_question_aware_cell_is_a_prompt_read_with_its_question(name, model, gates, tokenizer, builder):
    """As a served model reads it: question and context in one forward, then the eviction."""
    case = builder.case("needle", 2)
    (found,) = evaluate(model, tokenizer, [case], parse_cells([name], [0.2], aware=(True,)), gates)
    prompt, answer = row([*case.context_ids, *case.question_ids]), row(case.answer_ids)
    with torch.no_grad():
        full = model(torch.cat([prompt, answer], 1)).logits[0, prompt.shape[1] :]
        policy = parse_cells([name], [0.2])[0].policy
        with evict(model, policy, 0.2, gates=gates, buffer=64, observe=["retention"]) as session:
            cache = session.new_cache()
            model(prompt, past_key_values=cache)
            entries = cache.report().entries
            logits = model(answer, past_key_values=cache).logits[0]
    assert found.aware and found.entries == entries
    assert found.kl == pytest.approx(float(kl_to_full(full, logits).mean()), abs=1e-5)
