"""One bit of a checkpoint's tensors that is another is found, on the rank that reads it."""

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from abkd_megatron.distillation.checksums import check_contents
from abkd_megatron.distillation.safe_reading import read_index
from abkd_megatron.errors import CheckpointError


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
