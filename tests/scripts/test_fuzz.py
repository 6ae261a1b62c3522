"""Hostile variants of every file and text that is read: refused in one sentence, or right; within time and memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

from tenure.scripts.soak import mutations
from tenure.scripts.soak.reader import Reader, require
from tenure.scripts.soak.run_fuzz import FuzzConfig, is_sentence, outcome_of, time_limit_handler

ATTEMPTS = 1500


def test_no_variant_gives_a_traceback_a_hang_or_a_wrong_result(tmp_path: Path):
    """In a process of its own, whose memory is limited; `tenure soak fuzz` is the same with more variants."""
    out = tmp_path / "counts.json"
    command = [sys.executable, "-m", "tenure", "soak", "fuzz", "--attempts", str(ATTEMPTS), "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    found = json.loads(out.read_text())
    assert (found["attempts"], found["failures"]) == (ATTEMPTS, 0)
    assert len(found["readers"]) > 15 and all(sum(counts.values()) for counts in found["readers"].values())
    refused, accepted = (
        sum(counts.get(kind, 0) for counts in found["readers"].values()) for kind in ("refused", "accepted")
    )
    assert refused > accepted > ATTEMPTS / 20, "variants are neither harmless nor all broken beyond reading"


def test_a_variant_is_the_same_in_every_run():
    data = json.dumps({"a": [1, {"b": "c"}], "d": None}).encode()
    for name in ("x.json", "x.jsonl", "x.txt"):
        one, other = ([mutations.mutated(Random(f"7/{n}"), name, data) for n in range(200)] for _ in range(2))
        assert one == other and len(set(one)) > 100


@pytest.mark.parametrize(
    ("read", "outcome"),
    [
        (lambda at: None, "accepted"),
        (lambda at: int("x"), "refused"),
        (lambda at: {}["x"], "KeyError"),
        (lambda at: [0] * 10**15, "over the memory"),
        (lambda at: json.loads("[" * 10**6), "RecursionError"),
        (lambda at: require(False, "is wrong"), "accepted, but is wrong"),
    ],
)
def test_outcomes(read, outcome: str, tmp_path: Path):
    assert outcome_of(Reader("x", {}, read), tmp_path, 10.0)[0] == outcome


def test_a_hang_is_ended(tmp_path: Path):
    def hang(folder: Path) -> None:
        while True:
            pass

    with time_limit_handler():
        assert outcome_of(Reader("x", {}, hang), tmp_path, 0.05)[0] == "over the time"


def test_a_sentence_is_a_bounded_line(tmp_path: Path):
    assert is_sentence(f"got 3 in {tmp_path}/a.json; accepted: 4", tmp_path)
    for message in ("", "two\nlines", "x" * 5000, "a \x1b[31mcolour"):
        assert not is_sentence(message, tmp_path)


def test_what_is_asked_for_is_checked():
    with pytest.raises(ValueError, match="--attempts, --seconds and --memory-gb take numbers above 0"):
        FuzzConfig(attempts=0)
