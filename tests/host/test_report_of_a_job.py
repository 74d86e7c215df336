"""The report of a real job: what Megatron and this package have put into TensorBoard is all that it takes."""

import json
import re
from html import unescape
from pathlib import Path

import pytest
from launch import run_job, scalars

from abkd_megatron.config.load import load_config
from abkd_megatron.config.megatron_args import megatron_options
from abkd_megatron.tools.events import find_runs
from abkd_megatron.tools.report import write_report


def test_the_report_of_a_job(tmp_path: Path, config: Path, teacher: Path) -> None:
    settings = {
        "teacher.load": teacher,
        "distillation.alpha": "{schedule: linear, from: 0.5, to: 0.3, end: 4}",
        "distillation.kd_weight": 0.7,
        "megatron.pipeline-model-parallel-size": 2,
        "megatron.eval-interval": 2,
        "megatron.train-iters": 4,
        "megatron.tensorboard-dir": tmp_path / "run" / "tensorboard",
    }
    run_job("distill", config, settings, num_ranks=2)
    written = scalars(tmp_path / "run" / "tensorboard")
    (run,) = find_runs([tmp_path])
    assert run.name == "run" and not run.notes
    for name in ("lm loss", "kd loss", "alpha", "teacher seconds", "grad-norm", "iteration-time"):
        # Megatron writes no time of the first step alone, but one of the first two.
        curve = run.splits["training"][name]
        assert list(curve) == [1, 2, 3, 4][name == "iteration-time" :], name
        assert list(curve.values()) == written[name], name
    # After steps 2 and 4; when training is done once more; and of the test split.
    first, second, _, tested = written["lm loss validation"]
    assert run.splits.keys() == {"training", "validation", "test"}
    assert run.splits["validation"]["lm loss"] == {2: first, 4: second}
    assert run.splits["test"]["lm loss"] == {4: tested}
    assert run.samples == 4 * 8

    page = unescape(write_report(tmp_path / "run").read_text())
    for row in ("distillation.kd_weight</th><td>0.7", "world_size</th><td>2", "pipeline_model_parallel_size</th><td>2"):
        assert row in page, row
    (charts,) = re.findall(r'<script type="application/json" id="charts">(.*?)</script>', page)
    (shares,) = [chart["data"][0]["y"] for chart in json.loads(charts) if chart["title"] == "teacher's share"]
    first, second, *later = written["teacher seconds"]
    wanted = [
        4 * seconds / step  # four micro-batches a step
        for seconds, step in zip([(first + second) / 2, *later], written["iteration-time"], strict=True)
    ]
    assert shares == pytest.approx(wanted, rel=1e-5)
    assert all(0 < share < 1 for share in shares)

    # What was run can be run again.
    assert run.config and run.config in page
    (tmp_path / "again.yaml").write_text(run.config)
    again = load_config(tmp_path / "again.yaml", [], megatron_options())
    assert again.distillation.kd_weight == 0.7 and again.teacher.load == str(teacher)
    assert again.teacher.megatron["num-layers"] == 4 and again.megatron["train-iters"] == 4
