"""Why a prompt is not found: every way of leaving the cache is told, and nothing about other clients."""

from __future__ import annotations

import pytest

from tenure.serving import LRU, AllocStatus, Tier, TierPolicy, WriteBack
from tenure.serving.kvcache.eviction_history import ComputedSpan, EvictionHistoryConfig, MissReason
from tenure.serving.kvcache.miss_reasons import explain_misses
from tenure.serving.kvcache.radix_tree import encode

from ..conftest import later

A, B = [1, 1, 2, 2, 3, 3], [1, 1, 2, 2, 9, 9]
C = [7, 7, 8, 8, 9, 9]


def reasons(tiers, prompt, **options):
    """Start, end and reason of each span behind what is found."""
    options.setdefault("found", tiers.lookup(prompt, options.get("namespace")).length)
    return [(each.start, each.end, each.reason) for each in explain_misses(tiers, prompt, **options)]


def test_what_was_never_there(make_tiers, cached):
    tiers = make_tiers(device=20)
    assert reasons(tiers, A) == [(0, 6, MissReason.NEVER_SEEN)]
    assert cached(tiers, A)
    assert reasons(tiers, A) == []
    assert reasons(tiers, B) == [(4, 6, MissReason.NEVER_SEEN)]
    assert reasons(tiers, [1]) == [], "less than a page"


def test_what_was_evicted_when_and_for_whom(make_tiers, cached):
    tiers = make_tiers(device=6)
    assert cached(tiers, A)
    with tiers.history.acting_for("team", "writer"):
        assert cached(tiers, C)
    tiers.clock.advance_to(5.0)
    assert explain_misses(tiers, A, client="team") == [ComputedSpan(0, 6, MissReason.EVICTED, 5.0, "writer")]
    # To others it is neither told when nor for whom, as that is another client's matter.
    assert explain_misses(tiers, A, client="other") == [ComputedSpan(0, 6, MissReason.EVICTED)]
    assert explain_misses(tiers, A) == [ComputedSpan(0, 6, MissReason.EVICTED)]
    assert reasons(tiers, A, namespace="salt") == [(0, 6, MissReason.NEVER_SEEN)], "of another namespace"


def test_only_the_tokens_that_were_evicted_are_told_as_such(make_tiers, cached):
    """The prompts share a beginning, which was cut out of the evicted span afterwards."""
    tiers = make_tiers(device=6)
    assert cached(tiers, A) and cached(tiers, C)
    assert cached(tiers, A[:2])
    assert tiers.lookup(A).length == 2
    assert reasons(tiers, A) == [(2, 6, MissReason.EVICTED)]
    assert reasons(tiers, B) == [(2, 4, MissReason.EVICTED), (4, 6, MissReason.NEVER_SEEN)]
    assert reasons(tiers, [5, 5, *A[2:]]) == [(0, 6, MissReason.NEVER_SEEN)], "the same tokens behind others"


def test_an_evicted_span_with_another_page_in_its_place(make_tiers, cached):
    tiers = make_tiers(device=6)
    assert cached(tiers, A) and cached(tiers, C)
    tiers.clock.advance_to(10.0)
    assert cached(tiers, [1, 1, 2, 2, 4, 4]) and cached(tiers, C)
    assert reasons(tiers, A) == [(0, 4, MissReason.EVICTED), (4, 6, MissReason.NEVER_SEEN)]


def test_what_is_evicted_with_its_beginning(make_tiers, cached, kv):
    tiers = make_tiers(device=4, host=2, policy=TierPolicy(LRU(), WriteBack.ALL))
    assert cached(tiers, A[:2]) and cached(tiers, A[:4])
    for token in (7, 8, 9):
        while not cached(tiers, [token] * 4):
            later(tiers)
    assert tiers.lookup(A).length == 0
    assert {reason for _, _, reason in reasons(tiers, A[:4])} == {MissReason.EVICTED}


def test_an_ended_session_and_a_flush(make_tiers, cached):
    tiers = make_tiers(device=6)
    assert cached(tiers, A)
    tiers.demote(A)
    assert cached(tiers, C)
    assert reasons(tiers, A) == [(0, 6, MissReason.RELEASED)]
    tiers.flush()
    tiers.clock.advance_to(3.0)
    assert explain_misses(tiers, C) == [ComputedSpan(0, 6, MissReason.FLUSHED, 3.0)]
    assert len(tiers.history) == 2


def test_a_damaged_file_and_what_lies_behind_it(make_tiers, cached, kv, tmp_path):
    tiers = make_tiers(device=4, disk=100_000, policy=TierPolicy(LRU(), WriteBack.ALL))
    assert cached(tiers, A[:2], agent="a", fixed=2)
    assert cached(tiers, A[:4], agent="b", fixed=4)
    while tiers.lookup(A).length == 0 or any(n.copies[Tier.DEVICE] is not None for n in tiers.lookup(A).nodes):
        cached(tiers, [9] * 4)
        later(tiers)
    first, second = tiers.lookup(A[:4]).nodes
    first.copies[Tier.DISK].file.path.write_bytes(b"")
    with tiers.open(A[:4]) as handle:
        handle.load()
        later(tiers)
        handle.load()
        later(tiers)
        assert not first.has_data
    assert second.has_data
    assert reasons(tiers, A[:4]) == [(0, 2, MissReason.LOST), (2, 4, MissReason.BEHIND_GAP)]


def test_a_part_of_a_compressed_prompt(make_tiers, cached):
    tiers = make_tiers(device=20)
    assert cached(tiers, A, compressed=True)
    assert reasons(tiers, B) == [(0, 4, MissReason.NOT_DIVISIBLE), (4, 6, MissReason.NEVER_SEEN)]
    with tiers.open(B):  # the node is split in two, the upper one without data
        assert reasons(tiers, B) == [(0, 4, MissReason.NOT_DIVISIBLE), (4, 6, MissReason.NEVER_SEEN)]
    assert cached(tiers, B, compressed=True)
    assert reasons(tiers, [1, 1, 2, 2]) == [(0, 4, MissReason.NOT_DIVISIBLE)]


def test_an_evicted_compressed_prompt_is_told_as_a_whole(make_tiers, cached):
    tiers = make_tiers(device=8)
    assert cached(tiers, A, compressed=True) and cached(tiers, B, compressed=True)
    for token in (5, 6):
        assert cached(tiers, [token] * 8)
    assert reasons(tiers, A) == [(0, 6, MissReason.EVICTED)]


def test_a_span_that_is_being_copied(make_tiers, cached):
    tiers = make_tiers(device=6, host=20, policy=TierPolicy(LRU(), WriteBack.ALL))
    assert cached(tiers, A)
    assert not cached(tiers, C), "room is made by copying the other one down"
    assert tiers.has_transfers
    assert reasons(tiers, B) == [(0, 4, MissReason.BEING_COPIED), (4, 6, MissReason.NEVER_SEEN)]
    later(tiers)
    assert reasons(tiers, B) == [(4, 6, MissReason.NEVER_SEEN)]


def test_other_namespaces_come_after_what_is_known_of_the_own_one(make_tiers, kv):
    tiers = make_tiers(device=12)
    with tiers.open(A, "salt") as handle:
        assert tiers.store(handle, A, kv.of(A, 0, 6)) is AllocStatus.READY
    others = [("gone", MissReason.OTHER_NAMESPACE), ("salt", MissReason.OTHER_COMPRESSION)]
    assert reasons(tiers, A, others=others) == [(0, 6, MissReason.OTHER_COMPRESSION)]
    assert reasons(tiers, B, others=others) == [(0, 4, MissReason.OTHER_COMPRESSION), (4, 6, MissReason.NEVER_SEEN)]
    tiers.history.record_tokens(None, encode(A, 2), 2, tiers.clock(), MissReason.NO_ROOM, ("", None))
    assert reasons(tiers, A, others=others) == [(0, 2, MissReason.OTHER_COMPRESSION), (2, 6, MissReason.NO_ROOM)]


def test_the_record_is_bounded_and_says_that_it_forgets(make_tiers, cached):
    tiers = make_tiers(device=6)
    tiers.history.config = EvictionHistoryConfig(max_records=3)
    for token in range(10):
        assert cached(tiers, [token] * 6)
    assert len(tiers.history) == 3 and tiers.history.num_dropped == 6
    assert reasons(tiers, [0] * 6) == [(0, 6, MissReason.FORGOTTEN)]
    assert reasons(tiers, [8] * 6) == [(0, 6, MissReason.EVICTED)]
    tiers.history.config = EvictionHistoryConfig(max_bytes=60)
    for token in range(10):
        assert cached(tiers, [token] * 6)
    assert len(tiers.history) == 2
    tiers = make_tiers(device=6)
    tiers.history.config = EvictionHistoryConfig(max_records=0)
    for token in range(10):
        assert cached(tiers, [token] * 6)
    assert len(tiers.history) == 0
    tiers.flush()
    assert len(tiers.history) == 0


def test_a_span_that_is_evicted_again_is_one_record(make_tiers, cached):
    tiers = make_tiers(device=6)
    for _ in range(20):
        assert cached(tiers, A) and cached(tiers, C)
    assert len(tiers.history) == 2 and tiers.history.num_dropped == 0


@pytest.mark.parametrize("fields", [{"max_records": -1}, {"max_bytes": 0}, {"max_records": 1.5}])
def test_bounds_that_are_refused(fields):
    with pytest.raises(ValueError, match="accepted"):
        EvictionHistoryConfig(**fields)
