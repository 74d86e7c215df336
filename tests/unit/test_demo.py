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
    alone = {"kl to teacher": 0.58, "cross entropy": 4.4, "seconds per step": 0.2}
    distilled = {"kl to teacher": 0.31, "cross entropy": 4.5, "seconds per step": 0.5}
    text = demo.verdict(alone, distilled)
    assert "0.310 against 0.580 (closer)" in text and "4.500 against 4.400 (0.100 worse)" in text
    assert "0.50 against 0.20" in text
    text = demo.verdict(distilled, alone)
    assert "(farther)" in text and "(0.100 better)" in text
    assert demo.verdict(alone, alone).count("the same") == 2
