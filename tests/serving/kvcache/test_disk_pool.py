"""The disk tier: safetensors files that are verified when read and removed when the pool is closed."""

from __future__ import annotations

import resource
import signal
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors import safe_open

from tenure.serving import LRU, DiskPool, LoadState, Status, TensorPayload, Tier, TierPolicy, WriteBack
from tenure.serving.kvcache.base import LostPayloadError

POLICY = TierPolicy(LRU(), WriteBack.ALL)


def written(pool: DiskPool, payload: TensorPayload):
    builder = pool.new_builder(payload)
    for layer in range(len(payload.layers)):
        builder.write(layer, payload.read(layer))
    return builder.commit()


def read(payload) -> dict[str, torch.Tensor]:
    return {name: t for layer in range(len(payload.layers)) for name, t in payload.read(layer).items()}


def mixed() -> TensorPayload:
    """All the types a cache holds, odd lengths, a scalar and an empty tensor."""
    torch.manual_seed(0)
    tensors = {
        "layers.0.key": torch.randn(1, 3, 5, 2).bfloat16().transpose(1, 2),
        "layers.0.position": torch.arange(7, dtype=torch.int32),
        "layers.1.key": torch.randn(3, dtype=torch.float16),
        "layers.1.mask": torch.tensor([True, False, True]),
        "layers.1.count": torch.tensor(5),
        "layers.1.log_beta": torch.empty(0, 4),
    }
    return TensorPayload(tensors, 5, None)


def test_a_payload_is_read_back_unchanged(tmp_path: Path):
    pool, payload = DiskPool(10**6, tmp_path), mixed()
    file = written(pool, payload)
    got = read(file)
    assert list(got) == list(payload.tensors)
    for name, tensor in payload.tensors.items():
        assert got[name].dtype == tensor.dtype and torch.equal(got[name], tensor)
    assert file.path.stat().st_size == pool.charge(payload)
    with safe_open(file.path, "pt") as opened:
        assert set(opened.keys()) == set(payload.tensors)
        assert torch.equal(opened.get_tensor("layers.0.key"), payload.tensors["layers.0.key"])
        assert opened.metadata()["sha256"].split() == list(file.digests)
    assert [path.suffix for path in pool.folder.iterdir() if path.suffix != ".lock"] == [".safetensors"]
    pool.discard(file)
    assert not file.path.exists()
    pool.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "cannot be read"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "truncated: layer 1 has"),
        (lambda path: path.write_bytes(b""), "truncated: layer 0 has 0 of"),
        (
            lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\x55"),
            "damaged: layer 1 differs from what was written",
        ),
    ],
)
def test_damage_is_reported(damage, message, tmp_path: Path):
    pool = DiskPool(10**6, tmp_path)
    file = written(pool, mixed())
    damage(file.path)
    with pytest.raises(LostPayloadError, match=message):
        read(file)
    pool.close()


def test_every_flipped_byte_is_detected_or_irrelevant(tmp_path: Path):
    """The header is not read, so damage there changes nothing; damage to the data is always detected."""
    pool, payload = DiskPool(10**6, tmp_path), mixed()
    file = written(pool, payload)
    content = file.path.read_bytes()
    for at in range(0, len(content), 3):
        file.path.write_bytes(content[:at] + bytes([content[at] ^ 0x10]) + content[at + 1 :])
        if at < file.data_at:
            assert all(torch.equal(a, b) for a, b in zip(read(file).values(), payload.tensors.values(), strict=True))
        else:
            with pytest.raises(LostPayloadError):
                read(file)
    pool.close()


def test_an_aborted_file_leaves_nothing(tmp_path: Path):
    pool, payload = DiskPool(10**6, tmp_path), mixed()
    builder = pool.new_builder(payload)
    builder.write(0, payload.read(0))
    builder.abort()
    pool.new_builder(payload).abort()
    assert [path.name for path in pool.folder.iterdir()] == ["in-use.lock"]
    pool.close()


def test_an_unsupported_dtype_is_refused_before_it_is_stored(make_tiers):
    tiers = make_tiers(device=40, disk=4000)
    payload = TensorPayload({"x": torch.zeros(2, dtype=torch.complex64)}, 2, 0)
    with (
        tiers.open([1, 2]) as handle,
        pytest.raises(ValueError, match="got a tensor of complex64; the disk accepts float64"),
    ):
        tiers.store(handle, [1, 2], payload)


def test_pools_share_a_folder_and_files_of_a_dead_process_are_removed(tmp_path: Path):
    dead = tmp_path / "tenure-kv-dead"
    dead.mkdir()
    (dead / "0.safetensors").write_bytes(b"x")
    mine = tmp_path / "tenure-kv-no-folder-of-a-pool.txt"
    first = DiskPool(10**6, tmp_path)
    assert not dead.exists()
    kept = written(first, mixed())
    second = DiskPool(10**6, tmp_path)
    assert kept.path.exists(), "its owner is alive"
    assert first.folder != second.folder
    with FileLock(mine):
        pass
    first.close()
    second.close()
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []


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


def test_a_prompt_split_while_on_disk_stays_whole_until_it_is_loaded(make_tiers, cached, kv):
    tiers, node = fill_disk(make_tiers, cached, device=8)
    assert tiers.lookup([1, 1, 9, 9]).length == 0, "files are not split"
    assert cached(tiers, [1, 1, 9, 9])
    assert (node.length, node.covers, node.status) == (2, 4, Status.DISK)
    tiers.check()
    with tiers.open([1, 1, 2, 2]) as handle:
        assert handle.wait(100) is LoadState.READY
        kv.assert_holds(handle.payloads(), [1, 1, 2, 2])
        assert [payload.tokens for payload in handle.payloads()] == [2, 2]
    assert tiers.pools[Tier.DEVICE].used == 6 * kv.token_bytes, "the common prefix is stored once"
    tiers.check()


def test_a_full_disk_loses_the_copy_only(make_tiers, cached, kv):
    """A limit on the size of files makes the real write fail."""
    tiers = make_tiers(device=4, disk=4000, policy=POLICY)
    assert cached(tiers, [1, 1, 2, 2])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        assert not cached(tiers, [5, 5, 5, 5])
        tiers.clock.advance_to(100)
        tiers.poll()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert tiers.statistics.copies_failed == 1
    assert [path.name for path in tiers.pools[Tier.DISK].folder.iterdir()] == ["in-use.lock"]
    tiers.check()
    assert tiers.pools[Tier.DISK].used == 0
    assert cached(tiers, [5, 5, 5, 5]), "the eviction proceeded without the disk"
