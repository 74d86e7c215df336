"""What the command line refuses before it looks at a configuration."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from abkd_megatron import cpu
from abkd_megatron.errors import HostError


def test_the_stand_in_refuses_to_start_beside_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(HostError, match=r"this machine has a GPU.*device: cuda"):
        cpu.install()
    assert not torch.cuda.is_initialized()


def test_an_unrelated_apex_is_refused(tmp_path: Path) -> None:
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex/__init__.py").write_text("")
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).resolve().parents[2])])
    ended = subprocess.run(
        [sys.executable, "-m", "abkd_megatron", "show-config"],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 2
    assert "pip uninstall apex" in ended.stderr
    assert "Traceback" not in ended.stderr
