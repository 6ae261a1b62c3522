"""The files of the disk tier: what is written is read, in whole and in parts, and all damage is detected."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tenure.serving import DiskConfig, DiskPool, TensorPayload
from tenure.serving.kvcache.base import LostPayloadError, PromptKey
from tenure.serving.kvcache.page_pool import PageBuilder, PageGeometry, PagePool
from tenure.serving.kvcache.prompt_file import read_index

KEY = bytes(range(200)) * 4  # 200 tokens


def mixed() -> TensorPayload:
    """All the types a cache holds, odd lengths, a scalar and an empty tensor; not divisible."""
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


def divisible(tokens: int, dim: int = -2) -> TensorPayload:
    torch.manual_seed(1)
    tensors = {}
    for layer in range(2):
        tensors[f"layers.{layer}.key"] = torch.randn(1, 3, tokens, 4).bfloat16()
        tensors[f"layers.{layer}.log_beta"] = torch.randn(1, 3, tokens, 1)
    if dim == 0:
        tensors = {name: tensor[0].transpose(0, 1).contiguous() for name, tensor in tensors.items()}
    return TensorPayload(tensors, tokens, dim)


def written(pool: DiskPool, payload: TensorPayload, prompt: PromptKey | None = None):
    builder = pool.new_builder(payload, prompt)
    for layer in range(len(payload.layers)):
        builder.write(layer, payload.read(layer))
    return builder.commit()


def read(payload) -> dict[str, torch.Tensor]:
    return {name: t for layer in range(len(payload.layers)) for name, t in payload.read(layer).items()}


def assert_equal(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert list(got) == list(wanted) and all(tensor.is_contiguous() for tensor in got.values())
    for name, tensor in wanted.items():
        assert got[name].dtype == tensor.dtype and torch.equal(got[name], tensor)


@pytest.fixture
def pool(tmp_path: Path):
    pool = DiskPool(10**6, tmp_path, "weights", DiskConfig(block_tokens=64))
    yield pool
    pool.close()


@pytest.mark.parametrize("payload", [mixed(), divisible(1), divisible(64), divisible(200), divisible(200, dim=0)])
def test_a_payload_is_read_back_unchanged(payload: TensorPayload, pool: DiskPool):
    prompt = PromptKey(None, KEY)
    file = written(pool, payload, prompt)
    assert_equal(read(file), dict(payload.tensors))
    assert (file.kinds(), file.layers, file.nbytes) == (payload.kinds(), payload.layers, payload.nbytes)
    assert file.path.stat().st_size == pool.charge(payload) + pool.prompt_bytes(200)
    assert [path.name for path in pool.folder.iterdir() if path.suffix in (".kv", ".tmp")] == ["0.kv"]
    pool.discard(file)
    assert not file.path.exists()


@pytest.mark.parametrize(("start", "stop"), [(0, 200), (0, 1), (63, 65), (64, 128), (100, 200), (199, 200)])
@pytest.mark.parametrize("dim", [-2, 0])
def test_a_token_range_is_read_alone(start: int, stop: int, dim: int, pool: DiskPool):
    payload = divisible(200, dim)
    part = written(pool, payload)
    if stop < 200:
        part = part.split(stop)[0]
    if start:
        part = part.split(start)[1]
    wanted = {name: tensor.narrow(dim, start, stop - start) for name, tensor in payload.tensors.items()}
    assert_equal(read(part), wanted)
    assert part.kinds() == {name: (t.dtype, tuple(t.shape)) for name, t in wanted.items()}
    assert part.nbytes == sum(tensor.nbytes for tensor in wanted.values())


def test_pages_of_the_device_go_to_disk_and_a_part_of_them_comes_back(pool: DiskPool):
    torch.manual_seed(2)
    entry = (("key", torch.bfloat16, 4), ("value", torch.bfloat16, 4), ("log_beta", torch.float32, 0))
    pages = PagePool(PageGeometry((0, 1), 3, entry, 16), 10**6, "cpu")
    source = {
        f"layers.{layer}.{name}": torch.randn(1, 3, 96, max(1, width)).to(dtype)
        for layer in (0, 1)
        for name, dtype, width in entry
    }

    def in_pages(payload):
        builder = PageBuilder(pages, payload)
        for layer in range(2):
            builder.write(layer, payload.read(layer))
        return builder.commit()

    file = written(pool, in_pages(TensorPayload(source, 96)))  # pyright: ignore[reportArgumentType]
    for start, stop in ((0, 96), (32, 80)):
        part = file.split(stop)[0] if stop < 96 else file
        part = part.split(start)[1] if start else part
        assert_equal(read(in_pages(part)), {name: tensor[:, :, start:stop] for name, tensor in source.items()})


def test_neighbouring_parts_are_joined(pool: DiskPool):
    file, other = written(pool, divisible(200)), written(pool, divisible(200))
    head, tail = file.split(70)
    whole = head.join(tail)
    assert whole is not None and (whole.start, whole.stop) == (0, 200)
    assert tail.join(head) is None and head.join(other.split(70)[1]) is None


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "cannot be read"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "truncated: layer 1 of block 0 has"),
        (lambda path: path.write_bytes(b""), "truncated: layer 0 of block 0 has 0 of"),
        (
            lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\x55"),
            "damaged: layer 1 of block 0 differs from what was written",
        ),
    ],
)
def test_damage_is_reported(damage, message, pool: DiskPool):
    file = written(pool, mixed())
    damage(file.path)
    with pytest.raises(LostPayloadError, match=message):
        read(file)


def test_every_flipped_byte_is_detected(pool: DiskPool):
    """By who reads the data if it is there, and by the next process if it is in the index."""
    payload = divisible(70)
    file = written(pool, payload, PromptKey("tenant", KEY[: 4 * 70]))
    fingerprint = pool._store.fingerprint
    assert fingerprint is not None
    content, data_at = file.path.read_bytes(), file.file.layout.data_at
    for at in range(0, len(content), 29):
        file.path.write_bytes(content[:at] + bytes([content[at] ^ 0x10]) + content[at + 1 :])
        if at < data_at:
            assert_equal(read(file), dict(payload.tensors))
            with pytest.raises(LostPayloadError):
                read_index(file.path, fingerprint, 2**24)
        else:
            read_index(file.path, fingerprint, 2**24)
            with pytest.raises(LostPayloadError):
                read(file)


@pytest.mark.parametrize(
    "namespace", [None, 0, "tenant", ("a", 1, None, ("b", 0.25, True)), (), "x" * 10**4, frozenset({1}), b"bytes"]
)
def test_an_index_names_the_prompt(namespace, pool: DiskPool):
    """Namespaces that JSON does not hold, or too long ones, are not found again; their file works nevertheless."""
    prompt = PromptKey(namespace, KEY, ("planner", ("not", "a", "name")))
    payload = divisible(120)
    file = written(pool, payload, prompt)
    assert_equal(read(file), dict(payload.tensors))
    assert file.path.stat().st_size == pool.charge(payload) + pool.prompt_bytes(200)
    fingerprint = pool._store.fingerprint
    assert fingerprint is not None
    if namespace in ("x" * 10**4, frozenset({1}), b"bytes"):
        with pytest.raises(LostPayloadError, match="of another origin"):
            read_index(file.path, fingerprint, 2**24)
        return
    found, named = read_index(file.path, fingerprint, 2**24)
    assert named == PromptKey(namespace, KEY, ("planner",)) and type(named.namespace) is type(namespace)
    assert (found.layout, found.digests, found.live) == (file.file.layout, file.file.digests, [(0, 120)])
    with pytest.raises(LostPayloadError, match="of another origin"):
        read_index(file.path, "0" * 64, 2**24)
    with pytest.raises(LostPayloadError, match="a header of"):
        read_index(file.path, fingerprint, 100)


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": -1}, {"tokens": True}, {"tokens": 10**30}, {"prompt_tokens": 10**12}, {"block_tokens": 0},
        {"token_dim": 9}, {"token_dim": "0"}, {"tensors": []}, {"tensors": [["x", "F32", [-1, 200]]]},
        {"tensors": [["x", "pickle", [200]]]}, {"tensors": {"x": 1}}, {"namespace": {"a": 1}},
    ],
)  # fmt: skip
def test_a_forged_header_is_a_miss(change: dict, pool: DiskPool):
    """Whoever writes a file with a valid seal can make the pool miss, not fail."""
    import hashlib

    file = written(pool, divisible(200), PromptKey(None, KEY))
    content, layout = file.path.read_bytes(), file.file.layout
    label = json.loads(content[16 : 16 + layout.header_bytes]) | change
    header = json.dumps(label).encode()
    index = content[:12] + len(header).to_bytes(4, "little") + header + content[16 + layout.header_bytes :]
    end = layout.data_at - 32 - layout.header_bytes + len(header)
    file.path.write_bytes(index[:end] + hashlib.sha256(index[:end]).digest() + content[layout.data_at :])
    with pytest.raises(LostPayloadError):
        read_index(file.path, str(pool._store.fingerprint), 2**24)
