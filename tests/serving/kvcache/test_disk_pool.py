"""The disk tier: what a pool does with its files, whatever the disk does."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from tenure.serving import (
    LRU,
    DiskPool,
    LoadState,
    MemoryPool,
    Status,
    TensorPayload,
    ThreadedTransfer,
    Tier,
    TieredCache,
    TierPolicy,
    WriteBack,
)
from tenure.serving.kvcache.base import LostPayloadError

POLICY = TierPolicy(LRU(), WriteBack.ALL)


def written(pool: DiskPool, payload: TensorPayload):
    builder = pool.new_builder(payload)
    for layer in range(len(payload.layers)):
        builder.write(layer, payload.read(layer))
    return builder.commit()


def payload_of(tokens: int) -> TensorPayload:
    return TensorPayload({"layers.0.key": torch.arange(2.0 * tokens).view(1, 1, tokens, 2)}, tokens)


def files_in(pool: DiskPool) -> list[str]:
    return sorted(path.name for path in pool.folder.iterdir() if path.suffix in (".kv", ".tmp"))


@contextmanager
def failing(monkeypatch, owner, name: str, code: int, match: str = ""):
    """Calls of a function of the system fail with an error number, for paths that contain `match`."""
    real = getattr(owner, name)

    def fail(path, *args, **kwargs):
        if match in str(path):
            raise OSError(code, os.strerror(code), str(path))
        return real(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fail)
        yield


def test_an_aborted_file_leaves_nothing(tmp_path: Path):
    pool, payload = DiskPool(10**6, tmp_path), payload_of(4)
    builder = pool.new_builder(payload)
    builder.write(0, payload.read(0))
    assert files_in(pool) == [".0.kv.tmp"]
    builder.abort()
    pool.new_builder(payload).abort()
    assert files_in(pool) == []
    pool.close()


def test_an_unsupported_dtype_is_refused_before_it_is_stored(make_tiers):
    tiers = make_tiers(device=40, disk=4000)
    payload = TensorPayload({"x": torch.zeros(2, dtype=torch.complex64)}, 2, 0)
    with (
        tiers.open([1, 2]) as handle,
        pytest.raises(ValueError, match="got a tensor of complex64; the disk accepts float64"),
    ):
        tiers.store(handle, [1, 2], payload)


def test_a_pool_without_a_fingerprint_leaves_no_files(tmp_path: Path):
    """Nor do pools of processes that died; those of processes that run are left alone."""
    dead = tmp_path / "tenure-kv-dead"
    dead.mkdir()
    (dead / "0.kv").write_bytes(b"x")
    other = tmp_path / "tenure-kv-no-folder-of-a-pool.txt"
    other.touch()
    first = DiskPool(10**6, tmp_path)
    assert not dead.exists()
    kept = written(first, payload_of(4))
    second = DiskPool(10**6, tmp_path)
    assert kept.path.exists(), "its owner is alive"
    assert first.folder != second.folder
    first.close()
    second.close()
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == [] and other.exists()


def test_a_pool_is_closed_by_another_thread(tmp_path: Path):
    pool = DiskPool(10**6, tmp_path, "weights")
    thread = threading.Thread(target=pool.close)
    thread.start()
    thread.join()
    with FileLock(pool.folder / "in-use.lock", timeout=0):
        pass


def test_a_file_is_cut_as_its_last_tokens_go_and_removed_with_the_last_part(tmp_path: Path):
    """Shares of parts add up to the file; the pool counts what the folder holds."""
    pool = DiskPool(10**6, tmp_path)
    file = written(pool, payload_of(200))
    parts, rest = [], file
    for at in (100, 20, 40):
        part, rest = rest.split(at)
        parts.append(part)
    parts.append(rest)
    charges = [pool.charge(part) for part in parts]
    assert sum(charges) == pool.charge(file) == file.path.stat().st_size
    pool.allocate(sum(charges))
    for part, charge in reversed(list(zip(parts, charges, strict=True))):
        pool.free(charge)
        pool.discard(part)
        on_disk = file.path.stat().st_size if file.path.exists() else 0
        assert pool.used == on_disk == pool.capacity - pool.available
    assert files_in(pool) == []
    pool.close()


def test_a_file_whose_first_tokens_are_gone_still_takes_its_bytes(tmp_path: Path):
    pool = DiskPool(10**6, tmp_path)
    file = written(pool, payload_of(200))
    head, tail = file.split(128)
    pool.allocate(pool.charge(tail))
    pool.discard(head)
    assert pool.used < file.path.stat().st_size == pool.capacity - pool.available
    pool.free(pool.charge(tail))
    pool.discard(tail)
    assert pool.available == pool.capacity and files_in(pool) == []
    pool.close()


def fill_disk(make_tiers, cached, device=4):
    """Tiers whose only copy of [1, 1, 2, 2] is on disk, and that node."""
    tiers = make_tiers(device=device, disk=4000, policy=POLICY)
    assert cached(tiers, [1, 1, 2, 2])
    assert not cached(tiers, [5] * device)
    tiers.clock.advance_to(100)
    (node,) = tiers.tree
    tiers.poll()
    assert node.status is Status.DISK
    return tiers, node


def test_a_round_trip_through_the_disk(make_tiers, cached, kv):
    tiers, _ = fill_disk(make_tiers, cached)
    with tiers.open([1, 1, 2, 2, 8]) as handle:
        assert handle.length == 4
        with pytest.raises(ValueError, match="not on the device: call load"):
            handle.payloads()
        assert handle.load() is LoadState.LOADING
        assert handle.wait(100) is LoadState.READY
        kv.assert_holds(handle.payloads(), [1, 1, 2, 2])
    assert tiers.statistics.bytes_moved == {
        (Tier.DEVICE, Tier.DISK): 4 * kv.token_bytes,
        (Tier.DISK, Tier.DEVICE): 4 * kv.token_bytes,
    }


@pytest.mark.parametrize("how", ["missing", "damaged"])
def test_a_damaged_file_is_a_miss(how, make_tiers, cached, kv):
    tiers, node = fill_disk(make_tiers, cached)
    path = node.copies[Tier.DISK].path
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1] + b"\x55")
    with tiers.open([1, 1, 2, 2]) as handle:
        assert handle.length == 4
        assert handle.wait(100) is LoadState.LOST
        tiers.check()
    assert tiers.statistics.copies_lost == 1
    assert tiers.lookup([1, 1, 2, 2]).length == 0 and tiers.tree.size == 0
    assert all(pool.used == 0 for pool in tiers.pools.values())
    assert cached(tiers, [1, 1, 2, 2]), "it is computed again"


def test_a_prompt_is_split_while_on_disk(make_tiers, cached, kv):
    """The parts are ranges of the file: each is loaded alone, and the common prefix is stored once."""
    tiers, node = fill_disk(make_tiers, cached, device=8)
    pool, size = tiers.pools[Tier.DISK], tiers.pools[Tier.DISK].used
    assert tiers.lookup([1, 1, 9, 9]).length == 2
    with tiers.open([1, 1, 9, 9]) as handle:
        assert handle.length == 2 and pool.used == size and (node.length, node.covers) == (2, 2)
        assert handle.wait(100) is LoadState.READY
        kv.assert_holds(handle.payloads(), [1, 1])
        assert node.status is Status.DISK, "the other part is not loaded"
    assert tiers.statistics.bytes_moved[Tier.DISK, Tier.DEVICE] == 2 * kv.token_bytes
    with tiers.open([1, 1, 2, 2]) as handle:
        assert handle.wait(100) is LoadState.READY
        kv.assert_holds(handle.payloads(), [1, 1, 2, 2])
    assert len(files_in(pool)) == 1
    assert tiers.merge_spans() == 1 and pool.used == size, "the parts become one node again, and one range"
    tiers.check()


@pytest.mark.parametrize("how", ["the size of files", "ENOSPC", "EIO"])
def test_a_full_disk_loses_the_copy_only(how, make_tiers, cached, kv, monkeypatch):
    tiers = make_tiers(device=4, disk=4000, policy=POLICY)
    assert cached(tiers, [1, 1, 2, 2])
    if how == "the size of files":
        limit = limited_file_size(100)
    else:
        limit = failing(monkeypatch, os, "replace", getattr(errno, how))
    with limit:
        assert not cached(tiers, [5, 5, 5, 5])
        tiers.clock.advance_to(100)
        tiers.poll()
    assert tiers.statistics.copies_failed == 1
    assert files_in(tiers.pools[Tier.DISK]) == []
    tiers.check()
    assert tiers.pools[Tier.DISK].used == 0
    assert cached(tiers, [5, 5, 5, 5]), "the eviction proceeded without the disk"


@contextmanager
def limited_file_size(nbytes: int):
    """The system refuses to write larger files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def threaded(tmp_path: Path, kv, device: int = 4) -> TieredCache:
    pools = {Tier.DEVICE: MemoryPool(device * kv.token_bytes), Tier.DISK: DiskPool(4000, tmp_path)}
    return TieredCache(pools, ThreadedTransfer(), POLICY, 2)


def settled(tiers: TieredCache) -> None:
    """All transfers end within seconds."""
    for _ in range(500):
        events = tiers.num_events
        tiers.poll()
        if not tiers.has_transfers:
            return
        tiers.wait(events, 0.01)
    raise AssertionError("a transfer does not end")


def test_a_half_written_file_that_cannot_be_removed_blocks_nobody(tmp_path, kv, cached, monkeypatch):
    """The write fails and so does the removal: the thread lives, the bytes count until the file is gone."""
    tiers = threaded(tmp_path, kv)
    pool = tiers.pools[Tier.DISK]
    assert cached(tiers, [1, 1, 2, 2])
    with failing(monkeypatch, os, "replace", errno.EIO), failing(monkeypatch, Path, "unlink", errno.EROFS, ".kv"):
        assert not cached(tiers, [5, 5, 5, 5]), "the first copy has to go first"
        settled(tiers)
        assert tiers.statistics.copies_failed == 1
        assert pool.used == 0 and pool.available < pool.capacity and files_in(pool) == [".0.kv.tmp"]  # pyright: ignore
        assert cached(tiers, [5, 5, 5, 5])
        assert not cached(tiers, [6, 6, 6, 6])
        settled(tiers)
        tiers.check()
    assert pool.can_free() and pool.available == pool.capacity and files_in(pool) == []  # pyright: ignore
    assert cached(tiers, [6, 6, 6, 6]) and not cached(tiers, [7, 7, 7, 7])
    settled(tiers)
    assert len(files_in(pool)) == 1, "the disk is used again"  # pyright: ignore[reportArgumentType]
    tiers.check()
    tiers.close()


def test_a_victim_that_cannot_be_removed_keeps_its_bytes(make_tiers, cached, monkeypatch, caplog):
    """Nothing raises, no other copy is evicted in vain, and the file is removed as soon as that is possible."""
    tiers = make_tiers(device=4, disk=3500, policy=POLICY)
    pool = tiers.pools[Tier.DISK]
    for token in range(3):
        while not cached(tiers, [token] * 4):
            tiers.clock.advance_to(tiers.clock() + 100)
    tiers.clock.advance_to(tiers.clock() + 100)
    tiers.poll()
    assert len(files_in(pool)) == 2, "there is room for two files"
    with failing(monkeypatch, Path, "unlink", errno.EROFS, ".kv"):
        for token in range(3, 6):
            while not cached(tiers, [token] * 4):
                tiers.clock.advance_to(tiers.clock() + 100)
            tiers.check()
        assert len(files_in(pool)) == 2
        assert sum(node.copies[Tier.DISK] is not None for node in tiers.tree) == 1, "one was evicted, the other is kept"
        assert pool.used + pool.available < pool.capacity
        assert sum("cannot be removed" in record.message for record in caplog.records) == 1
    while not cached(tiers, [6] * 4):
        tiers.clock.advance_to(tiers.clock() + 100)
    tiers.check()
    assert pool.used + pool.available == pool.capacity


def test_a_folder_that_is_removed_is_made_again(make_tiers, cached, kv, caplog):
    tiers, _ = fill_disk(make_tiers, cached)
    pool = tiers.pools[Tier.DISK]
    gone = pool.folder
    shutil.rmtree(gone)
    with tiers.open([1, 1, 2, 2]) as handle:
        assert handle.wait(100) is LoadState.LOST
    while not cached(tiers, [1, 1, 2, 2]):
        tiers.clock.advance_to(tiers.clock() + 100)
    while not cached(tiers, [6, 6, 6, 6]):
        tiers.clock.advance_to(tiers.clock() + 100)
    assert pool.folder != gone and len(files_in(pool)) >= 1
    with tiers.open([1, 1, 2, 2]) as handle:
        while handle.wait(100) is not LoadState.READY:
            tiers.clock.advance_to(tiers.clock() + 100)
        kv.assert_holds(handle.payloads(), [1, 1, 2, 2])
    assert "was removed; creating another" in caplog.text
    tiers.check()


def test_a_close_during_a_write_leaves_no_file(tmp_path, kv, cached):
    """From another thread, while a throttled copy runs."""
    pool = DiskPool(4000, tmp_path, "weights")
    pools = {Tier.DEVICE: MemoryPool(4 * kv.token_bytes), Tier.DISK: pool}
    tiers = TieredCache(pools, ThreadedTransfer({(Tier.DEVICE, Tier.DISK): 1.0}), POLICY, 2)
    assert cached(tiers, [1, 1, 2, 2]) and not cached(tiers, [5, 5, 5, 5])
    while not files_in(pool):
        pass
    closing = threading.Thread(target=tiers.close)
    closing.start()
    closing.join(10)
    assert not closing.is_alive() and not tiers.has_transfers
    assert files_in(pool) == []
    tiers.close()
    with tiers.open([5]) as handle:
        assert handle.length == 0, "a handle from after the end does no harm"


def test_reading_back_needs_no_whole_file(tmp_path: Path):
    """Damage outside the blocks of a part is not that part's."""
    pool = DiskPool(10**6, tmp_path)
    file = written(pool, payload_of(200))
    content = bytearray(file.path.read_bytes())
    content[-1] ^= 1
    file.path.write_bytes(bytes(content))
    head, tail = file.split(128)
    assert torch.equal(head.read(0)["layers.0.key"], payload_of(200).tensors["layers.0.key"][:, :, :128])
    with pytest.raises(LostPayloadError, match="layer 0 of block 3 differs"):
        tail.read(0)
    pool.close()
