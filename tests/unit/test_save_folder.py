"""The lock of a folder of checkpoints, and which folders of checkpoints and event files a run may begin in."""

import multiprocessing
import os
import signal
import time
from argparse import Namespace
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import forked
import pytest

pytest.importorskip("megatron.training")

from abkd_megatron.errors import ConfigError
from abkd_megatron.preflight import student_checkpoint as module
from abkd_megatron.preflight.student_checkpoint import check_save, mixed_events, only_writer


def arguments(save: Path | None, **others: object) -> Namespace:
    given = {"load": None, "finetune": False, "pretrained_checkpoint": None, "ckpt_step": None, "skip_train": False}
    given |= {"save": None if save is None else str(save), "tensorboard_dir": None}
    return Namespace(**{**given, **others})


def hold(folder: Path, ready: Connection) -> None:
    """As a job whose data loader, a child by fork, outlives it."""
    with only_writer(arguments(folder)):
        child = os.fork()
        if child:
            ready.send(child)
        time.sleep(60)


@pytest.fixture
def other_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[multiprocessing.process.BaseProcess]:
    monkeypatch.setattr(module, "_SECONDS_FOR_THE_LAST_WRITER", 0.3)
    context = forked.context()
    ready, there = context.Pipe()
    process = context.Process(target=hold, args=(tmp_path, there))
    process.start()
    child = ready.recv()
    yield process
    process.kill()
    process.join()
    os.kill(child, signal.SIGKILL)


def test_a_second_writer_is_refused_until_the_first_is_gone(
    tmp_path: Path, other_job: multiprocessing.process.BaseProcess
) -> None:
    for asks in (False, True):
        with (
            pytest.raises(ConfigError, match=f"process {other_job.pid} on "),
            only_writer(arguments(tmp_path), asks=asks),
        ):
            pass
    with only_writer(arguments(tmp_path, skip_train=True)), only_writer(arguments(None)):
        pass  # nothing is written
    other_job.kill()
    other_job.join()
    with only_writer(arguments(tmp_path)):
        pass


def test_asking_leaves_nothing_behind(tmp_path: Path) -> None:
    with only_writer(arguments(tmp_path), asks=True):
        pass
    assert not list(tmp_path.iterdir())


def test_which_folders_a_run_may_save_to(tmp_path: Path) -> None:
    empty, full, link = tmp_path / "empty", tmp_path / "full", tmp_path / "link"
    for folder in (empty, full):
        folder.mkdir()
    (full / "latest_checkpointed_iteration.txt").write_text("100")
    link.symlink_to(full)
    fine = [
        arguments(None),
        arguments(empty),
        arguments(empty, load=str(empty)),  # of a job's first start
        arguments(full, load=str(full)),
        arguments(full, load=str(link)),
        arguments(full, load=str(full), ckpt_step=30),
        arguments(empty, load=str(full), finetune=True),
        arguments(full, skip_train=True),
    ]
    for args in fine:
        check_save(args)
    refused = [
        arguments(full),
        arguments(full, load=str(full), finetune=True),
        arguments(full, load=str(empty)),
        arguments(full, load=str(empty), pretrained_checkpoint=str(full)),
    ]
    for args in refused:
        with pytest.raises(ConfigError, match=r"step 100.*folder"):
            check_save(args)


def test_event_files_of_another_run(tmp_path: Path) -> None:
    events, save = tmp_path / "events", tmp_path / "save"
    for folder in (events, save):
        folder.mkdir()
    assert mixed_events(arguments(save)) is None
    assert mixed_events(arguments(save, tensorboard_dir=str(events))) is None
    (events / "events.out.tfevents.1").touch()
    assert "earlier job" in (mixed_events(arguments(save, tensorboard_dir=str(events))) or "")
    assert mixed_events(arguments(save, tensorboard_dir=str(events), load=str(save))) is None
