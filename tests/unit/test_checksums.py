"""One bit of a checkpoint's tensors that is another is found, on the rank that reads it."""

import tracemalloc
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from abkd_megatron.errors import CheckpointError
from abkd_megatron.teacher.checksums import check_contents
from abkd_megatron.teacher.safe_load import read_index


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    dcp.save({"a": torch.arange(1000.0), "b": torch.arange(5), "c": {"text": "no tensor"}}, checkpoint_id=tmp_path)
    return tmp_path


def test_what_was_written_passes(saved: Path) -> None:
    check_contents(saved, read_index(saved))


def test_another_bit_is_found_by_one_of_the_ranks(saved: Path) -> None:
    (file,) = saved.glob("*.distcp")
    content = bytearray(file.read_bytes())
    content[content.index(torch.tensor([999.0]).numpy().tobytes())] ^= 1
    file.write_bytes(content)
    told = []
    for rank in range(3):
        try:
            check_contents(saved, read_index(saved), rank, 3)
        except CheckpointError as error:
            told.append(str(error))
    (message,) = told
    assert f"damaged: {file} holds other bytes than were written" in message and "checksum" in message


def test_what_is_no_archive_is_refused(saved: Path) -> None:
    (file,) = saved.glob("*.distcp")
    file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(CheckpointError, match="holds other bytes"):
        check_contents(saved, read_index(saved))


def test_a_large_tensor_is_read_in_blocks(tmp_path: Path) -> None:
    """One of 64 MiB, in a few MiB of memory."""
    dcp.save({"a": torch.zeros(2**24), "b": torch.ones(3)}, checkpoint_id=tmp_path)
    index = read_index(tmp_path)
    tracemalloc.start()
    try:
        check_contents(tmp_path, index)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2**23, f"{peak} bytes"


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_another_bit_anywhere_in_a_large_tensor_is_found(tmp_path: Path, share: float) -> None:
    dcp.save({"a": torch.zeros(2**21)}, checkpoint_id=tmp_path)
    (file,) = tmp_path.glob("*.distcp")
    with file.open("r+b") as opened:
        opened.seek(int(file.stat().st_size * share))
        opened.write(b"\1")
    with pytest.raises(CheckpointError, match="checksum"):
        check_contents(tmp_path, read_index(tmp_path))
