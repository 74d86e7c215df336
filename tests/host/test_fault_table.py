"""Every fault of the table ends every rank with a message in time, and the last good checkpoint loads."""

import re
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from fault_table import ROWS, Row, job, run, spoil
from launch import Rank, launch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from abkd_megatron.teacher.checkpoint import TeacherCheckpoint

LAST = [row for row in ROWS if row.is_asleep or row.torchrun is not None]
"""Rows that are begun at once, beside the others: they mostly wait."""


def folder(workspace: Path, row: Row) -> Path:
    return workspace / "faults" / str(ROWS.index(row))


@pytest.fixture(scope="module")
def begun(
    request: pytest.FixtureRequest, workspace: Path, config: Path, teacher: Path
) -> Iterator[dict[Row, "Future[list[Rank]]"]]:
    selected = [item.callspec.params["row"] for item in request.session.items if item.name.startswith("test_fault[")]
    sleepers = [row for row in selected if row.is_asleep]
    others = [row for row in selected if row.torchrun is not None]
    with ThreadPoolExecutor(2) as asleep, ThreadPoolExecutor(1) as one_by_one:
        yield {
            row: pool.submit(run, row, config, teacher, folder(workspace, row))
            for pool, rows in ((asleep, sleepers), (one_by_one, others))
            for row in rows
        }


@pytest.mark.parametrize("row", sorted(ROWS, key=lambda row: row in LAST), ids=str)
def test_fault(row: Row, begun: dict[Row, "Future[list[Rank]]"], workspace: Path, config: Path, teacher: Path) -> None:
    save = folder(workspace, row)
    if row.teacher is not None:
        teacher = spoil(teacher, row.teacher, save.with_name(f"{save.name}-teacher"))
    ranks = begun[row].result() if row in begun else run(row, config, teacher, save)
    for number, (rank, end) in enumerate(zip(ranks, row.ends, strict=True)):
        said = f"rank {number} ended with {rank.code}:\n{rank.output[-6000:]}"
        assert rank.code == (row.torchrun if end.code is None else end.code), said
        assert re.search(end.says, rank.output), said
    assert row.inject is None or any("injected at" in rank.output for rank in ranks)
    if row.fault == "full disk":
        assert row.inject is not None and "No space left on device" in ranks[row.inject[2]].output
    assert last_saved(save) == row.saved
    if row.resumed:
        ended = launch(["-m", "abkd_megatron", *job(config, teacher, save, row.settings, load=save)], len(row.ends))
        assert [rank.code for rank in ended] == [0] * len(row.ends), ended[-1].output[-6000:]
        assert last_saved(save) == 6


def last_saved(save: Path) -> int | None:
    """The step of the last checkpoint, all of which was read."""
    tracker = save / "latest_checkpointed_iteration.txt"
    if not tracker.exists():
        return None
    directory = TeacherCheckpoint.open(save).directory
    reader = dcp.FileSystemReader(directory)
    stored = reader.read_metadata().state_dict_metadata
    tensors = {
        key: torch.full(tuple(item.size), 7, dtype=item.properties.dtype)
        for key, item in stored.items()
        if isinstance(item, TensorStorageMetadata)
    }
    assert len(tensors) >= 10
    dcp.load(tensors, storage_reader=reader)
    # Of the optimizer's flat buffers Megatron saves the padding between parameters, too, as it finds it.
    read = {key: tensor for key, tensor in tensors.items() if ".bucket_idx_" not in key}
    assert not [key for key, tensor in read.items() if not torch.isfinite(tensor).all()]
    return int(tracker.read_text())
