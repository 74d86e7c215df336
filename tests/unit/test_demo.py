"""The demo around its launches: what it reads in Megatron's log, what it refuses, what it concludes."""

import importlib.util
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("tensorboard")

PATH = Path(__file__).parents[2] / "examples" / "demo.py"
SPEC = importlib.util.spec_from_file_location("demo", PATH)
demo = importlib.util.module_from_spec(SPEC)
sys.modules["demo"] = demo
SPEC.loader.exec_module(demo)

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
    " validation loss at iteration 30 on validation set | lm loss value: 5.7E+00 | lm loss PPL: 2.9E+02 | \n"
    " validation loss at iteration 30 on test set | lm loss value: 5.606605E+00 | lm loss PPL: 2.7E+02 | "
    "kl to teacher value: 5.000000E-01 | kl to teacher PPL: 1.648721E+00 | \n"
)


def test_progress_is_the_last_whole_step_with_its_losses():
    losses = {"lm loss": 6.363683, "kd loss": 2.5, "kl to teacher": 3.766551, "top-1 agreement": 0.0921875}
    assert demo.progress(STEPS) == demo.Progress(10, 30, losses)
    assert demo.progress(STEPS[:-40]) == demo.Progress(1, 30, {"lm loss": 7.637462})


def test_progress_of_an_evaluation_counts_both_splits():
    log = "Evaluating on 64 samples\nEvaluating iter 1/2\nEvaluating iter 2/2\nEvaluating iter 1/2\n"
    assert demo.progress(log) == demo.Progress(3, 4)


def test_progress_of_other_logs():
    assert demo.progress("reading python\nencoding: 38/758 documents\n") == demo.Progress(38, 758)
    assert demo.progress("") == demo.Progress()
    assert demo.progress("> building train, validation, and test datasets ...\n") == demo.Progress()


def test_numbers_keep_nan_and_drop_text():
    found = demo.numbers("iteration 3/ 9 | lm loss: NAN | note: none | x (ms): 1.5E+00 |")
    assert found["x (ms)"] == 1.5 and found["lm loss"] != found["lm loss"]
    assert set(found) == {"x (ms)", "lm loss"}


def test_evaluated_reads_the_test_split():
    assert demo.evaluated(REPORT) == {"lm loss": 5.606605, "kl to teacher": 0.5}


def test_evaluated_without_a_report():
    with pytest.raises(demo.DemoError, match="found none"):
        demo.evaluated(STEPS)


@pytest.mark.parametrize("name", ["teacher", "teacher.log", "report.json"])
def test_refuses_a_directory_with_results(tmp_path, capsys, monkeypatch, name):
    monkeypatch.setattr(demo, "run_stage", lambda *_: pytest.fail("started a stage"))
    monkeypatch.setattr(demo.signal, "signal", lambda *_: None)
    (tmp_path / name).write_text("precious")
    assert demo.main(["--out", str(tmp_path)]) == 1
    message = capsys.readouterr().err
    assert name in message and "another --out" in message
    assert (tmp_path / name).read_text() == "precious"


def test_refuses_a_file(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(demo.DemoError, match="is a file"):
        demo.check_output(tmp_path / "out")


def test_takes_nothing_an_empty_directory_and_prepared_data(tmp_path):
    demo.check_output(tmp_path / "absent")
    demo.check_output(tmp_path)
    (tmp_path / "data").mkdir()
    demo.check_output(tmp_path)


def test_a_failing_stage_shows_its_last_lines(tmp_path, monkeypatch):
    code = "print('\\n'.join(f'line {i}' for i in range(40))); raise SystemExit(3)"
    monkeypatch.setattr(demo.Stage, "command", lambda self: ["-c", code])
    with pytest.raises(demo.DemoError) as failure:
        demo.run_stage(demo.Stage("teacher", "pretrain", "x.yaml", 2, {}), tmp_path, 2)
    lines = str(failure.value).splitlines()
    assert lines[:30] == [f"line {i}" for i in range(10, 40)]
    assert "teacher" in lines[-1] and "3" in lines[-1] and str(tmp_path / "teacher.log") in lines[-1]


def test_the_last_lines_end_before_the_launchers():
    launcher = "E1122 02:03:35.930000 15869 torch/distributed/elastic/x.py:1002] failed (exitcode: 2) local_rank: 1"
    log = "first\n[rank 1] abkd-megatron distill: error: no teacher\n" + launcher + "\nTraceback\n" * 40
    assert demo.last_lines(log) == "first\n[rank 1] abkd-megatron distill: error: no teacher"


def test_an_interrupt_ends_the_child(tmp_path, monkeypatch):
    def interrupt(log):
        raise KeyboardInterrupt

    ended = []
    end = demo.end
    monkeypatch.setattr(demo, "end", lambda child: (end(child), ended.append(child.poll())))
    monkeypatch.setattr(demo, "progress", interrupt)
    monkeypatch.setattr(demo.Stage, "command", lambda self: ["-c", "import time; time.sleep(60)"])
    with pytest.raises(KeyboardInterrupt):
        demo.run_stage(demo.Stage("teacher", "pretrain", "x.yaml", 2, {}), tmp_path, 2)
    assert ended == [-15]


def test_only_the_students_differ_in_their_teacher(tmp_path):
    _, _, distilled, alone = demo.training_stages(tmp_path, fast=False)
    assert (distilled.config, distilled.processes) == (alone.config, alone.processes)
    differ = {k for k in distilled.settings if distilled.settings[k] != alone.settings.get(k)}
    assert differ == {"teacher.load", "megatron.save", "megatron.tensorboard-dir"}
    first, second = demo.evaluation_stages(tmp_path, fast=False, test_tokens=88246)
    assert {k for k in first.settings if first.settings[k] != second.settings[k]} == {"megatron.load"}
    assert "megatron.save=null" in first.command()


def test_verdict_follows_the_numbers():
    alone = {"kl to teacher": 0.58, "cross entropy": 4.4}
    distilled = {"kl to teacher": 0.31, "cross entropy": 4.5}
    text = demo.verdict(alone, distilled)
    assert "0.310 against 0.580 (closer)" in text and "4.500 against 4.400 (worse)" in text
    text = demo.verdict(distilled, alone)
    assert "(farther)" in text and "(better)" in text
    assert demo.verdict(alone, alone).count("the same") == 2
