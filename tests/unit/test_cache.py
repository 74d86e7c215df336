"""Teacher cache: keys, records, and files that are damaged, missing, or written by several at once."""

import dataclasses
import json
import math
import os
import pickle
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from abkd_megatron.cache.dataset import RECORDS, WithRecords, readers_of
from abkd_megatron.cache.key import sample_key
from abkd_megatron.cache.manifest import FORMAT, MANIFEST, Identity, read_manifest
from abkd_megatron.cache.record import RecordLayout
from abkd_megatron.cache.store import CacheReader, CacheWriter
from abkd_megatron.data.wrapped import samples_of
from abkd_megatron.errors import ConfigError, DataError
from abkd_megatron.student.cached import CachedTeacher
from abkd_megatron.vocab_parallel.teacher_records import TeacherRecords

IDENTITY = Identity(
    teacher="a" * 64,
    teacher_path="/teacher",
    teacher_iteration=5,
    tokenizer="t",
    vocab_size=400,
    seq_length=4,
    reset_attention_mask=False,
    temperature=1.0,
    top_k=8,
    precision="fp16",
)
BYTES = IDENTITY.layout.bytes_per_token


def key(number: int) -> bytes:
    return number.to_bytes(16, "little")


def rows(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (4, BYTES), dtype=np.uint8)


def write(directory: Path, numbers: range, shard_bytes: int = 10**6) -> None:
    with CacheWriter(directory, IDENTITY, shard_bytes) as writer:
        for number in numbers:
            writer.add(key(number), rows(number))


def shards(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.safetensors"))


# ---- keys


def sample(**changed: torch.Tensor) -> dict[str, torch.Tensor]:
    tokens = torch.arange(10, 16)
    return {"tokens": tokens, "labels": tokens + 1, "position_ids": torch.arange(6), **changed}


def test_a_key_is_of_the_content() -> None:
    plain = sample_key(sample())
    assert len(plain) == 16
    assert plain == sample_key(sample(loss_mask=torch.zeros(6), tokens=torch.arange(10, 16).clone()))
    others = [
        sample(tokens=torch.arange(11, 17)),
        sample(labels=torch.zeros(6, dtype=torch.int64)),
        sample(position_ids=torch.tensor([0, 1, 2, 0, 1, 2])),
        sample(cu_seqlens=torch.tensor([0, 6], dtype=torch.int32)),
        sample(cu_seqlens=torch.tensor([0, 3, 6], dtype=torch.int32)),
    ]
    assert len({plain, *map(sample_key, others)}) == 6
    padded = sample(cu_seqlens=torch.tensor([0, 3, 6, 6, 6], dtype=torch.int32))
    assert sample_key(padded) == sample_key(others[-1])


# ---- records


@pytest.mark.parametrize("vocab_size, id_bytes", [(65536, 2), (65537, 3), (1 << 24, 3), ((1 << 24) + 1, 4)])
@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_records_come_back(vocab_size: int, id_bytes: int, precision: str) -> None:
    layout = RecordLayout(vocab_size, 5, precision)
    assert layout.id_bytes == id_bytes
    draw = torch.Generator().manual_seed(0)
    log_probs = -30 * torch.rand(7, 5, generator=draw)
    log_probs[0, 0] = -torch.inf
    given = TeacherRecords(
        ids=torch.randint(0, vocab_size, (7, 5), generator=draw, dtype=torch.int32),
        log_probs=log_probs,
        log_rest=torch.tensor([-torch.inf, *(-float(n) for n in range(6))]),
        entropy=torch.rand(7, generator=draw),
        label_log_prob=-torch.rand(7, generator=draw),
    )
    given.ids[1] = vocab_size - 1
    packed = layout.pack(given)
    assert packed.shape == (7, layout.bytes_per_token) and packed.dtype == torch.uint8
    found = layout.unpack(packed)
    for name in ("ids", "log_rest", "entropy", "label_log_prob"):
        assert torch.equal(getattr(found, name), getattr(given, name)), name
    if precision == "fp32":
        assert torch.equal(found.log_probs, log_probs)
    torch.testing.assert_close(found.log_probs, log_probs, rtol=2**-11, atol=0.0)


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_draws_come_back(precision: str) -> None:
    layout = RecordLayout(70000, 3, precision, 4)
    assert layout.bytes_per_token == 12 + 7 * (3 + (2 if precision == "fp16" else 4))
    given = TeacherRecords(
        ids=torch.tensor([[5, 6, 7, 8, -1, 69999, -1], [1, 2, 3, -1, -1, -1, -1]], dtype=torch.int32),
        log_probs=torch.tensor([[-1.0, -2, -3, -8, -7, -5, -6], [-1.0, -2, -3, 0, 0, 0, 0]]),
        log_rest=torch.tensor([-2.0, -torch.inf]),
        entropy=torch.ones(2),
        label_log_prob=-torch.ones(2),
        draws=torch.tensor([[3, 0, 1, 0], [0, 0, 0, 0]], dtype=torch.int32),
    )
    found = layout.unpack(layout.pack(given))
    assert found.draws is not None and found.num_kept == 3
    assert torch.equal(found.ids[:, :3], given.ids[:, :3])
    rows = zip(found.ids[:, 3:].tolist(), found.draws.tolist(), strict=True)
    drawn = [dict(zip(ids, counts, strict=True)) for ids, counts in rows]
    assert drawn == [{8: 3, 69999: 1, -1: 0}, {-1: 0}]
    at = found.ids[0].tolist().index(69999)
    assert found.log_probs[0, at] == -5.0


def test_k_by_bytes() -> None:
    assert RecordLayout.of_bytes(128000, 12 + 5 * 40, draws=8) == RecordLayout(128000, 32, draws=8)
    assert RecordLayout(20, 20, draws=8).draws == 0
    with pytest.raises(ConfigError):
        RecordLayout.of_bytes(128000, 12 + 5 * 8, draws=8)
    assert RecordLayout(128000, 64).bytes_per_token == 12 + 64 * 5
    assert RecordLayout.of_bytes(128000, 332) == RecordLayout(128000, 64)
    assert RecordLayout.of_bytes(128000, 336).top_k == 64
    assert RecordLayout.of_bytes(20, 1000).top_k == 20
    for wrong in (lambda: RecordLayout.of_bytes(128000, 16), lambda: RecordLayout(20, 21), lambda: RecordLayout(20, 0)):
        with pytest.raises(ConfigError):
            wrong()


# ---- files


def test_what_was_written_is_read(tmp_path: Path) -> None:
    write(tmp_path, range(10), shard_bytes=3 * (4 * BYTES + 20))
    assert len(shards(tmp_path)) == 4
    reader = CacheReader(tmp_path)
    assert len(reader) == 10 and reader.identity == IDENTITY
    for copy in (reader, pickle.loads(pickle.dumps(reader))):
        for number in range(10):
            found = copy.read(key(number))
            assert found is not None and np.array_equal(found, rows(number))
    assert reader.read(key(11)) is None
    assert [reader.has(key(number)) for number in range(8, 12)] == [True, True, False, False]


def test_keys_with_the_same_first_bytes(tmp_path: Path) -> None:
    keys = [bytes(8) + bytes([n] * 8) for n in range(3)]
    with CacheWriter(tmp_path, IDENTITY) as writer:
        for number in range(2):
            writer.add(keys[number], rows(number))
    reader = CacheReader(tmp_path)
    assert all(np.array_equal(reader.read(keys[number]), rows(number)) for number in range(2))
    assert reader.read(keys[2]) is None


def test_writers_at_once(tmp_path: Path) -> None:
    with CacheWriter(tmp_path, IDENTITY) as one, CacheWriter(tmp_path, IDENTITY) as other:
        for number in range(6):
            one.add(key(number), rows(number))
            one.add(key(number), rows(number))
            other.add(key(number + 3), rows(number + 3))
    reader = CacheReader(tmp_path)
    assert len(reader) == 12
    assert all(np.array_equal(reader.read(key(number)), rows(number)) for number in range(9))


def test_a_killed_writer_loses_its_open_shard(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        writer = CacheWriter(tmp_path, IDENTITY, 2 * (4 * BYTES + 20))
        for number in range(5):
            writer.add(key(number), rows(number))
        (tmp_path / ".x-000009.safetensors.tmp").write_bytes(b"half a shard")
        os._exit(9)
    os.waitpid(child, 0)
    journal = next(tmp_path.glob("*.jsonl"))
    whole = journal.read_bytes()
    journal.write_bytes(whole[:-5])  # killed between a shard and its line
    reader = CacheReader(tmp_path)
    assert [reader.has(key(number)) for number in range(5)] == [True] * 4 + [False]
    write(tmp_path, range(4, 5))
    assert np.array_equal(CacheReader(tmp_path).read(key(4)), rows(4))


def test_a_flipped_byte_is_not_read(tmp_path: Path) -> None:
    write(tmp_path, range(3))
    (path,) = shards(tmp_path)
    content = bytearray(path.read_bytes())
    for at in (len(content) - 1, len(content) - 2 * (4 * BYTES + 20) + 3, len(content) - 2 * (4 * BYTES + 20) + 17):
        content[at] ^= 1
    path.write_bytes(content)
    reader = CacheReader(tmp_path)
    assert np.array_equal(reader.read(key(0)), rows(0))
    for number in (1, 2):
        with pytest.raises(DataError, match="checksum"):
            reader.read(key(number))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def garble(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:9] + b"#" + content[10:])


@pytest.mark.parametrize("spoil", [Path.unlink, cut, garble, lambda path: path.write_bytes(b"")])
@pytest.mark.parametrize("noted", [True, False])
def test_a_damaged_shard_is_named(tmp_path: Path, spoil, noted: bool) -> None:
    write(tmp_path, range(3))
    (path,) = shards(tmp_path)
    spoil(path)
    if not noted:
        next(tmp_path.glob("*.jsonl")).unlink()
        if not path.exists():
            return
    with pytest.raises(DataError, match=path.name):
        CacheReader(tmp_path)


def test_a_shard_that_vanishes_later_is_named(tmp_path: Path) -> None:
    write(tmp_path, range(3))
    reader = CacheReader(tmp_path)
    (path,) = shards(tmp_path)
    path.unlink()
    with pytest.raises(DataError, match=path.name):
        reader.read(key(1))


@contextmanager
def no_file_larger_than(num_bytes: int) -> Iterator[None]:
    """Let writes fail, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_cache_without_draws_is_what_it_was(tmp_path: Path) -> None:
    """Its manifest and its shards' digest are those of versions without draws."""
    assert IDENTITY.digest == "401fd4b9742a1b4eabd67d855ce441c7cf30b64a2e125af9041624b26e7582ec"
    write(tmp_path, range(1))
    assert "draws" not in json.loads((tmp_path / "manifest.json").read_text())
    drawn = dataclasses.replace(IDENTITY, draws=4)
    assert drawn.digest != IDENTITY.digest
    with CacheWriter(tmp_path / "drawn", drawn):
        pass
    assert CacheReader(tmp_path / "drawn").identity == drawn


def test_a_full_disk_keeps_what_is_there(tmp_path: Path) -> None:
    write(tmp_path, range(3))
    with no_file_larger_than(600), pytest.raises(DataError, match="make room"):
        write(tmp_path, range(3, 12))
    assert len(CacheReader(tmp_path)) == 3
    assert not list(tmp_path.glob(".*"))
    with no_file_larger_than(100), pytest.raises(DataError, match="make room"):
        CacheWriter(tmp_path / "new", IDENTITY)


@pytest.mark.parametrize(
    "change",
    [
        {"teacher": "b" * 64},
        {"tokenizer": "u"},
        {"temperature": 2.0},
        {"top_k": 9},
        {"seq_length": 8},
        {"draws": 4},
    ],
)
def test_another_cache_is_rejected_by_name(tmp_path: Path, change: dict) -> None:
    write(tmp_path, range(1))
    with pytest.raises(ConfigError, match=next(iter(change))):
        CacheWriter(tmp_path, dataclasses.replace(IDENTITY, **change))
    with CacheWriter(tmp_path, dataclasses.replace(IDENTITY, teacher_path="/elsewhere")):
        pass


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"format": 99}', json.dumps({"format": FORMAT}).encode()])
def test_a_manifest_that_is_none(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(DataError, match=MANIFEST):
        read_manifest(tmp_path)
    (tmp_path / MANIFEST).write_bytes(content)
    with pytest.raises(DataError):
        CacheReader(tmp_path)


@pytest.mark.parametrize("change", [{"top_k": 9}, {"teacher": "b" * 64}])
def test_a_shard_of_another_cache_is_rejected(tmp_path: Path, change: dict) -> None:
    other = dataclasses.replace(IDENTITY, **change)
    with CacheWriter(tmp_path / "other", other) as writer:
        writer.add(key(1), np.zeros((4, other.layout.bytes_per_token), dtype=np.uint8))
    write(tmp_path / "cache", range(3))
    (path,) = shards(tmp_path / "other")
    path.rename(tmp_path / "cache" / path.name)
    with pytest.raises(DataError, match=path.name):
        CacheReader(tmp_path / "cache")


# ---- samples


class Samples(Dataset):
    """Four samples of a data set; `split` is what Megatron's loader asks for."""

    split = "valid"

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int | None) -> dict[str, torch.Tensor]:
        tokens = torch.arange(4) + 10 * (index or 0)
        return {
            "tokens": tokens,
            "labels": tokens + 1,
            "position_ids": torch.arange(4),
            "loss_mask": torch.full((4,), float(index is not None)),
        }


def fill(directory: Path, numbers: range, **changed: float) -> WithRecords:
    """Write uniform records of some of the samples, and return all samples with them."""
    uniform = -math.log(400)
    with CacheWriter(directory, IDENTITY) as writer:
        for number in numbers:
            labels = Samples()[number]["labels"]
            ids = (labels.unsqueeze(-1) + torch.arange(8)).to(torch.int32)
            values = {"log_probs": uniform, "log_rest": math.log(392 / 400), "label": uniform, **changed}
            records = TeacherRecords(
                ids=ids,
                log_probs=torch.full((4, 8), values["log_probs"]),
                log_rest=torch.full((4,), values["log_rest"]),
                entropy=torch.full((4,), -uniform),
                label_log_prob=torch.full((4,), values["label"]),
            )
            writer.add(sample_key(Samples()[number]), IDENTITY.layout.pack(records).numpy())
    return WithRecords(Samples(), CacheReader(directory), "error")


def test_samples_get_their_records(tmp_path: Path) -> None:
    samples = fill(tmp_path, range(3))
    assert len(samples) == 4 and samples.split == "valid"
    assert samples.check(3) == 3
    for each in (samples, pickle.loads(pickle.dumps(samples))):
        found = each[2]
        assert found[RECORDS].shape == (4, BYTES + 1) and bool((found[RECORDS][:, -1] == 1).all())
        assert torch.equal(IDENTITY.layout.unpack(found[RECORDS][:, :-1]).ids[:, 0], found["labels"].to(torch.int32))


def test_a_sample_without_records(tmp_path: Path) -> None:
    samples = fill(tmp_path, range(1, 3))
    for rejected in (lambda: samples[0], lambda: samples.check(None)):
        with pytest.raises(DataError, match="on_miss"):
            rejected()
    assert not samples[None][RECORDS].any()  # fills up a batch and does not count
    lenient = WithRecords(Samples(), CacheReader(tmp_path), "lm")
    assert not lenient[0][RECORDS].any() and lenient.check(None) == 2


class Blend(Samples):
    """The same samples, of two data sets; Megatron may map its index at the first sample."""

    def __init__(self) -> None:
        self.dataset_index: np.ndarray | None = None

    def __getitem__(self, index: int | None) -> dict[str, torch.Tensor]:
        self.dataset_index = np.array([0, 1, 0, 1], dtype=np.int16)
        return {"dataset_id": self.dataset_index[index or 0], **super().__getitem__(index)}


def test_samples_of_one_source_get_its_records(tmp_path: Path) -> None:
    fill(tmp_path, range(1, 2))
    readers = readers_of({1: tmp_path, 5: tmp_path})
    samples = WithRecords(Blend(), readers, "error")
    assert bool((samples[1][RECORDS][:, -1] == 1).all())
    assert samples[0][RECORDS].shape == (4, BYTES + 1) and not samples[0][RECORDS].any()
    assert samples_of(Blend(), readers, 4).tolist() == [1, 3] and not len(samples_of(Samples(), readers, 4))
    assert samples.check(3) == 1
    with pytest.raises(DataError, match="sample 3 in the cache"):
        samples.check(4)
    # Text that is no blend has the default teacher.
    assert WithRecords(Samples(), readers, "error").check(None) == 0


@pytest.mark.parametrize("changed", [{"label": -1.0}, {"log_rest": -5.0}, {"log_probs": float("nan")}])
def test_records_that_are_not_of_the_data(tmp_path: Path, changed: dict[str, float]) -> None:
    with pytest.raises(DataError, match="records of this data"):
        fill(tmp_path, range(4), **changed).check(None)


def test_missing_records_are_uniform(tmp_path: Path) -> None:
    samples = fill(tmp_path, range(1))
    lenient = WithRecords(samples._dataset, samples._readers, "lm")
    teacher = CachedTeacher(IDENTITY.layout, "lm", torch.stack([lenient[0][RECORDS], lenient[1][RECORDS]]))
    records, cached = teacher.take()
    assert cached is not None and cached.tolist() == [[True, False]] * 4
    total = torch.cat([records.log_probs, records.log_rest.unsqueeze(-1)], dim=-1).logsumexp(-1)
    torch.testing.assert_close(total, torch.zeros(8), rtol=0.0, atol=2e-3)
    assert records.ids[1].tolist() == list(range(8)) and records.ids[0, 0] == 1
    with pytest.raises(ConfigError):
        teacher.take()
