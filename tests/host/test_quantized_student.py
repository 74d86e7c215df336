"""Quantization-aware distillation: a student that NVIDIA's ModelOpt has quantized learns from the model before.

Skipped where ModelOpt is not installed; docs/training.md says how it is.
"""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from launch import found_per_ranks

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("modelopt") is None,
        reason="ModelOpt is not installed; docs/training.md says how it is",
    ),
    pytest.mark.parametrize("num_ranks", [1, 2]),
]
Found = Callable[[int], dict[str, Any]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return found_per_ranks(Path(__file__).with_name("quantized.py"), tmp_path_factory.mktemp("quantized"))


def test_loss_and_gradients_are_the_dense_ones(found: Found, num_ranks: int) -> None:
    errors = found(num_ranks)["errors"]
    assert len(errors) == 8 + 1 and errors.keys() >= {f"{num_ranks} stages"}
    assert all(worst < 2e-5 for worst in errors.values()), errors


def test_ranks_quantize_as_one(found: Found, num_ranks: int) -> None:
    losses = found(num_ranks)["losses"]
    assert losses == pytest.approx(found(1)["losses"], rel=1e-5)
    assert len({round(loss, 2) for loss in losses.values()}) == 3, "of two formats, and of one with the output layer"


def test_the_fused_head_leaves_no_quantizer_out(found: Found, num_ranks: int) -> None:
    refused = found(num_ranks)["refused"]
    assert refused["before"].startswith(
        "head: fused is not possible (student: the output layer is quantized by ModelOpt (input_quantizer, "
        "weight_quantizer)); give head"
    )
    assert "got weight_quantizer of ModelOpt" in refused["after"]


def test_a_frozen_base_is_kept_once(found: Found, num_ranks: int) -> None:
    shared = found(num_ranks)["shared"]
    assert 0.9 < shared["part"] < 1, "all but the norms, which train"
    assert shared["error"] < 2e-5


def test_the_student_comes_nearer_and_resumes(found: Found, num_ranks: int) -> None:
    kl = found(num_ranks)["kl"]
    assert kl["steps"][-1] < 0.7 * kl["steps"][0], kl
    assert kl["resumed"] == kl["gone on"], "to the bit"
    assert "weight_quantizer._amax; give the checkpoint of the model before" in kl["as a teacher"]
    assert "expected a student without quantizers of ModelOpt" in kl["as a student"]
    assert "got mode quantize; give" in kl["as a student"]
