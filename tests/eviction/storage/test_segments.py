"""The ragged storage against a dense mirror, under random operations."""

from __future__ import annotations

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tenure.eviction.forward_state import SequenceState
from tenure.eviction.storage.segment_store import SegmentStore

HEADS, DIM = 2, 3
Entry = tuple[int, float, float, float]  # position, first number of the key, of the value, state


class Mirror:
    """The content a store must hold: a list of entries for each [row][head]."""

    def __init__(self, segments: list[list[list[Entry]]], rows: SequenceState) -> None:
        self.segments, self.rows = segments, rows

    def copy(self) -> Mirror:
        return Mirror([[list(head) for head in row] for row in self.segments], self.rows.copy())


class StoreMachine(RuleBasedStateMachine):
    """Several stores that share buffers through forks, each beside its mirror."""

    store: type[SegmentStore] = SegmentStore

    def __init__(self) -> None:
        super().__init__()
        self.pairs: list[tuple[SegmentStore, Mirror]] = []
        self.clock = 0.0

    def new(self, batch: int, n: int, pads: list[int], rows: SequenceState):
        """A step's tensors, each number different from all before."""
        valid = None
        if any(pads):
            valid = torch.ones(batch, n, dtype=torch.bool)
            for row, pad in enumerate(pads):
                valid[row, :pad] = False
        step = rows.new_step(batch, n, valid, torch.device("cpu"), 0, 0)
        numbers = torch.arange(batch * HEADS * n, dtype=torch.float32).view(batch, HEADS, n) + self.clock
        self.clock += numbers.numel()
        key = numbers.unsqueeze(-1).expand(-1, -1, -1, DIM)
        fresh = [
            [
                [
                    (int(step.positions[r, i]), x := numbers[r, h, i].item(), -x, x + 0.5)
                    for i in range(n)
                    if valid is None or valid[r, i]
                ]
                for h in range(HEADS)
            ]
            for r in range(batch)
        ]
        return step, key, -key, {"state": numbers + 0.5}, fresh

    @precondition(lambda self: len(self.pairs) < 4)
    @rule(batch=st.integers(1, 3), n=st.integers(1, 6), data=st.data())
    def prompt(self, batch, n, data):
        pads = data.draw(st.lists(st.integers(0, n - 1), min_size=batch, max_size=batch))
        rows = SequenceState()
        step, key, value, state, fresh = self.new(batch, n, pads, rows)
        rows.advance(step, HEADS)
        self.pairs.append((self.store.from_dense(key, value, state, step), Mirror(fresh, rows)))

    def pick(self, data) -> tuple[SegmentStore, Mirror]:
        return self.pairs[data.draw(st.integers(0, len(self.pairs) - 1))]

    @precondition(lambda self: self.pairs)
    @rule(n=st.sampled_from([1, 1, 1, 2, 5]), padded=st.booleans(), late=st.booleans(), data=st.data())
    def append(self, n, padded, late, data):
        store, mirror = self.pick(data)
        pads = data.draw(st.lists(st.integers(0, n), min_size=store.batch, max_size=store.batch)) if padded else []
        step, key, value, state, fresh = self.new(store.batch, n, pads, mirror.rows)
        if late and n == 1 and step.valid is None:
            store.append(key, value, {}, step)
            store.fill("state", state["state"].flatten())
        else:
            store.append(key, value, state, step)
        mirror.rows.advance(step, HEADS)
        for row, more in zip(mirror.segments, fresh, strict=True):
            for head, entries in zip(row, more, strict=True):
                head.extend(entries)

    @precondition(lambda self: self.pairs)
    @rule(share=st.sampled_from([0.0, 0.3, 0.8, 1.0]), seed=st.integers(0, 99), data=st.data())
    def evict(self, share, seed, data):
        store, mirror = self.pick(data)
        valid = store.dense_index()[1]
        keep = valid & (torch.rand(valid.shape, generator=torch.Generator().manual_seed(seed)) < share)
        store.compact(keep)
        mirror.segments = [
            [[e for i, e in enumerate(head) if keep[r, h, i]] for h, head in enumerate(row)]
            for r, row in enumerate(mirror.segments)
        ]

    @precondition(lambda self: 0 < len(self.pairs) < 4)
    @rule(data=st.data())
    def fork(self, data):
        store, mirror = self.pick(data)
        self.pairs.append((store.fork(), mirror.copy()))

    @precondition(lambda self: self.pairs)
    @rule(data=st.data())
    def select(self, data):
        store, mirror = self.pick(data)
        chosen = data.draw(st.lists(st.integers(0, store.batch - 1), min_size=1, max_size=4))
        store.select_rows(chosen)
        copy = mirror.copy()
        mirror.rows.select(torch.tensor(chosen))
        mirror.segments = [[list(head) for head in copy.segments[row]] for row in chosen]

    @precondition(lambda self: self.pairs)
    @rule(data=st.data())
    def truncate(self, data):
        store, mirror = self.pick(data)
        lengths = [data.draw(st.integers(0, n)) for n in store.lengths]
        store.set_lengths(lengths)
        for row in range(store.batch):
            for head in range(HEADS):
                del mirror.segments[row][head][lengths[row * HEADS + head] :]

    @precondition(lambda self: len(self.pairs) > 1)
    @rule(data=st.data())
    def free(self, data):
        self.pairs.pop(data.draw(st.integers(0, len(self.pairs) - 1)))

    @invariant()
    def holds_what_the_mirror_holds(self):
        for store, mirror in self.pairs:
            store.check()
            flat = [head for row in mirror.segments for head in row]
            assert store.lengths == [len(head) for head in flat]
            assert store.nbytes == sum(buffer.nbytes for buffer in store.buffers.values())
            position, value, state = (
                store.dense(buffer).flatten(0, 1) for buffer in (store.position, store.value, store.buffers["state"])
            )
            for (key, _), places, values, states, entries in zip(
                store.pairs(), position, value, state, flat, strict=True
            ):
                n = len(entries)
                assert key.shape == (1, 1, n, DIM)
                got = zip(
                    places[:n].tolist(),
                    key[0, 0, :, 0].tolist(),
                    values[:n, 0].tolist(),
                    states[:n].tolist(),
                    strict=True,
                )
                assert list(got) == entries


StoreMachine.TestCase.settings = settings(max_examples=30, stateful_step_count=20, deadline=None)
TestStore = StoreMachine.TestCase


def test_a_contiguous_prompt_is_adopted_and_a_slice_is_not():
    key = torch.randn(2, 3, 5, 4)
    step = SequenceState().new_step(2, 5, None, torch.device("cpu"), 0, 0)
    adopted = SegmentStore.from_dense(key, key, {}, step)
    assert adopted.key.data_ptr() == key.data_ptr()
    wide = torch.randn(2, 3, 5, 8)
    sliced = SegmentStore.from_dense(wide[..., :4], wide[..., 4:], {}, step)
    assert sliced.key.untyped_storage().nbytes() == 2 * 3 * 5 * 4 * 4, "the rest of the wide tensor is not kept alive"


def test_room_that_a_fork_may_use_is_not_written_to():
    rows = SequenceState()
    step = rows.new_step(1, 8, None, torch.device("cpu"), 0, 0)
    store = SegmentStore.from_dense(torch.zeros(1, HEADS, 8, DIM), torch.zeros(1, HEADS, 8, DIM), {}, step)
    rows.advance(step, HEADS)

    def replace_from_the_sixth(one: SegmentStore, number: float) -> None:
        one.set_lengths([5, 5])  # taken back: the room behind may hold entries of the other
        new = torch.full((1, HEADS, 1, DIM), number)
        one.append(new, new, {}, rows.new_step(1, 1, None, torch.device("cpu"), 0, 0))

    def sixth(one: SegmentStore) -> list[float]:
        return [key[0, 0, 5, 0].item() for key, _ in one.pairs()]

    fork = store.fork()
    replace_from_the_sixth(store, 1.0)
    assert sixth(store) == [1.0, 1.0] and sixth(fork) == [0.0, 0.0]
    replace_from_the_sixth(fork, 2.0)
    assert sixth(store) == [1.0, 1.0] and sixth(fork) == [2.0, 2.0]
    buffer = store.key
    replace_from_the_sixth(store, 3.0)
    assert store.key is buffer, "its own by now: no more copies"


def test_appending_is_amortised():
    step = SequenceState().new_step(1, 1000, None, torch.device("cpu"), 0, 0)
    store = SegmentStore.from_dense(torch.zeros(1, HEADS, 1000, DIM), torch.zeros(1, HEADS, 1000, DIM), {}, step)
    rows = SequenceState()
    rows.advance(step, HEADS)
    layouts = set()
    for _ in range(300):
        step = rows.new_step(1, 1, None, torch.device("cpu"), 0, 0)
        store.append(torch.ones(1, HEADS, 1, DIM), torch.ones(1, HEADS, 1, DIM), {}, step)
        rows.advance(step, HEADS)
        layouts.add(store.capacity)
    assert len(layouts) <= 6, "laid out anew a few times, not at every token"
    assert store.nbytes <= store.entries * store.entry_bytes * 1.08


def test_a_token_is_written_by_the_kernel_as_by_torch(monkeypatch):
    """Both dtypes, values of another width than keys, batches, a state given at once or later, and forks."""

    def written(kernels: str, dtype: torch.dtype) -> list[dict[str, torch.Tensor]]:
        monkeypatch.setenv("TENURE_KERNELS", kernels)
        torch.manual_seed(0)
        rows, stores = SequenceState(), []
        for n in (5, 3, *[1] * 9):  # the free slots are used up within these
            step = rows.new_step(2, n, None, torch.device("cpu"), 0, 0)
            key, value = torch.randn(2, HEADS, n, 6).to(dtype), torch.randn(2, n, HEADS, 4).to(dtype).transpose(1, 2)
            given, later = torch.randn(2, HEADS, n), torch.randn(2 * HEADS)
            state = {"given": given} if n == 1 else {"given": given, "later": torch.zeros(2, HEADS, n)}
            if not stores:
                stores = [SegmentStore.from_dense(key, value, state, step)]
            for store in stores:
                if store.entries == 2 * HEADS * rows.columns and rows.columns:
                    store.append(key, value, state, step)
                    if n == 1:
                        store.fill("later", later)
            rows.advance(step, HEADS)
            stores += [stores[-1].fork()] if len(stores) < 4 else []
            for store in stores:
                store.check()
        return [{name: store.dense(buffer) for name, buffer in store.buffers.items()} for store in stores]

    for dtype in (torch.bfloat16, torch.float32):
        for ours, plain in zip(written("auto", dtype), written("reference", dtype), strict=True):
            for name, numbers in plain.items():
                assert torch.equal(ours[name], numbers), name
