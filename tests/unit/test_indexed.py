"""Indexed datasets cut short, garbled, mixed up or of another tokenizer are refused; what is taken can be read.

The files are Megatron's own builder's, and read back through Megatron's own reader.
"""

import json
import random
import shutil
import struct
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("megatron.training")

from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from abkd_megatron.data import indexed
from abkd_megatron.data.indexed import Tokens, check_datasets, prefixes_of
from abkd_megatron.errors import DataError

VOCAB = 400
LENGTHS = [5, 1, 0, 17, 3, 8]
HEADER = 34


def write(prefix: Path, dtype=np.uint16, lengths=LENGTHS, largest=VOCAB - 1, modes=False) -> str:
    """A dataset of two sequences a document."""
    generator = random.Random(0)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype, multimodal=modes)
    for number, length in enumerate(lengths):
        ids = [generator.randrange(largest + 1) for _ in range(length)]
        if ids and number == 0:
            ids[0] = largest
        builder.add_item(torch.tensor(ids, dtype=torch.int64))
        if number % 2:
            builder.end_document()
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def check(prefix: str, vocab_size: int | None = VOCAB) -> Tokens:
    return check_datasets([prefix], vocab_size)[prefix]


def read(prefix: str) -> np.ndarray:
    """Every sequence, as training reads them."""
    dataset = IndexedDataset(prefix)
    return np.concatenate([dataset.get(number) for number in range(len(dataset))])


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> str:
    return write(tmp_path_factory.mktemp("whole") / "data")


@pytest.fixture
def copy(whole, tmp_path) -> str:
    for end in (".bin", ".idx"):
        shutil.copy(whole + end, tmp_path / f"data{end}")
    return str(tmp_path / "data")


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64, np.int16])
@pytest.mark.parametrize("modes", [False, True])
def test_whole(tmp_path, dtype, modes):
    prefix = write(tmp_path / "data", dtype, modes=modes)
    assert check(prefix) == Tokens(count=sum(LENGTHS), largest=VOCAB - 1)
    assert len(read(prefix)) == sum(LENGTHS)


def test_object_storage_is_passed_over():
    assert check_datasets(["s3://bucket/data", "msc://profile/data"], VOCAB) == {}


@pytest.mark.parametrize("end", [".bin", ".idx"])
def test_cut_short_anywhere(copy, end):
    file = Path(copy + end)
    content = file.read_bytes()
    for size in range(len(content)):
        file.write_bytes(content[:size])
        with pytest.raises(DataError, match=r"(?s)expected .*got .*prepare"):
            check(copy)


@pytest.mark.parametrize("end", [".bin", ".idx"])
def test_longer_than_it_should_be(copy, end):
    with open(copy + end, "ab") as file:
        file.write(b"\0\0")
    with pytest.raises(DataError, match=r"expected \d+ bytes.* got \d+"):
        check(copy)


SEQUENCES = len(LENGTHS)
POINTERS = HEADER + 4 * SEQUENCES
DOCUMENTS = POINTERS + 8 * SEQUENCES
FAULTS = {
    "magic": (0, b"MMIDIDY", r"Megatron index, version 1, got b'MMIDIDY"),
    "version": (9, b"\2", r"version 1, got .* and 2"),
    "dtype that is none": (17, b"\x63", r"uint16, got dtype code 99"),
    "dtype of no whole numbers": (17, b"\7", r"uint16, got dtype code 7"),
    "wider dtype": (17, b"\4", r"contiguous sequences, .*sequence 1 of 6"),
    "more sequences": (18, b"\7", r"expected \d+ bytes for 7 sequences and 4 document ends, got \d+"),
    "huge count": (18, b"\xff" * 8, r"for 18446744073709551615 sequences"),
    "negative length": (HEADER, struct.pack("<i", -5), r"negative length: sequence 0"),
    "longer sequence": (HEADER + 20, struct.pack("<i", 9), r"\.bin: expected 70 bytes, .* got 68"),
    "sequence elsewhere": (POINTERS + 8, struct.pack("<q", 12), r"sequence 1 of 6"),
    "negative place": (POINTERS, struct.pack("<q", -2), r"sequence 0 of 6"),
    "documents not in order": (DOCUMENTS + 8, struct.pack("<q", 5), r"ascending order"),
    "negative end of a document": (DOCUMENTS + 8, struct.pack("<q", -1), r"ascending order"),
    "documents from elsewhere on": (DOCUMENTS, struct.pack("<q", 1), r"at sequence 0, got 1"),
    "documents that end early": (DOCUMENTS + 24, struct.pack("<q", 5), r"end with the last sequence"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_index_that_contradicts(copy, name):
    at, written, message = FAULTS[name]
    with open(f"{copy}.idx", "r+b") as file:
        file.seek(at)
        file.write(written)
    with pytest.raises(DataError, match=message):
        check(copy)


@pytest.mark.parametrize("lengths", [[], [0, 0]])
def test_no_tokens(tmp_path, lengths):
    prefix = write(tmp_path / "data", lengths=lengths)
    with pytest.raises(DataError, match=r"expected (documents|tokens), got"):
        check(prefix)


@pytest.mark.parametrize("missing", [".bin", ".idx"])
def test_missing(copy, missing):
    Path(copy + missing).unlink()
    with pytest.raises(DataError, match=rf"data\{missing}"):
        check(copy)


def test_files_of_two_datasets(copy, tmp_path):
    other = write(tmp_path / "other", lengths=[5, 1, 0, 17, 3, 9])
    shutil.copy(f"{other}.bin", f"{copy}.bin")
    with pytest.raises(DataError, match=r"data\.bin: .*68 bytes.* 70"):
        check(copy)


def test_ids_of_another_tokenizer(whole, tmp_path):
    with pytest.raises(DataError, match=r"398, got 399 .* 0 of 34.*tokeni"):
        check(whole, VOCAB - 1)
    assert check(whole, None).largest == VOCAB - 1
    negative = write(tmp_path / "data", np.int32)
    ids = np.fromfile(f"{negative}.bin", np.int32)
    ids[20] = -7
    ids.tofile(f"{negative}.bin")
    for vocab_size, known in ((VOCAB, "0 to 399"), (None, "0 or more")):
        with pytest.raises(DataError, match=rf"{known}.*got -7 at token 20 of 34"):
            check(negative, vocab_size)


@pytest.mark.parametrize("at", [0, 3_000_000, 2**27 - 1])
def test_a_large_dataset_is_sampled_from_begin_to_end(tmp_path, at):
    """256 MiB that take no room on the disk: of zeros, of which one or a stretch is a token that is not there."""
    count, prefix = 2**27, str(tmp_path / "data")
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    builder.sequence_lengths, builder.document_indices = [count], [0, 1]
    builder.finalize(f"{prefix}.idx")
    with open(f"{prefix}.bin", "r+b") as file:
        file.truncate(2 * count)
        assert check(prefix) == Tokens(count, 0)
        file.seek(2 * at)
        file.write(struct.pack("<H", VOCAB) * min(count // 63, count - at))
    with pytest.raises(DataError, match=rf"got {VOCAB} at token \d+ of {count}"):
        check(prefix)


SPARSE_STRETCH = 2**22 + 4096
SPARSE = 2**28  # sequences of no token but the last: 3.5 GB that take no room on the disk


@pytest.fixture
def sparse(tmp_path) -> str:
    """A huge index of zeros, which contradicts nothing."""
    prefix, documents = str(tmp_path / "data"), SPARSE // 8
    np.full(9, 7, np.uint16).tofile(f"{prefix}.bin")
    with open(f"{prefix}.idx", "wb") as file:
        file.write(struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, SPARSE, documents))
        file.truncate(HEADER + 12 * SPARSE + 8 * documents)
    put(prefix, HEADER + 4 * (SPARSE - 1), struct.pack("<i", 9))
    put(prefix, HEADER + 12 * SPARSE + 8 * (documents - 1), struct.pack("<q", SPARSE))
    return prefix


def put(prefix: str, at: int, written: bytes) -> None:
    with open(f"{prefix}.idx", "r+b") as file:
        file.seek(at)
        file.write(written)


def test_little_of_a_large_index_is_read(sparse, monkeypatch):
    counted = []

    def counting(*args, **kwargs):
        read = fromfile(*args, **kwargs)
        counted.append(read.nbytes)
        return read

    fromfile = np.fromfile
    monkeypatch.setattr(np, "fromfile", counting)
    assert check(sparse) == Tokens(9, 7)
    assert sum(counted) == 64 * 4096 * (4 + 8 + 8) + 2 * 9


@pytest.mark.parametrize(
    ("at", "written", "message"),
    [
        (HEADER, struct.pack("<i", 1), r"sequence 1 of"),
        (HEADER + 4 * (SPARSE - 1), struct.pack("<i", 8), r"expected 16 bytes, as its index says, got 18"),
        (HEADER + 4 * (SPARSE // 2), bytes([255]) * 4 * SPARSE_STRETCH, r"negative length: sequence \d+ of"),
        (
            HEADER + 4 * SPARSE + 8 * (SPARSE // 2),
            bytes([1]) * 8 * SPARSE_STRETCH,
            r"contiguous .* sequence \d+ of",
        ),
        (HEADER + 12 * SPARSE + 8, bytes([1]) * 8, r"ascending order"),
    ],
)
def test_what_a_sample_of_a_large_index_shows(sparse, at, written, message):
    put(sparse, at, written)
    with pytest.raises(DataError, match=message):
        check(sparse)


def test_many_datasets_are_sampled_less_each(whole, monkeypatch):
    read = []
    monkeypatch.setattr(indexed, "_check", lambda prefix, vocab_size, parts: read.append(parts))
    for count, parts in ((1, 64), (64, 64), (128, 32), (5000, 4)):
        check_datasets([f"{whole}-{number}" for number in range(count)], VOCAB)
        assert set(read) == {parts} and len(read) == count
        read.clear()


@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_garbled_files_are_refused_or_can_be_read(whole, copy, data):
    """Bytes written over, put in or taken out, in either file or both."""
    for end in (".bin", ".idx"):
        content = bytearray(Path(whole + end).read_bytes())
        for _ in range(data.draw(st.integers(0, 3), label=f"changes of {end}")):
            first = data.draw(st.integers(0, len(content)), label="from")
            last = data.draw(st.integers(first, min(first + 8, len(content))), label="to")
            content[first:last] = data.draw(st.binary(max_size=8), label="written")
        Path(copy + end).write_bytes(content)
    try:
        found = check(copy)
    except DataError as error:
        assert "expected" in str(error) and "prepare" in str(error) and str(error).isprintable()
        return
    ids = read(copy)
    assert len(ids) == found.count and ids.min() >= 0 and ids.max() == found.largest < VOCAB


def arguments(**given) -> Namespace:
    names = ("data_path", "train_data_path", "valid_data_path", "test_data_path")
    names += ("data_args_path", "per_split_data_args_path")
    return Namespace(**{"mock_data": False, **dict.fromkeys(names), **given})


def test_prefixes_of_a_job(tmp_path):
    listed, by_split = tmp_path / "listed", tmp_path / "by-split.json"
    listed.write_text("0.3 a\n0.7 b\n")
    by_split.write_text(json.dumps({"train": "0.5 a 0.5 b", "valid": ["c"], "test": ["c"]}))
    assert prefixes_of(arguments()) == []
    assert prefixes_of(arguments(data_path=["a"], mock_data=True)) == []
    assert prefixes_of(arguments(data_path=["a", "b", "a"])) == ["a", "b"]
    assert prefixes_of(arguments(data_path=["0.3", "a", "0.7", "b"])) == ["a", "b"]
    assert prefixes_of(arguments(train_data_path=["a"], valid_data_path=["1", "b"])) == ["a", "b"]
    assert prefixes_of(arguments(data_args_path=str(listed))) == ["a", "b"]
    assert prefixes_of(arguments(per_split_data_args_path=str(by_split))) == ["a", "b", "c"]


@pytest.mark.parametrize(
    "content", [b"{", b"\xff", b"[]", b'{"train": ["a"], "valid": 3, "test": 4}', b'{"train": "a"}']
)
def test_lists_of_datasets_that_are_none(tmp_path, content):
    file = tmp_path / "list"
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"list: "):
        prefixes_of(arguments(per_split_data_args_path=str(file)))
    with pytest.raises(DataError, match=r"nowhere: "):
        prefixes_of(arguments(data_args_path=str(tmp_path / "nowhere")))
