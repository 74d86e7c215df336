"""What a rank says of an error tells a lost or silent rank from one's own fault, and where to go on."""

from argparse import Namespace
from pathlib import Path

import pytest
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

pytest.importorskip("megatron.training")

from abkd_megatron.hosts import crash_report as module
from abkd_megatron.hosts.crash_report import UNEXPECTED, describe_crash, describe_startup_error, training_started

CLOSED = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:24469. More"
SILENT = "[../third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 60000ms for recv operation"


def raised(error: BaseException) -> BaseException:
    """The error, out of a function of this name."""

    def train_step() -> None:
        raise error

    try:
        train_step()
    except UNEXPECTED as caught:
        return caught
    raise AssertionError("not caught")


def said(error: BaseException) -> str:
    return describe_crash(raised(error))


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
    assert said(error).endswith(f"The last checkpoint is of step 2; megatron.load={tmp_path} resumes from it")


def without_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    def get_args() -> None:
        raise AssertionError("args is not initialized")

    monkeypatch.setattr(module, "get_args", get_args)


def test_before_megatron_has_read_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    without_arguments(monkeypatch)
    error = raised(ValueError("x"))
    assert not training_started(error)
    assert describe_startup_error(error).startswith("ended before the first step by ValueError: x; ")
    assert "because another rank" in describe_startup_error(raised(RuntimeError(CLOSED)))


def test_an_assertion_without_words_is_quoted_with_its_values(monkeypatch: pytest.MonkeyPatch) -> None:
    without_arguments(monkeypatch)
    args, config = Namespace(lr_decay_iters=3), Namespace(lr_warmup_steps=4)
    try:
        assert (
            config.lr_warmup_steps
            < args.lr_decay_iters
        )  # fmt: skip
    except AssertionError as caught:
        error = AssertionError().with_traceback(caught.__traceback__)  # pytest gives it words
    said = describe_startup_error(error)
    assert "config.lr_warmup_steps < args.lr_decay_iters" in said
    assert "(lr_warmup_steps is 4, lr-decay-iters is 3)" in said


def test_a_loop_that_is_still_preparing_has_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron sets the iteration before its loop, and the loop does much before its first step."""
    monkeypatch.setattr(module, "get_args", lambda: Namespace(curr_iteration=0))

    def train(steps: int, *, within: bool = False) -> None:
        def train_step() -> None:
            raise ValueError

        for _ in range(steps):
            loss_dict = {}  # noqa: F841  as Megatron's loop has after a step
        if within:
            train_step()
        raise ValueError

    def begun(*args: object, **kwargs: object) -> bool:
        try:
            train(*args, **kwargs)
        except ValueError as error:
            return training_started(error)
        raise AssertionError("not caught")

    assert not begun(0)
    assert begun(0, within=True) and begun(1) and begun(1, within=True)
    assert training_started(raised(ValueError())), "behind the loop"
