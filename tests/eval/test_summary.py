"""Rows and tables of records made by hand."""

from __future__ import annotations

from tenure.eval.summary import kl_intervals, markdown_tables, summarise, table_rows

from .made import made

BOTH = [made(kl=0.25), made(kl=0.75, index=1), made(kl=4.0, aware=True, score=0.0)]
FULL = [made(policy="full", scope="none", budget=1.0, kl=0.0, aware=aware) for aware in (False, True)]


def test_question_aware_cells_stand_apart():
    intervals = kl_intervals([*FULL, *BOTH])
    assert {key: interval.value for key, interval in intervals.items() if key[1] == "knorm"} == {
        (256, "knorm", "head", 0.2, False): 0.5, (256, "knorm", "head", 0.2, True): 4.0
    }  # fmt: skip
    rows = table_rows(summarise([*FULL, *BOTH]), 256, 0.2, aware=True)
    assert {key[0]: [row["kl"] for row in group] for key, group in rows.items()} == {"full": [0.0], "knorm": [4.0]}
    tables = markdown_tables([*FULL, *BOTH]).split("\n\n")
    assert [text for text in tables if text.startswith("**")] == [
        "**256 tokens, 20% kept** (1-2 cases a cell)", "**256 tokens, 20% kept, question-aware** (1 cases a cell)"
    ]  # fmt: skip
    assert "| Knorm | 1.00 [.34–1.00] | 0.500 [" in tables[1] and "| 4.000 [" not in tables[1]
    assert "| Knorm | 0.00 [.00–.79] | 4.000 [4.000, 4.000] |" in tables[3]


def test_a_task_that_a_policy_lacks_leaves_its_column_empty():
    records = [made(task="vt"), made(task="qa_1"), made(task="qa_1", policy="tova", score=0.0)]
    lines = markdown_tables(records).splitlines()
    assert lines[2].startswith("| policy | vt | qa_1 | KL")
    assert lines[5].startswith("| TOVA | – | 0.00 [.00–.79] | 0.250")
