"""SIGTERM saves and ends a job whose first checkpoint is written, also when the rank's children get the signal."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from launch import ROOT


def test_a_signal_to_the_whole_group_saves(config: Path, tmp_path: Path) -> None:
    settings = [
        *("megatron.train-iters=100000", "megatron.save-interval=5", "megatron.exit-signal-handler=true"),
        f"megatron.save={tmp_path / 'run'}",
    ]
    log = tmp_path / "log"
    with log.open("w") as sink:
        job = subprocess.Popen(
            [sys.executable, "-m", "abkd_megatron", "pretrain", str(config), *settings],
            stdout=sink,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        try:
            deadline = time.monotonic() + 200
            while "successfully saved checkpoint" not in log.read_text():
                assert job.poll() is None and time.monotonic() < deadline, log.read_text()[-4000:]
                time.sleep(0.1)
            os.killpg(job.pid, signal.SIGTERM)
            assert job.wait(timeout=120) == 0, log.read_text()[-6000:]
        finally:
            if job.poll() is None:
                os.killpg(job.pid, signal.SIGKILL)
    text = log.read_text()
    trained = [int(number) for number in re.findall(r"iteration +(\d+)/", text)]
    saved = int((tmp_path / "run/latest_checkpointed_iteration.txt").read_text())
    assert saved == trained[-1], "the last step that was trained"
    assert "exiting program after receiving SIGTERM" in text
