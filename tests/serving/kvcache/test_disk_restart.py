"""KV on disk is found again by the next process, however the last one ended, and nothing else ever is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from filelock import FileLock

from tenure.serving import (
    LRU,
    AllocStatus,
    DiskConfig,
    DiskPool,
    LoadState,
    MemoryPool,
    Tier,
    TieredCache,
    TierPolicy,
    VirtualClock,
    VirtualTransfer,
    WriteBack,
)

POLICY = TierPolicy(LRU(), WriteBack.ALL)
A, B, C = [1, 1, 2, 2], [1, 1, 3, 3], [4, 4, 4, 4]


@pytest.fixture
def start(tmp_path: Path, kv):
    """A process: a cache with a device of `device` tokens over the folder."""
    running: list[TieredCache] = []

    def begin(
        fingerprint: str | None = "weights", capacity: int = 10**5, device: int = 4, page: int = 2,
        config: DiskConfig | None = None, folder: Path = tmp_path,
    ) -> TieredCache:  # fmt: skip
        clock = VirtualClock(1e6)
        pools = {
            Tier.DEVICE: MemoryPool(device * kv.token_bytes),
            Tier.DISK: DiskPool(capacity, folder, fingerprint, config),
        }
        tiers = TieredCache(pools, VirtualTransfer(clock, kv.links), POLICY, page, clock)
        running.append(tiers)
        return tiers

    yield begin
    for tiers in running:
        tiers.check()
        tiers.close()
        tiers.check()


def serve(tiers: TieredCache, kv, prompt, namespace=None, agent=None, compressed=False) -> int:
    """Serves a prompt as an engine does; returns how many of its tokens were cached."""
    while True:
        with tiers.open(prompt, namespace) as handle:
            state = handle.wait(1e3)
            if state is not LoadState.READY:
                assert state is LoadState.LOST
                continue
            found = handle.length
            kv.assert_holds(handle.payloads(), prompt[:found])
            new = kv.of(prompt, found, len(prompt), compressed) if found < len(prompt) else None
            while tiers.store(handle, prompt, new, agent, len(prompt) if agent else 0) is not AllocStatus.READY:
                tiers.clock.advance_to(tiers.clock() + 100)  # pyright: ignore[reportFunctionMemberAccess]
            return found


def to_disk(tiers: TieredCache) -> None:
    """Evicts everything from the device."""
    tiers.evictor.make_room(Tier.DEVICE, tiers.capacity())
    tiers.clock.advance_to(tiers.clock() + 1e3)  # pyright: ignore[reportFunctionMemberAccess]
    tiers.poll()
    if tiers.pools[Tier.DEVICE].used:
        to_disk(tiers)


def files_in(tiers: TieredCache) -> list[Path]:
    return sorted(tiers.pools[Tier.DISK].folder.glob("*.kv"))  # pyright: ignore[reportAttributeAccessIssue]


def test_prompts_are_found_after_a_restart(start, kv):
    first = start()
    for prompt, namespace, agent in ((A, None, "planner"), (B, None, None), (C, ("tenant", 1, None), "coder")):
        serve(first, kv, prompt, namespace, agent)
    to_disk(first)
    size = first.pools[Tier.DISK].used
    first.close()
    second = start()
    assert second.pools[Tier.DISK].used == size == sum(path.stat().st_size for path in files_in(second))
    assert second.pools[Tier.DISK].folder == first.pools[Tier.DISK].folder
    assert second.lookup(C).length == 0 and second.lookup(C, ("tenant", 1, None)).length == 4
    assert sorted(second.agents()) == ["coder", "planner"]
    assert serve(second, kv, A) == 4 and serve(second, kv, B) == 4 and serve(second, kv, C, ("tenant", 1, None)) == 4
    assert second.statistics.copies_lost == 0
    serve(second, kv, [9] * 4)
    to_disk(second)
    assert len({path.name for path in files_in(second)}) == second.tree.size, "new files have new names"


def test_a_compressed_prompt_is_found_after_a_restart(start, kv):
    first = start(device=8)
    serve(first, kv, A, "compressed", "planner", compressed=True)
    to_disk(first)
    first.close()
    second = start(device=8)
    assert serve(second, kv, A, "compressed") == 4 and second.lookup([1, 1, 9], "compressed").length == 0


def test_what_follows_a_prompt_that_was_never_saved_is_used_once_that_is_computed(start, kv):
    """The common beginning is used most, so it is often on the device alone."""
    first = start(device=8)
    serve(first, kv, A[:2])
    serve(first, kv, A)
    with first.open(A[:2]):
        first.evictor.make_room(Tier.DEVICE, 6 * kv.token_bytes)
        first.clock.advance_to(first.clock() + 100)
        first.poll()
    assert len(files_in(first)) == 1
    first.close()
    second = start(device=8)
    assert second.tree.size == 2 and second.lookup(A).length == 0
    assert serve(second, kv, A[:2]) == 0
    assert serve(second, kv, A) == 4, "its end came from the disk"


def test_parts_of_a_file_are_found_after_a_restart(start, kv):
    """A file that was split is one file: whole, or cut behind the block that is still needed."""
    first = start(device=8, page=1, config=DiskConfig(block_tokens=2))
    prompt = [1, 1, 2, 2, 3, 3]
    serve(first, kv, prompt)
    to_disk(first)
    with first.open(prompt[:3]) as handle:
        assert handle.length == 3
    (path,) = files_in(first)
    whole = path.stat().st_size
    (tail,) = [node for node in first.tree if node.end == 6]
    first.storage.evict(tail, Tier.DISK)
    assert path.stat().st_size < whole
    first.close()
    second = start(device=8, page=1, config=DiskConfig(block_tokens=2))
    assert second.lookup(prompt).length == 4, "the block was not cut"
    assert serve(second, kv, prompt) == 4


def test_pages_of_another_size(start, kv):
    first = start(device=8)
    serve(first, kv, [1, 1, 2, 2, 3, 3])
    to_disk(first)
    first.close()
    second = start(device=8, page=4)
    assert second.lookup([1, 1, 2, 2, 3, 3, 4, 4]).length == 4
    assert serve(second, kv, [1, 1, 2, 2, 5, 5, 5, 5]) == 4


@pytest.mark.parametrize("how", ["flip data", "flip index", "cut", "empty", "foreign", "other schema", "directory"])
def test_a_file_that_is_not_what_was_written_is_a_miss(how, start, kv):
    first = start()
    serve(first, kv, A)
    to_disk(first)
    first.close()
    (path,) = files_in(first)
    content = path.read_bytes()
    changed = {
        "flip data": content[:-1] + bytes([content[-1] ^ 1]),
        "flip index": content[:40] + bytes([content[40] ^ 1]) + content[41:],
        "cut": content[:-1],
        "empty": b"",
        "foreign": b"not ours" * 1000,
        "other schema": content[:8] + b"\x02" + content[9:],
    }
    if how == "directory":
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes(changed[how])
    second = start()
    assert serve(second, kv, A) == 0
    assert [node.copies[Tier.DISK] for node in second.tree] == [None]
    assert second.pools[Tier.DISK].used == 0 and (how == "directory" or not files_in(second))


def test_another_fingerprint_never_finds_it_and_the_same_one_does_later(start, kv):
    first = start("weights 1")
    serve(first, kv, A)
    to_disk(first)
    first.close()
    other = start("weights 2")
    assert serve(other, kv, A) == 0 and len(files_in(other)) == 0
    to_disk(other)
    other.close()
    assert serve(start(None), kv, A) == 0
    again = start("weights 1")
    assert serve(again, kv, A) == 4
    assert again.pools[Tier.DISK].folder == first.pools[Tier.DISK].folder != other.pools[Tier.DISK].folder


def test_a_file_moved_into_the_folder_of_another_fingerprint_is_a_miss(start, kv):
    first, other = start("weights 1"), start("weights 2")
    serve(first, kv, A)
    to_disk(first)
    (path,) = files_in(first)
    first.close()
    other.close()
    os.replace(path, other.pools[Tier.DISK].folder / "7.kv")
    again = start("weights 2")
    assert serve(again, kv, A) == 0 and not files_in(again)


def test_bound_after_it_was_built(start, kv):
    """An engine knows the fingerprint only when it has model and pools."""
    first = start()
    serve(first, kv, A)
    to_disk(first)
    first.close()
    second = start(None)
    unnamed = second.pools[Tier.DISK].folder
    second.pools[Tier.DISK].bind("weights")
    assert second.restore_disk() == second.restore_disk() == 4
    assert not unnamed.exists() and serve(second, kv, A) == 4
    with pytest.raises(ValueError, match="got an empty fingerprint; accepted: a text"):
        second.pools[Tier.DISK].bind("")
    with pytest.raises(ValueError, match="got the fingerprint 'others' for a disk pool that is used with another one"):
        second.pools[Tier.DISK].bind("others")
    second.pools[Tier.DISK].bind("weights")
    assert serve(second, kv, A) == 4


def test_the_files_used_last_fit_a_smaller_capacity(start, kv):
    first = start()
    prompts = [[n] * 4 for n in range(5)]
    for prompt in prompts:
        serve(first, kv, prompt)
        to_disk(first)
    size = max(path.stat().st_size for path in files_in(first))
    for age, path in enumerate(sorted(files_in(first), key=lambda path: int(path.stem), reverse=True)):
        used = time.time() - age * 100
        os.utime(path, (used, used))
    serve(first, kv, prompts[0])  # reading it is a use
    first.close()
    second = start(capacity=3 * size)
    assert len(files_in(second)) == 3 and second.pools[Tier.DISK].used <= 3 * size
    found = [prompt[0] for prompt in prompts if second.lookup(prompt).length]
    assert found == [0, 3, 4]
    lowest = min(second.tree, key=second.storage.queues[Tier.DISK].rank)
    assert kv.ids_of(lowest) == prompts[3], "the order of use is restored"


def test_stores_nobody_uses_are_removed_when_stale_or_when_space_is_needed(start, kv, monkeypatch):
    for name in ("old", "new"):
        tiers = start(name)
        serve(tiers, kv, A)
        to_disk(tiers)
        tiers.close()
    old, new = (tiers_folder(start, name) for name in ("old", "new"))
    assert old.exists() and new.exists()
    past = time.time() - 30 * 86400
    for path in (old / "store.json", old):
        os.utime(path, (past, past))
    start("third").close()
    assert not old.exists() and new.exists()
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10**4}))
    start("third", capacity=10**4).close()
    start(None, capacity=10**5).close()
    assert new.exists()
    start("third", capacity=10**5).close()
    assert not new.exists()


def tiers_folder(start, name: str) -> Path:
    tiers = start(name)
    tiers.close()
    return tiers.pools[Tier.DISK].folder


def test_two_processes_on_one_folder(start, kv):
    first = start()
    serve(first, kv, A)
    to_disk(first)
    second = start()
    assert second.lookup(A).length == 0 and second.pools[Tier.DISK].folder != first.pools[Tier.DISK].folder
    second.close()
    assert serve(first, kv, A) == 4


def test_pools_opened_and_closed_by_many_at_once(tmp_path: Path):
    """None fails, and no two own one folder at the same time."""
    owned, failures, guard = set(), [], threading.Lock()

    def process(number: int) -> None:
        try:
            for turn in range(15):
                pool = DiskPool(10**4, tmp_path, (None, "weights")[(number + turn) % 2])
                with guard:
                    assert pool.folder not in owned and pool.folder.exists()
                    owned.add(pool.folder)
                (pool.folder / ".7.kv.tmp").write_bytes(b"half")
                pool.restored()
                with guard:
                    owned.remove(pool.folder)
                    pool.close()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=process, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def test_a_start_does_not_wait_for_ever_for_another(tmp_path: Path, caplog):
    with FileLock(tmp_path / "tenure-kv.lock"):
        pool = DiskPool(10**4, tmp_path, "weights", DiskConfig(claim_timeout_s=0.05))
    assert pool.folder.exists() and "has been starting" in caplog.text
    pool.close()


def test_a_folder_that_cannot_be_used_is_refused(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        DiskPool(10**4, tmp_path / "file" / "below", "weights")
    with pytest.raises(ValueError, match="got 10 as label_bytes; accepted: a whole number of 256 or more"):
        DiskConfig(label_bytes=10)


PROCESS = """
import json, sys, time
from pathlib import Path
from tenure.scripts.soak.faulty_kv import kv_of
from tenure.serving import LRU, DiskPool, MemoryPool, ThreadedTransfer, Tier, TieredCache, TierPolicy, WriteBack
pools = {Tier.DEVICE: MemoryPool(4 * 32), Tier.DISK: DiskPool(10**6, sys.argv[1], "weights")}
tiers = TieredCache(pools, ThreadedTransfer(), TierPolicy(LRU(), WriteBack.ALL), 2)
print(json.dumps([str(pools[Tier.DISK].folder), tiers.lookup([1, 1, 2, 2]).length]), flush=True)
for number in range(10**9):
    prompt = [1, 1, 2, 2] if number == 0 else [2 + number % 50] * 4
    with tiers.open(prompt) as handle:
        if handle.length < 4:
            tiers.store(handle, prompt, kv_of(prompt, handle.length, 4))
    time.sleep(0.001)
    if number == 300:
        print("busy", flush=True)
"""


def test_processes_start_together_and_are_killed_and_their_files_are_found(tmp_path: Path, kv, start):
    """None crashes, each has a folder, and after `kill -9` in the middle of writing all that was finished is usable."""
    processes = [
        subprocess.Popen([sys.executable, "-c", PROCESS, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    try:
        outputs = [process.stdout for process in processes if process.stdout is not None]
        folders = {json.loads(output.readline())[0] for output in outputs}
        assert len(folders) == 2
        assert all(output.readline() == "busy\n" for output in outputs)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    found = start(capacity=10**6)
    assert str(found.pools[Tier.DISK].folder) in folders
    assert not list(found.pools[Tier.DISK].folder.glob("*.tmp"))
    assert serve(found, kv, A) == 4
    for node in list(found.tree):
        if node.copies[Tier.DEVICE] is None:
            prompt = kv.ids_of(node)
            assert serve(found, kv, prompt) == len(prompt)
    assert found.statistics.copies_lost == 0
