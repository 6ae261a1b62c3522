"""The quick form of `tenure soak --engine-steps … --engine-seconds …`, and what its checks see."""

from __future__ import annotations

from random import Random

import pytest

from tenure.scripts.soak.engine_world import Answers, EngineWorld, clients_life, engine_life, tiny_answers

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def answers():
    with tiny_answers() as found:
        yield found


def test_lives_of_an_engine(answers: Answers):
    counts = sum((engine_life(answers, seed, 150) for seed in range(2)), engine_life(answers, 3, 150))
    assert counts["actions"] == 3 * 150 and counts["submitted"] > 50 and counts["tokens compared"] > 200
    assert counts["restarts"] and counts["cancelled"]


def test_an_engine_behind_clients_in_threads(answers: Answers):
    counts = clients_life(answers, seed=0, seconds=2.0)
    assert counts["clients: requests"] > 5 and counts["clients: tokens compared"] > 20


def test_a_wrong_answer_and_pages_without_an_owner_are_seen(answers: Answers, tmp_path):
    world = EngineWorld(answers, Random(0), tmp_path)
    pages = world.engine.pages.allocate(1)
    with pytest.raises(AssertionError, match=r"held, 0 used"):
        world.check()
    del pages  # which gives them back
    while not world.asked:
        world.submit()
    (number,) = world.asked
    agent, suffix, compressed = world.asked[number]
    world.asked[number] = (agent + 1) % 5, suffix, compressed
    with pytest.raises(AssertionError, match=r"of .* for"):
        world.end()
