"""Jobs as child processes: what is read in Megatron's log, and how the time left is told."""

import time

import pytest

from abkd_megatron.errors import HostError
from abkd_megatron.tools import runs

STEPS = """\
training ...
 [2026-01-01 10:00:00.000001] iteration        1/      30 | consumed samples:           16 | \
elapsed time per iteration (ms): 1005.5 | learning rate: 2.000000E-04 | lm loss: 7.637462E+00 | \
loss scale: 1.0 |
 [2026-01-01 10:00:09.000001] iteration       10/      30 | consumed samples:          160 | \
elapsed time per iteration (ms): 710.6 | learning rate: 2.000000E-03 | lm loss: 6.363683E+00 | \
kd loss: 2.5E+00 | kl to teacher: 3.766551E+00 | top-1 agreement: 9.218750E-02 | \
total loss: 1.389091E+01 | number of nan iterations:   0 |
"""
REPORT = (
    " validation loss at iteration 20 | lm loss value: 5.9E+00 | lm loss PPL: 3.65E+02 | \n"
    " validation loss at iteration 30 on validation set | lm loss value: 5.7E+00 | lm loss PPL: 2.9E+02 | \n"
    " validation loss at iteration 30 on test set | lm loss value: 5.606605E+00 | lm loss PPL: 2.7E+02 | "
    "kl to teacher value: 5.000000E-01 | kl to teacher PPL: 1.648721E+00 | \n"
)


def test_progress_is_the_last_whole_step_with_its_losses():
    losses = {"lm loss": 6.363683, "kd loss": 2.5, "kl to teacher": 3.766551, "top-1 agreement": 0.0921875}
    assert runs.progress(STEPS) == runs.Progress(10, 30, losses)
    assert runs.progress(STEPS[:-40]) == runs.Progress(1, 30, {"lm loss": 7.637462})


def test_progress_of_an_evaluation_counts_both_splits():
    log = "Evaluating on 64 samples\nEvaluating iter 1/2\nEvaluating iter 2/2\nEvaluating iter 1/2\n"
    assert runs.progress(log) == runs.Progress(3, 4)


def test_progress_of_other_logs():
    assert runs.progress("reading python\nencoding: 38/758 documents\n") == runs.Progress(38, 758)
    assert runs.progress("") == runs.Progress()
    assert runs.progress("> building train, validation, and test datasets ...\n") == runs.Progress()


def test_numbers_keep_nan_and_drop_text():
    found = runs.numbers("iteration 3/ 9 | lm loss: NAN | note: none | x (ms): 1.5E+00 |")
    assert found["x (ms)"] == 1.5 and found["lm loss"] != found["lm loss"]
    assert set(found) == {"x (ms)", "lm loss"}


def test_evaluated_reads_the_test_split():
    assert runs.evaluated(REPORT) == {"lm loss": 5.606605, "kl to teacher": 0.5}


def test_evaluated_without_a_report():
    with pytest.raises(HostError, match="found none"):
        runs.evaluated(STEPS)


def test_the_last_lines_end_before_the_launchers():
    launcher = "E1122 02:03:35.930000 15869 torch/distributed/elastic/x.py:1002] failed (exitcode: 2) local_rank: 1"
    log = "first\n[rank 1] abkd-megatron distill: error: no teacher\n" + launcher + "\nTraceback\n" * 40
    assert runs.last_lines(log) == "first\n[rank 1] abkd-megatron distill: error: no teacher"


@pytest.mark.parametrize(
    ("log", "doing"),
    [
        ("", ""),
        ("saving checkpoint at iteration 10 to x\n", "saving"),
        ("saving checkpoint at iteration 10 to x\n  successfully saved checkpoint from iteration 10\n", ""),
        ("Evaluating on 64 samples\nEvaluating iter 1/2\nEvaluating iter 2/2\nEvaluating iter 1/2\n", "evaluating 3/4"),
        ("Evaluating iter 1/2\nsaving checkpoint at iteration 10 to x\n", "saving"),
        ("saving checkpoint at iteration 10 to x\nEvaluating iter 1/2\n", "evaluating 1/4"),
    ],
)
def test_progress_between_steps(log, doing):
    found = runs.progress(STEPS + log)
    assert (found.done, found.total, found.doing) == (10, 30, doing)


def test_the_time_left_follows_the_pace(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    pace = runs.Pace()
    assert pace.left(0, 0) is None  # nothing is known
    assert pace.left(2, 1000) is None  # the first look
    now[0] += 10
    assert pace.left(11, 1000) is None  # less than a hundredth since
    assert pace.left(12, 1000) == pytest.approx(988)
    assert pace.elapsed == 10
    assert (runs.clock(pace.left(12, 1000)), runs.clock(3725)) == ("16:28", "1:02:05")
