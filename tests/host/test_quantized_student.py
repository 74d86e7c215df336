"""Quantization-aware distillation: a student that NVIDIA's ModelOpt has quantized learns from the original.

Skipped where ModelOpt is not installed: docs/training.md says how it is.
"""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from launch import launch

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("modelopt") is None, reason="ModelOpt is not installed; docs/training.md says how it is"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quantized")


@pytest.fixture(scope="module", params=[1, 2], ids=["1 rank", "TP 2"])
def found(request: pytest.FixtureRequest, folder: Path) -> dict[str, Any]:
    first, *_ = ranks = launch([Path(__file__).with_name("quantized.py"), folder], request.param)
    for rank in ranks:
        assert rank.code == 0, rank.output[-6000:]
    (line,) = [line for line in first.output.splitlines() if line.startswith("FOUND ")]
    return json.loads(line.removeprefix("FOUND "))


def test_loss_and_gradients_are_the_dense_ones(found: dict[str, Any]) -> None:
    assert len(found["errors"]) == 8
    assert all(worst < 2e-5 for worst in found["errors"].values()), found["errors"]


def test_the_fused_head_leaves_no_quantizer_out(found: dict[str, Any]) -> None:
    quantizers = "input_quantizer, weight_quantizer"
    assert found["refused"]["before"].startswith(
        f"head: fused is not possible (student: the output layer is quantized by ModelOpt ({quantizers})); give head"
    )
    assert "got weight_quantizer of ModelOpt" in found["refused"]["after"]


def test_a_frozen_base_is_kept_once(found: dict[str, Any]) -> None:
    assert 0.9 < found["shared"]["part"] < 1, "all but the norms, which train"
    assert found["shared"]["error"] < 2e-5


def test_the_student_comes_nearer_and_resumes(found: dict[str, Any]) -> None:
    steps = found["kl"]["steps"]
    assert steps[-1] < 0.7 * steps[0], steps
    assert found["kl"]["resumed"] == found["kl"]["gone on"], "to the bit"
    assert "weight_quantizer._amax; give the checkpoint of the model before" in found["kl"]["as a teacher"]
    assert "expected a student without quantizers of ModelOpt" in found["kl"]["as a student"]
    assert "got mode quantize; give" in found["kl"]["as a student"]
