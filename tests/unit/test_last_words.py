"""What a rank says of an error tells a lost or silent rank from one's own fault, and where to go on."""

from argparse import Namespace
from pathlib import Path

import pytest
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

pytest.importorskip("megatron.training")

from abkd_megatron.integrations import last_words as module
from abkd_megatron.integrations.last_words import UNFORESEEN, last_words

CLOSED = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:24469. More"
SILENT = "[../third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 60000ms for recv operation"


def said(error: BaseException) -> str:
    """Of an error that comes out of a function of this name."""

    def train_step() -> None:
        raise error

    try:
        train_step()
    except UNFORESEEN as caught:
        return last_words(caught)
    raise AssertionError("not caught")


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (RuntimeError(CLOSED), "because another rank of the job has ended or cannot be reached; "),
        (dist.DistBackendError("NCCL communicator was aborted"), "because another rank of the job has ended"),
        (RuntimeError(SILENT), "because another rank did not answer for 7 min (distributed-timeout-minutes): "),
        (CheckpointException("write", {}), "because the checkpoint could not be written or read, here or on another"),
        (ValueError("no such\nthing"), "by an error on this rank (ValueError: no such; traceback above)"),
        (KeyError(), "by an error on this rank (KeyError; traceback above)"),
    ],
)
def test_whose_fault_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: BaseException, cause: str) -> None:
    args = Namespace(curr_iteration=2, distributed_timeout_minutes=7, save=str(tmp_path))
    monkeypatch.setattr(module, "get_args", lambda: args)
    words = said(error)
    assert words.startswith(f"ended in step 3 {cause}") and "\n" not in words
    assert words.endswith(f"No checkpoint was finished in {tmp_path}")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("2")
    assert said(error).endswith(f"The last checkpoint is of step 2; megatron.load={tmp_path} goes on from there")


def test_before_megatron_has_read_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    def get_args() -> None:
        raise AssertionError("args is not initialized")

    monkeypatch.setattr(module, "get_args", get_args)
    assert said(ValueError("x")) == (
        "ended before the first step by an error on this rank (ValueError: x; traceback above). "
        "Nothing was saved: megatron.save is not set"
    )
