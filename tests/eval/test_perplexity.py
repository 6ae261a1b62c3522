"""Fidelity of streamed documents and of attention, against plain forwards and by hand."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from tenure.eval import CaseBuilder, Cell, kl_to_full, parse_cells
from tenure.eval.attention_coverage import Watch, attention_rows, examine
from tenure.eval.perplexity import draw_documents, stream, stream_rows
from tenure.eviction import evict
from tenure.retention import RetentionGates
from tenure.scripts import cli
from tenure.scripts.fidelity import FidelityConfig


@pytest.fixture
def model(tiny_model):
    return tiny_model("llama", vocab_size=512, max_position_embeddings=1024)


@pytest.fixture
def documents(tokenizer, texts):
    return draw_documents(tokenizer, texts, 3, 150)


def test_documents_are_exact_and_drawn_by_seed(tokenizer, texts, documents):
    assert [len(ids) for ids in documents] == [150] * 3 and len(set(documents)) == 3
    assert draw_documents(tokenizer, texts, 3, 150) == documents
    assert draw_documents(tokenizer, texts, 3, 150, seed=1) != documents
    with pytest.raises(ValueError, match="at least 2 tokens to predict one, got 1"):
        draw_documents(tokenizer, texts, 1, 1)


def test_streaming_is_plain_forwards_and_one_eviction_a_chunk(model, documents):
    cells = parse_cells(["full", "knorm", "streaming_llm"], [0.3])
    results = stream(model, documents[:1], cells, chunk=32)
    ids = torch.tensor([documents[0]])
    with torch.no_grad():
        plain = model(ids).logits[0]
        with evict(model, cells[1].policy, 0.3, "head", buffer=0) as session:
            cache = session.new_cache()
            parts = [model(part, past_key_values=cache).logits[0] for part in ids.split(32, dim=1)]
            entries = cache.report().entries
    own = torch.cat(parts)
    targets = ids[0, 1:, None]
    full, knorm, streaming = results
    assert full.kl.max() < 1e-6 and full.top1.all() and len(full.kl) == 149
    nll = -torch.log_softmax(plain[:-1], -1).gather(1, targets).squeeze(1)
    assert np.allclose(full.nll, nll.numpy(), atol=1e-4) and np.array_equal(full.nll, knorm.full_nll)
    assert np.allclose(knorm.kl, kl_to_full(plain, own)[:-1].numpy(), atol=1e-5)
    assert knorm.kl[:32].max() < 1e-6, "nothing is evicted before the first chunk has been read"
    assert knorm.kl[33:].max() > 1e-3 and not np.array_equal(knorm.kl, streaming.kl)
    assert knorm.entries == entries == int(0.3 * 150) * 6
    assert knorm.kept.shape == (3, 2) and knorm.kept == pytest.approx(np.full((3, 2), 0.3))


def test_rows_have_intervals_everywhere(model, documents):
    results = stream(model, documents, parse_cells(["full", "knorm"], [0.2]), chunk=40)
    full, knorm = stream_rows(results, bins=4)
    assert list(knorm)[:7] == ["task", "length", "policy", "scope", "budget", "aware", "n"]
    assert (knorm["task"], knorm["length"], knorm["n"]) == ("stream", 150, 3)
    for name in ("kl", "top1", "perplexity", "perplexity_ratio"):
        assert knorm[name]["low"] <= knorm[name]["value"] <= knorm[name]["high"]
    nll = np.mean([one.nll.mean() for one in results if one.cell.evicts])
    assert knorm["perplexity"]["value"] == pytest.approx(math.exp(nll))
    assert full["perplexity_ratio"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert knorm["perplexity_ratio"]["value"] == pytest.approx(
        knorm["perplexity"]["value"] / full["perplexity"]["value"], rel=1e-6
    )
    spans = [(part["start"], part["stop"]) for part in knorm["by_position"]]
    assert spans == [(0, 37), (37, 74), (74, 111), (111, 149)]
    assert knorm["by_position"][0]["kl"]["value"] == 0.0 < knorm["by_position"][-1]["kl"]["value"]
    assert np.shape(knorm["heads"]) == (3, 2) and knorm["kept_share"] == pytest.approx(0.2)
    json.dumps([full, knorm])


def test_streams_refuse_what_they_cannot_do(model, documents):
    with pytest.raises(ValueError, match="a chunk must have at least 1 token, got 0"):
        stream(model, documents, [Cell.of("full")], chunk=0)
    with pytest.raises(ValueError, match="a streamed document has no question"):
        stream(model, documents, [Cell.of("snapkv", 0.5, aware=True)])


def attention_by_hand(model, ids: list[int], last: int) -> torch.Tensor:
    """`(layers, heads, last, tokens)` of a plain forward."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        found = model(torch.tensor([ids]), output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    return torch.stack([layer[0, :, -last:] for layer in found])


def test_coverage_and_evidence_are_those_of_the_models_attention(model, tokenizer, texts):
    case = CaseBuilder(tokenizer, texts, 300).case("needle", 1)
    cells = parse_cells(["full", "snapkv", "streaming_llm"], [0.3])
    kept, streaming = examine(model, [case], cells)
    asked = [*case.question_ids, *case.answer_ids][:-1]
    queries = len(case.answer_ids)
    attention = attention_by_hand(model, [*case.context_ids, *asked], queries)
    start, stop = case.facts[0]
    assert kept.full_evidence == pytest.approx(float(attention[..., start:stop].sum(-1).mean()), abs=1e-6)
    with torch.no_grad(), evict(model, "full", observe=(Watch(), *(cell.policy for cell in cells[1:]))) as session:
        context = session.new_cache()
        model(torch.tensor([case.context_ids]), past_key_values=context)
        for cell, found in zip(cells[1:], (kept, streaming), strict=True):
            cache = context.fork().compress(cell.policy, cell.budget, cell.scope)
            mask = torch.zeros(3, 2, case.length)
            for layer in range(3):
                for head, positions in enumerate(cache.kept(layer)[0]):
                    mask[layer, head, positions] = 1.0
            seen = attention[..., : case.length].view(3, 2, 2, queries, case.length)
            share = (seen * mask[:, :, None, None]).sum(-1) / seen.sum(-1)
            assert np.allclose(found.coverage, share.mean((2, 3)).numpy(), atol=1e-4)
            assert np.allclose(found.worst, share.amin((2, 3)).numpy(), atol=1e-4)
            assert found.kept == pytest.approx(np.full((3, 2), 0.3))
            held = mask[..., start:stop].sum(-1)
            if not held.any():
                assert found.evidence == 0.0
    assert 0 < kept.coverage.min() <= kept.coverage.max() <= 1.0
    assert kept.evidence != kept.full_evidence


def test_everything_kept_covers_everything(model, tokenizer, texts):
    case = CaseBuilder(tokenizer, texts, 300).case("needle", 0)
    (found,) = examine(model, [case], [Cell.of("knorm", 1.0)])
    assert found.coverage == pytest.approx(np.ones((3, 2))) and found.evidence == pytest.approx(found.full_evidence)


def test_attention_rows(model, tokenizer, texts):
    cases = list(CaseBuilder(tokenizer, texts, 700).cases(["needle", "fwe"], 2))
    rows = attention_rows(examine(model, cases, parse_cells(["snapkv"], [0.5, 0.2])))
    assert [(row["task"], row["budget"], row["n"]) for row in rows] == [
        ("needle", 0.5, 2), ("needle", 0.2, 2), ("fwe", 0.5, 2), ("fwe", 0.2, 2),
    ]  # fmt: skip
    half, fifth = rows[:2]
    assert half["coverage"]["value"] > fifth["coverage"]["value"] >= fifth["worst_head"]["value"] >= fifth["least"]
    assert half["outliers"] == round(half["below_half"]["value"] * 2 * 3 * 2) <= fifth["outliers"] > 0
    assert half["dilution"]["value"] == pytest.approx(1 - half["evidence"]["value"])
    gain = half["evidence_gain"]
    assert gain["value"] == pytest.approx(half["evidence"]["value"] - half["full_evidence"]["value"])
    assert gain["low"] <= gain["value"] <= gain["high"] and 0 < gain["p_value"] <= 1
    assert "evidence" not in rows[2], "nothing is planted there"
    assert np.shape(half["heads"]) == (3, 2)
    json.dumps(rows)
    with pytest.raises(ValueError, match="before the question: leave out other cells"):
        examine(model, cases, [Cell.of("snapkv", 0.5, aware=True)])


def test_the_command_writes_every_row(model, tokenizer, texts, tmp_path):
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("\n\n".join(texts))
    flags = [
        "fidelity", "--model", str(tmp_path / "model"), "--data", str(tmp_path / "text.txt"), "--length", "300",
        "--documents", "2", "--cases", "1", "--tasks", "needle", "--policies", "full", "snapkv", "--budgets", "0.3",
        "--out", str(tmp_path / "out"), "--device", "cpu",
    ]  # fmt: skip
    assert cli.main(flags) == 0
    written = json.loads((tmp_path / "out" / "fidelity.json").read_text())
    assert [row["policy"] for row in written["stream"]] == ["full", "snapkv"]
    assert [row["policy"] for row in written["attention"]] == ["snapkv"]
    assert written["settings"]["config"]["length"] == 300 and written["settings"]["versions"]["tenure"]
    assert cli.main([*flags, "--sinks", "150", "--recent", "0", "--cases", "0"]) == 0
    _, other = json.loads((tmp_path / "out" / "fidelity.json").read_text())["stream"]
    assert other["kl"] != written["stream"][1]["kl"] and other["entries"] == written["stream"][1]["entries"]
    assert cli.main([*flags, "--budgets", "64", "--documents", "0"]) == 0
    (row,) = json.loads((tmp_path / "out" / "fidelity.json").read_text())["attention"]
    assert row["budget"] == 64 and np.mean(row["heads"]) == pytest.approx(64 / 300, abs=1e-3)


def test_what_the_command_refuses_before_the_model_is_loaded(model, tiny_model, tokenizer, texts, tmp_path, capsys):
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    for weights in (tmp_path / "model").glob("*.safetensors"):
        weights.unlink()  # a load would fail otherwise
    (tmp_path / "text.txt").write_text("\n\n".join(texts))
    RetentionGates.for_model(tiny_model("llama", hidden_size=16), gate_width=8).save_pretrained(tmp_path / "gates")
    flags = [
        "fidelity", "--model", str(tmp_path / "model"), "--data", str(tmp_path / "text.txt"), "--length", "300",
        "--policies", "full", "snapkv", "--out", str(tmp_path / "out"),
    ]  # fmt: skip
    capsys.readouterr()  # what saving the model has shown
    for wrong, message in (
        (["--length", "2000"], "exceed the model's 1024 positions"),
        (["--length", "60"], "too short for task 'niah_single_2': give at least"),
        (["--policies", "snapkw"], "unknown policy 'snapkw'; known: "),
        (["--policies", "snapkv@64"], "leave out the @CHUNK"),
        (["--policies", "full", "--documents", "0"], "--policies names nothing that evicts"),
        (["--policies", "retention"], "the shipped gates fit the demo model only: give --gates"),
        (["--policies", "retention", "--gates", str(tmp_path / "gates")], "do not fit this model: hidden_size 16"),
        (["--budgets", "1.5"], "budget 1.5 is out of range"),
        (["--tasks", "nothing"], "unknown task 'nothing'"),
        (["--device", "gpu"], "--device has 'gpu'; cpu, cuda, cuda:1 and so on are accepted"),
        (["--device", "cuda:99"], "--device has 'cuda:99'; this machine has "),
        (["--data", "no/text"], "no file or folder 'no/text'"),
        (["--out", str(tmp_path / "text.txt")], "text.txt"),
    ):
        assert cli.main([*flags, *wrong]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("tenure fidelity: ") and message in line


def test_numbers_of_protected_tokens_are_checked():
    with pytest.raises(ValueError, match="--sinks and --recent take 0 or more"):
        FidelityConfig(sinks=-1)
