"""The stand-in for a GPU answers what torch asks too, in its versions that setup.py allows."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

CODE = """\
import torch
from abkd_megatron import cpu_backend
cpu_backend.install()
# Up to torch 2.11 an optimizer asks the first, later ones the second.
assert torch.cuda.is_current_stream_capturing() is False
assert torch.accelerator.current_stream().is_capturing() is False
weight = torch.ones(2, requires_grad=True)
weight.sum().backward()
torch.optim.AdamW([weight]).step()
assert (weight < 1).all()
"""

# As in a checkout of Megatron's sources, where the helper has to be compiled.
CHECKOUT = """\
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name.endswith("helpers_cpp") else found(name, *more)
import megatron.core.datasets.utils as utils
from abkd_megatron import cpu_backend
compiles = utils.compile_helpers
cpu_backend.install()
assert utils.compile_helpers is compiles
"""


@pytest.mark.parametrize("code", [CODE, CHECKOUT], ids=["an optimizer steps", "a checkout compiles its helper"])
def test_it_runs(code: str) -> None:
    pytest.importorskip("megatron.training")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
