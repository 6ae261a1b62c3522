"""Ten thousand random steps on whole caches, each compared with a dense mirror that keeps plain lists."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from tenure.eviction import LayerView, Policy, RaggedCache, Session, evict

LAYERS, HEADS, DIM = 2, 2, 8
BUDGET, BUFFER, SINKS, RECENT = 6, 3, 1, 1
EXAMPLES, STEPS = 260, 50  # some examples end early: the steps are counted


@dataclass(frozen=True)
class FirstNumber(Policy):
    """Keeps the entries whose values begin with the largest number."""

    name = "first_number"
    needs = frozenset({"values"})

    def score(self, view: LayerView) -> torch.Tensor:
        return view.values[..., 0].float()


@dataclass(frozen=True)
class Entry:
    """One entry: its position, its number, which is in key and value, and its state."""

    position: int
    number: float

    @property
    def state(self) -> float:
        return -self.number


@dataclass
class Row:
    """The content a row must hold; `columns` says of each column seen whether its token was real.

    `floor` is how many there were when its cache last evicted.
    """

    columns: list[bool] = field(default_factory=list)
    segments: list[list[Entry]] = field(default_factory=lambda: [[] for _ in range(LAYERS * HEADS)])
    floor: int = 0

    @property
    def tokens(self) -> int:
        return sum(self.columns)

    def copy(self) -> Row:
        return Row(list(self.columns), [list(one) for one in self.segments], self.floor)

    def evict(self, budget: int, scope: str) -> None:
        """Keeps the best by sorting: protected entries, then large numbers, which are all different."""
        width = {"global": LAYERS * HEADS, "layer": HEADS, "head": 1}[scope]
        for first in range(0, LAYERS * HEADS, width):
            group = [
                (self._rank(entry), index) for index in range(first, first + width) for entry in self.segments[index]
            ]
            chosen = {(rank, index) for rank, index in sorted(group)[-budget * width :]}
            for index in range(first, first + width):
                self.segments[index] = [one for one in self.segments[index] if (self._rank(one), index) in chosen]

    def _rank(self, entry: Entry) -> tuple[bool, float]:
        return entry.position < SINKS or entry.position >= self.tokens - RECENT, entry.number

    def taken_back(self, count: int) -> Row | None:
        """The row without its newest `count` columns; None if something was evicted since."""
        left = len(self.columns) - count
        if count and left < self.floor:
            return None
        less = sum(self.columns[left:])
        return Row(self.columns[:left], [one[: len(one) - less] for one in self.segments], self.floor)


class CacheMachine(RuleBasedStateMachine):
    """Several caches of one session that share storage through forks, each beside its rows."""

    session: Session  # set by the test
    steps = 0

    def __init__(self) -> None:
        super().__init__()
        self.pairs: list[tuple[RaggedCache, list[Row]]] = []
        self.made = 0

    def numbers(self, batch: int, n: int, layer: int) -> torch.Tensor:
        """`(batch, HEADS, n)` different numbers in an order that is not theirs in time."""
        index = torch.arange(batch * HEADS * n) + self.made
        self.made += batch * HEADS * n
        return (index * 7919 % 104729).view(batch, HEADS, n) + 0.25 * layer

    @contextmanager
    def forward(self, cache: RaggedCache, n: int, valid: torch.Tensor | None, batch: int) -> Iterator[list]:
        """The calls a model's forward makes; gives the entries that it stores, by `[row][segment]`."""
        step = cache.begin_step(batch, n, valid, torch.device("cpu"))
        fresh: list[list[list[Entry]]] = [[] for _ in range(batch)]
        for layer in range(LAYERS):
            values = self.numbers(batch, n, layer)
            cache.open_layer(layer, {"log_beta": -values})
            key = values.unsqueeze(-1).expand(-1, -1, -1, DIM)
            cache.ragged[layer].update(key + 0.5, key.clone())
            for row in range(batch):
                real = [i for i in range(n) if valid is None or valid[row, i]]
                for head in range(HEADS):
                    fresh[row].append([Entry(int(step.positions[row, i]), values[row, head, i].item()) for i in real])
        yield fresh

    def run(self, cache: RaggedCache, rows: list[Row], n: int, pads: list[int]) -> None:
        valid = torch.tensor([[i >= pad for i in range(n)] for pad in pads]) if any(pads) else None
        with self.forward(cache, n, valid, len(rows)) as fresh:
            cache.end_step(completed=True)
        self.appended(cache, rows, fresh, n, pads)

    def appended(self, cache: RaggedCache, rows: list[Row], fresh: list, n: int, pads: list[int]) -> None:
        """Puts what a forward of `n` columns stored into its rows, and evicts from them where due."""
        evicted = False
        for row, more, pad in zip(rows, fresh, pads, strict=True):
            prompt = row.tokens == 0
            row.columns += [i >= pad for i in range(n)]
            row.segments = [old + new for old, new in zip(row.segments, more, strict=True)]
            stored = sum(map(len, row.segments))
            if n > pad and stored > (BUDGET if prompt else BUDGET + BUFFER) * LAYERS * HEADS:
                row.evict(BUDGET, cache.plan.scope)
                evicted = True
        for row in rows:
            row.floor = len(row.columns) if evicted else row.floor

    def pick(self, data) -> tuple[RaggedCache, list[Row]]:
        return self.pairs[data.draw(st.integers(0, len(self.pairs) - 1))]

    @precondition(lambda self: len(self.pairs) < 4)
    @rule(n=st.integers(1, 12), pads=st.lists(st.integers(0, 11), min_size=1, max_size=3),
          scope=st.sampled_from(["global", "layer", "head"]))  # fmt: skip
    def prompt(self, n, pads, scope):
        cache, rows = self.session.new_cache(), [Row() for _ in pads]
        cache.plan = cache.plan.changed(None, None, scope=scope)
        self.run(cache, rows, n, [min(pad, n - 1) for pad in pads])
        self.pairs.append((cache, rows))

    @precondition(lambda self: self.pairs)
    @rule(n=st.sampled_from([1, 1, 1, 2, 5]), padded=st.booleans(), data=st.data())
    def append(self, n, padded, data):
        cache, rows = self.pick(data)
        count = len(rows)
        pads = data.draw(st.lists(st.integers(0, n), min_size=count, max_size=count)) if padded else [0] * count
        self.run(cache, rows, n, pads)

    @precondition(lambda self: self.pairs)
    @rule(accepted=st.integers(1, 4), rejected=st.integers(1, 6), data=st.data())
    def draft(self, accepted, rejected, data):
        """Rejected tokens leave no trace, not even in what is evicted."""
        cache, rows = self.pick(data)
        cache.activate_past_recording()
        with self.forward(cache, accepted + rejected, None, len(rows)) as fresh:
            cache.end_step(completed=True)
        cache.crop(-rejected)
        cache.drafting = False
        first = [[segment[:accepted] for segment in row] for row in fresh]
        self.appended(cache, rows, first, accepted, [0] * len(rows))

    @precondition(lambda self: self.pairs)
    @rule(n=st.integers(1, 3), layers=st.integers(0, LAYERS), data=st.data())
    def a_forward_that_raises(self, n, layers, data):
        cache, rows = self.pick(data)
        cache.begin_step(len(rows), n, None, torch.device("cpu"))
        for layer in range(layers):
            values = self.numbers(len(rows), n, layer)
            cache.open_layer(layer, {"log_beta": values})
            key = values.unsqueeze(-1).expand(-1, -1, -1, DIM)
            cache.ragged[layer].update(key, key.clone())
        cache.end_step(completed=False)

    @precondition(lambda self: self.pairs)
    @rule(budget=st.integers(2, 12), scope=st.sampled_from(["global", "layer", "head"]), data=st.data())
    def evict(self, budget, scope, data):
        cache, rows = self.pick(data)
        plan = cache.plan
        cache.compress(budget=budget, scope=scope)
        cache.plan = plan
        for row in rows:
            row.evict(budget, scope)
            row.floor = len(row.columns)

    @precondition(lambda self: 0 < len(self.pairs) < 4)
    @rule(copied=st.sampled_from([RaggedCache.fork, copy.deepcopy]), data=st.data())
    def fork(self, copied, data):
        cache, rows = self.pick(data)
        self.pairs.append((copied(cache), [row.copy() for row in rows]))

    @precondition(lambda self: self.pairs)
    @rule(data=st.data())
    def roll_back(self, data):
        cache, rows = self.pick(data)
        count = data.draw(st.integers(0, min(6, len(rows[0].columns))))
        shorter = [row.taken_back(count) for row in rows]
        if None in shorter:
            with pytest.raises(ValueError, match="were evicted in the meantime"):
                cache.crop(-count)
        else:
            cache.crop(-count)
            rows[:] = [row for row in shorter if row is not None]

    @precondition(lambda self: self.pairs)
    @rule(data=st.data())
    def reorder(self, data):
        cache, rows = self.pick(data)
        chosen = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=4))
        cache.select_rows(torch.tensor(chosen))
        rows[:] = [rows[row].copy() for row in chosen]

    @precondition(lambda self: 0 < len(self.pairs) < 4)
    @rule(data=st.data())
    def split_the_batch(self, data):
        cache, rows = self.pick(data)
        if not cache.columns_seen:
            return  # an empty cache has no rows yet
        at = data.draw(st.integers(1, len(rows)))
        other = cache.fork()
        self.pairs.append((other, [row.copy() for row in rows[at - 1 :]]))
        other.batch_select_indices(torch.arange(at - 1, len(rows)))
        cache.batch_select_indices(torch.arange(len(rows)) < at)
        rows[:] = rows[:at]

    @precondition(lambda self: self.pairs)
    @rule(data=st.data())
    def reset(self, data):
        cache, rows = self.pick(data)
        cache.reset()
        rows[:] = [Row() for _ in rows]

    @precondition(lambda self: len(self.pairs) > 1)
    @rule(data=st.data())
    def free(self, data):
        self.pairs.pop(data.draw(st.integers(0, len(self.pairs) - 1)))

    @invariant()
    def every_cache_holds_what_its_mirror_holds(self):
        type(self).steps += 1
        for cache, rows in self.pairs:
            cache.check()
            if not cache.stores:
                assert not any(row.columns for row in rows)
                continue
            assert cache.tokens_seen.tolist() == [row.tokens for row in rows]
            assert cache.columns_seen == len(rows[0].columns)
            assert cache.entries == sum(len(segment) for row in rows for segment in row.segments)
            for layer, store in enumerate(cache.stores):
                mine = [segment for row in rows for segment in row.segments[layer * HEADS : (layer + 1) * HEADS]]
                assert store.lengths == [len(segment) for segment in mine]
                index, valid = store.dense_index()
                at = index[valid]
                wanted = [entry for segment in mine for entry in segment]
                numbers = torch.tensor([entry.number for entry in wanted])
                assert store.position[at].tolist() == [entry.position for entry in wanted]
                assert torch.equal(store.value[at], numbers.unsqueeze(1).expand(-1, DIM))
                assert torch.equal(store.key[at], numbers.unsqueeze(1).expand(-1, DIM) + 0.5)
                assert store.buffers["log_beta"][at].tolist() == [entry.state for entry in wanted]


@pytest.mark.timeout(900)  # a minute where nothing else runs
def test_ten_thousand_steps(tiny_model, gates_for):
    model = tiny_model("llama", num_hidden_layers=LAYERS)
    options = {"gates": gates_for(model), "sinks": SINKS, "recent": RECENT, "buffer": BUFFER, "observe": ["retention"]}
    with torch.no_grad(), evict(model, FirstNumber(), BUDGET, **options) as session:
        machine = type("Machine", (CacheMachine,), {"session": session, "steps": 0})
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=EXAMPLES,
                stateful_step_count=STEPS,
                deadline=None,
                derandomize=True,
                report_multiple_bugs=False,
                suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
            ),
        )
    assert machine.steps >= 10_000
