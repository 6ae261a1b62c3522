"""`tenure bench models`: right, refused and wrong models in its table, and the page that holds it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tenure.scripts.bench import bench_models
from tenure.scripts.bench.bench_models import BEGIN, CHECKS, END, ModelsBenchConfig, check, main, table
from tenure.scripts.bench.tiny_models import TEXT_ARCHITECTURES
from tenure.scripts.bench.tiny_vision_models import VISION_MODELS

PAGE = Path(__file__).resolve().parents[2] / "docs/reference/models.md"


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "deepseek_v3"])
def test_supported_models_pass_every_check_but_packing(name: str) -> None:
    row = check(name, TEXT_ARCHITECTURES[name].build)
    assert table([row]).splitlines()[2] in PAGE.read_text().splitlines(), "the page is of another version"
    assert not row.faults and set(row.results) == set(CHECKS)
    assert all(row.results[kind] == "ok" for kind in CHECKS if kind != "packing")


def test_refusals_give_their_reason() -> None:
    rows = [check(name, TEXT_ARCHITECTURES[name].build) for name in ("hrm_text", "jamba")]
    rows.append(check("gemma3", VISION_MODELS["gemma3"]))
    assert not any(row.faults for row in rows)
    lines = table(rows).splitlines()[2:]
    documented = PAGE.read_text().replace("| gemma3 (images) |", "| gemma3 |").splitlines()
    assert [line for line in lines if line not in documented] == [], "the page is of another version"
    assert lines[0] == "| hrm_text | – |" + " – |" * 7 + " several of its attention layers share the cache layer 0 |"
    assert lines[1].startswith("| jamba | 2 of 4 | ✓ | ✓ | – | – | ✓ | – | – | question: its state-space")
    assert "prompts: hidden states after it differ from those of the whole text; packing: the state in its" in lines[1]
    assert lines[2].startswith("| gemma3 | 2 of 4 | ✓ | ✓ | ✓ | – | ✓ | ✓ | ✓ | chunks: a prompt longer than")


def test_wrong_results_and_crashes_are_faults(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    from tenure.eviction import cache_layer

    real = cache_layer.ragged_attention
    monkeypatch.setattr(cache_layer, "ragged_attention", lambda *given: real(*given) * 1.01)
    row = check("llama", TEXT_ARCHITECTURES["llama"].build)
    assert set(row.faults) == {"generate", "question", "chunks"}
    assert row.faults["generate"].startswith("WrongResultError: differs by ")
    assert "| FAULT | ✓ | FAULT | FAULT | ✓ |" in table([row])
    monkeypatch.setattr(cache_layer, "ragged_attention", lambda *given: torch.zeros(1)[3])
    assert main(ModelsBenchConfig(["llama"])) == 1
    assert "IndexError" in capsys.readouterr().out


def test_the_page_is_rewritten_between_its_markers(tmp_path: Path) -> None:
    page = tmp_path / "models.md"
    with pytest.raises(ValueError, match=r"accepted: a Markdown file with the lines <!-- models -->"):
        main(ModelsBenchConfig(["llama"], page))
    page.write_text(f"# Models\n\n{BEGIN}\nold\n{END}\n\nlast\n")
    assert main(ModelsBenchConfig(["hrm_text"], page)) == 0
    text = page.read_text()
    assert text.startswith("# Models\n") and text.endswith(f"{END}\n\nlast\n")
    assert "old" not in text and "| hrm_text |" in text
    with pytest.raises(ValueError, match="got the architectures lama; accepted: afmoe, "):
        main(ModelsBenchConfig(["lama"]))


def test_the_documented_table_names_every_architecture_and_no_fault() -> None:
    text = PAGE.read_text().split(BEGIN)[1]
    names = [*TEXT_ARCHITECTURES, *(f"{name} (images)" for name in VISION_MODELS)]
    assert [name for name in names if f"\n| {name} |" not in text] == []
    assert "FAULT" not in text
    assert bench_models.__doc__ is not None
