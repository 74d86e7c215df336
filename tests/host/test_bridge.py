"""Megatron Bridge's own training loop with a teacher, on CPU ranks; skipped where Bridge is not installed.

That a release of Bridge's still has all that is called is in `tests/unit/test_bridge_contracts.py`, for which it need
not be installed.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from launch import ROOT, launch

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("megatron.bridge") is None,
    reason="Megatron Bridge is not installed; docs/bridge.md says how it is for these tests",
)

JOB = Path(__file__).with_name("bridge_job.py")


def run(case: str, folder: Path, *overrides: str, num_ranks: int = 1) -> dict[str, Any]:
    ranks = launch([JOB, case, folder, *overrides], num_ranks)
    for number, rank in enumerate(ranks):
        assert rank.code == 0, f"rank {number} of {case} ended with {rank.code}:\n{rank.output[-6000:]}"
    return facts_in(ranks[-1].output)


def facts_in(output: str) -> dict[str, Any]:
    facts = [line.removeprefix("FACTS ") for line in output.splitlines() if line.startswith("FACTS ")]
    return json.loads(facts[-1]) if facts else {}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds a tiny student and a tiny teacher of Hugging Face."""
    folder = tmp_path_factory.mktemp("bridge")
    run("models", folder)
    return folder


@pytest.fixture(scope="module")
def distilled(folder: Path) -> dict[str, Any]:
    return run("hf", folder)


def test_the_first_step_is_that_of_the_definition(distilled: dict[str, Any]) -> None:
    first, twin = distilled["steps"][0], distilled["twin"]
    for name, value in twin.items():
        assert first[name] == pytest.approx(value, rel=2e-6), name
    assert first["total loss"] == pytest.approx(twin["lm loss"] + twin["kd loss"], rel=2e-6)
    assert first["kd loss"] > 0.1, "a teacher of its own"
    assert len(distilled["steps"]) == 3
    assert distilled["steps"][2]["lm loss"] != first["lm loss"]
    for name in ("kd loss", "kl to teacher", "top-1 agreement", "teacher lm loss"):
        assert name in distilled["validation"]
    assert not [key for key in distilled["keys"] if "teacher" in key]


@pytest.mark.parametrize(
    "models",
    [("hybrid-student", "hybrid-teacher"), ("hybrid-student", "teacher"), ("student", "hybrid-teacher")],
    ids=" of ".join,
)
def test_hybrid_models(folder: Path, models: tuple[str, str]) -> None:
    """Of Nemotron's family, and mixed with Llama's: the first step is that of Hugging Face's models."""
    found = run("hybrid", folder, *models)
    for name, value in found["twin"].items():
        assert found["steps"][0][name] == pytest.approx(value, rel=1e-5), name
    assert found["steps"][0]["kd loss"] > 0.1 and len(found["steps"]) == 3
    if models[0] != "student":
        stages = run("hybrid", folder, *models, "model.pipeline_model_parallel_size=2", num_ranks=2)
        for mine, theirs in zip(stages["steps"], found["steps"], strict=True):
            for name in ("lm loss", "kd loss", "total loss", "grad norm"):
                assert mine[name] == pytest.approx(theirs[name], rel=1e-4), name


def test_watching_changes_nothing(folder: Path) -> None:
    plain, watched = run("plain", folder), run("watched", folder, "distillation.kd_weight=0")
    for mine, theirs in zip(watched["steps"], plain["steps"], strict=True):
        assert {name: mine[name] for name in theirs} == theirs, "bit for bit"
        assert mine["kd loss"] > 0
    assert watched["keys"] == plain["keys"]


@pytest.mark.parametrize("setting", ["tensor_model_parallel_size", "pipeline_model_parallel_size"])
def test_two_ranks_are_as_one(folder: Path, distilled: dict[str, Any], setting: str) -> None:
    found = run("hf", folder, f"model.{setting}=2", num_ranks=2)
    for mine, theirs in zip(found["steps"], distilled["steps"], strict=True):
        assert mine.pop("teacher seconds") > 0  # another time's
        assert mine == pytest.approx({name: theirs[name] for name in theirs if name != "teacher seconds"}, rel=1e-4)
    assert found["validation"] == pytest.approx(distilled["validation"], rel=1e-4)


def test_a_teacher_in_8_bits_is_measured_in_the_first_step(folder: Path, distilled: dict[str, Any]) -> None:
    (rank,) = launch([JOB, "watched", folder, "teacher.weights=int8"], 1)
    assert rank.code == 0, rank.output[-6000:]
    measured = re.search(r"teacher\.weights int8: KL (\S+) nats per token .* in \S+% of 42 tokens", rank.output)
    assert measured is not None and 0 < float(measured[1]) < 0.01, rank.output[-3000:]
    (first, *_), (plain, *_) = facts_in(rank.output)["steps"], distilled["steps"]
    assert first["lm loss"] == plain["lm loss"]
    assert 0 < abs(first["teacher lm loss"] / plain["teacher lm loss"] - 1) < 0.01


@pytest.mark.parametrize("setting", [None, "tensor_model_parallel_size", "pipeline_model_parallel_size"])
def test_a_cache_of_all_columns_is_the_live_teacher(
    folder: Path, distilled: dict[str, Any], setting: str | None
) -> None:
    given = [f"model.{setting}=2"] if setting else []
    found = run("cached", folder, *given, num_ranks=1 + len(given))
    names = ("lm loss", "kd loss", "total loss", "grad norm", "teacher lm loss", "teacher entropy", "top-1 agreement")
    for mine, theirs in zip(found["steps"], distilled["steps"], strict=True):
        for name in names:
            assert mine[name] == pytest.approx(theirs[name], rel=1e-4), name
    for name in ("lm loss", "kd loss", "teacher lm loss"):
        assert found["validation"][name] == pytest.approx(distilled["validation"][name], rel=1e-4), name


@pytest.mark.parametrize(
    "setting, message",
    [
        ("distillation.temperature=1", "temperature: 2.0 in the cache, 1.0 in this job"),
        ("dataset.random_seed=7", "found none; run `abkd-megatron cache`"),
        ("distillation.divergence=akl", "akl"),
    ],
)
def test_a_cache_that_does_not_fit(folder: Path, distilled: dict[str, Any], setting: str, message: str) -> None:
    (rank,) = launch([JOB, "cached", folder, setting], 1)
    assert rank.code != 0 and message in rank.output, rank.output[-3000:]


def test_the_student_comes_back_to_hugging_face(folder: Path, distilled: dict[str, Any]) -> None:
    found = run("export", folder)
    assert found["from the student"] < 1e-4
    assert found["learned"] > 0.1, "not the model that it began as"


@pytest.mark.parametrize("pattern", [(), ("*-*-",)], ids=["GPTModel", "HybridModel"])
def test_a_builders_student_learns_from_bridges_checkpoint(
    folder: Path, distilled: dict[str, Any], pattern: tuple[str, ...]
) -> None:
    found = run("builder", folder, *pattern)
    for mine, theirs in zip(found["steps"], distilled["steps"], strict=True):
        for name in ("teacher lm loss", "teacher entropy"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-6), "the teacher that was of Hugging Face before"
        assert mine["lm loss"] != theirs["lm loss"]
    assert found["steps"][2]["kd loss"] != found["steps"][0]["kd loss"]


def test_a_teacher_of_megatron_lms_loop(folder: Path, teacher: Path) -> None:
    found = run("megatron_lm", folder, f"teacher.load={teacher}")
    assert len(found["steps"]) == 3
    assert all(step["kd loss"] > 0 for step in found["steps"])


def test_the_base_of_adapters_teaches_without_a_second_copy(folder: Path) -> None:
    """Adapters begin at 0. Then: as a copy of the teacher, resumed, and on two ranks."""
    whole = run("adapter", folder, "whole", "train.train_iters=4")
    assert whole["own"] == [] and all(".adapter." in name for name in whole["trained"])
    assert whole["steps"][0]["kl to teacher"] == 0 < whole["steps"][3]["kl to teacher"]
    copied = run("adapter", folder, "copied", "train.train_iters=4")
    assert copied["own"]
    run("adapter", folder, "resumed", "train.train_iters=2")
    resumed = run("adapter", folder, "resumed", "train.train_iters=4")
    assert resumed["own"] == [] and len(resumed["steps"]) == 2
    for steps in (copied["steps"][2:], resumed["steps"]):
        for mine, theirs in zip(steps, whole["steps"][2:], strict=True):
            for name in set(theirs) - {"teacher seconds"}:
                assert mine[name] == theirs[name], name
    for setting in ("tensor", "pipeline"):
        of_two = run(
            *("adapter", folder, setting, "train.train_iters=4", f"model.{setting}_model_parallel_size=2"), num_ranks=2
        )
        assert of_two["own"] == []
        assert of_two["steps"][0]["kl to teacher"] == pytest.approx(0, abs=1e-9)
        assert of_two["steps"][0]["lm loss"] == pytest.approx(whole["steps"][0]["lm loss"], rel=1e-5)
        assert of_two["steps"][3]["kl to teacher"] > 0


def test_a_quantized_student_learns_from_the_model_before(folder: Path, distilled: dict[str, Any]) -> None:
    found = run("quantized", folder)
    assert found["quantizers"] == 2 * 4 * 2, "weights and inputs of four matrices per layer"
    assert found["steps"][0]["kl to teacher"] == pytest.approx(found["kl"], rel=1e-4)
    assert found["kl"] > 1e-6 and len(found["steps"]) == 3


def test_settings_travel_through_bridges_own_yaml(folder: Path) -> None:
    refused = {
        "distillation.temperature=0": "ConfigError: distillation.temperature: ",
        "distillation.divergence=nope": "ConfigError: distillation.divergence: unknown divergence 'nope'",
        "distillation.beta=abc": "ConfigError: distillation.beta: expected a finite number, got 'abc'",
        "teacher.load=here": "got both; set one",
        "teacher.hf=null": "got neither; set one",
        "distillation.cache=/somewhere": "got a teacher and a cache; set one",
        "dist.use_megatron_fsdp=true": "ConfigError: student: Megatron FSDP is not supported",
        "distillation.sources=[{source: 0, kd_weight: 0.5}]": "use `abkd-megatron distill`",
        "distillation.hidden_losses=[{student_layer: 1, teacher_layer: 2, loss: mse}]": "use `abkd-megatron distill`",
    }
    found = run("settings", folder, *refused)
    refused |= {
        "vocabulary": "CheckpointError: the teacher has a vocabulary of 256 tokens, the student one of 400",
        "shared vocabulary": "shared_vocab is 300; the teacher has a vocabulary of 256 tokens",
        "export": "HostError: expected a process without torch.distributed",
        "no hook": "HostError: ",
        "no such override": "ConfigError: teacher.overrides: a GPTModelProvider has no depth",
        "no such function": "ConfigError: teacher.overrides.transformer_layer_spec: expected the dotted path",
    }
    for text in ("  temperature: 2\n", "    schedule: linear\n", f"  hf: {folder}/teacher\n"):
        assert text in found["text"]
    assert found["equal"] == [True, True]
    for setting, message in refused.items():
        assert message in found["refused"].get(setting, "nothing"), setting


def test_the_documents_examples_run(folder: Path) -> None:
    # In a process that nobody forked: where the Hub's cache is, is read from the environment at the first import.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(folder / "hub"), "PYTHONPATH": str(ROOT)}
    words = [sys.executable, JOB, "document", folder, ROOT / "docs" / "bridge.md"]
    ended = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=240)
    assert ended.returncode == 0, ended.stderr[-6000:]
    found = facts_in(ended.stdout)
    assert found["any recipe's teacher"] == "Qwen/Qwen3-4B"
    assert found["llama32_3b_to_1b"] == ["meta-llama/Llama-3.2-3B"] * 2 + [1]
    assert found["llama31_70b_to_8b"] == ["meta-llama/Llama-3.1-70B"] * 2 + [8]
    assert found["qwen3_8b_to_1p7b"] == ["Qwen/Qwen3-8B"] * 2 + [1]
    assert found["nemotron_nano_9b_to_4b"] == ["nvidia/NVIDIA-Nemotron-Nano-9B-v2"] * 2 + [1]
    assert found["temperature"] == 2
    assert "iter_0000003" in found["saved"]
