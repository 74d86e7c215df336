"""What a teacher must not change: plain training, the student's checkpoint, its optimizer, the teacher itself."""

import json
from pathlib import Path
from typing import Any

import pytest
from launch import launch, run_job, scalars

from abkd_megatron.config.load import load_config, to_argv
from abkd_megatron.data.prepare import PreparedData

STOCK = Path(__file__).with_name("stock.py")


def stock_arguments(config: Path, **overrides: object) -> list[str]:
    """The command line of stock.py for what `config` says."""
    from abkd_megatron import cpu_backend
    from abkd_megatron.config.megatron_args import megatron_options

    options = megatron_options()
    settings = [f"megatron.{key.replace('_', '-')}={value}" for key, value in overrides.items()]
    loaded = load_config(config, settings, options, lambda _: cpu_backend.MEGATRON_DEFAULTS)
    assert loaded.data.dir is not None
    return to_argv({**PreparedData.open(loaded.data.dir).megatron_arguments(), **loaded.megatron}, options)


def run_stock(config: Path, *first: object, num_ranks: int = 1, **overrides: object) -> list[dict[str, Any]]:
    ranks = launch([STOCK, *first, *stock_arguments(config, **overrides)], num_ranks)
    for rank in ranks:
        assert rank.code == 0, rank.output[-6000:]
    lines = [line for rank in ranks for line in rank.output.splitlines() if line.startswith("FACTS ")]
    return [json.loads(line.removeprefix("FACTS ")) for line in lines]


def saved_tensors(checkpoint: Path) -> dict[str, tuple[int, ...]]:
    from abkd_megatron.teacher.checkpoint import tensor_shapes

    return tensor_shapes(checkpoint / "iter_0000005")


def test_watching_equals_plain_training_bit_for_bit(
    workspace: Path, config: Path, teacher: Path, student: Path
) -> None:
    start = {"load": student, "finetune": "true", "use-distributed-optimizer": "true", "save-interval": 5}
    start["hidden-dropout"] = 0.1  # drawn from a random state that a teacher leaves as it was
    runs = {}
    for name, job, overrides in (
        ("plain", "pretrain", {}),
        ("watched", "distill", {"teacher.load": teacher, "distillation.kd_weight": 0}),
        (
            "watched on some tokens",
            "distill",
            {
                "teacher.load": teacher,
                "distillation.kd_weight": 0,
                "distillation.tokens": "{select: every, n: 3}",
                "distillation.gradient_in_place": "true",
            },
        ),
        ("distilled", "distill", {"teacher.load": teacher, "megatron.log-timers-to-tensorboard": "false"}),
    ):
        path = workspace / f"neutral-{name}"
        settings = {f"megatron.{key}": value for key, value in start.items()}
        settings |= {"megatron.save": path, "megatron.tensorboard-dir": path / "tensorboard", **overrides}
        run_job(job, config, settings)
        runs[name] = scalars(path / "tensorboard")
    stock = workspace / "neutral-stock"
    run_stock(config, **start, save=stock, tensorboard_dir=stock / "tensorboard")
    runs["stock"] = scalars(stock / "tensorboard")

    for name in ("lm loss", "grad-norm", "lm loss validation"):
        assert runs["plain"][name] == runs["stock"][name], name
        assert runs["watched"][name] == runs["watched on some tokens"][name] == runs["stock"][name], name
        assert runs["distilled"][name][-1] != runs["stock"][name][-1], name
    assert all(value > 0 for value in runs["watched"]["kd loss"]), "watching still reports the divergence"
    of_all, of_some = (runs[name]["kd loss"][0] for name in ("watched", "watched on some tokens"))
    assert 0.2 * of_all < of_some < 0.5 * of_all

    # What a job adds to TensorBoard: the time of a step, unless it is told otherwise, and the teacher's in training.
    timed = {name for name, run in runs.items() if "iteration-time" in run}
    assert timed == {"plain", "watched", "watched on some tokens"}
    assert {name for name, run in runs.items() if "teacher seconds" in run} == runs.keys() - {"plain", "stock"}
    assert not any("teacher seconds validation" in run for run in runs.values())

    # Weights and optimizer state: the same keys in the same shapes.
    plain = saved_tensors(workspace / "neutral-plain")
    assert saved_tensors(workspace / "neutral-distilled") == plain
    assert any(key.startswith("optimizer") for key in plain)


HYBRID = {
    "hybrid_layer_pattern": "*-*-",
    "num_layers": "null",
    "spec": "[abkd_megatron.local_hybrid_spec, local_hybrid_stack_spec]",
}


@pytest.mark.parametrize(("pipeline", "model"), [(1, {}), (2, {}), (1, HYBRID)], ids=["1", "2", "1, HybridModel"])
def test_attaching_leaves_nothing_behind(config: Path, teacher: Path, pipeline: int, model: dict[str, str]) -> None:
    layout = {"pipeline_model_parallel_size": pipeline, "use_distributed_optimizer": "true", **model}
    facts = run_stock(config, "--kd-teacher", teacher, num_ranks=pipeline, **layout)
    assert len(facts) == pipeline
    for stage, found in enumerate(facts):
        assert found["teacher unchanged"]
        assert not found["teacher has gradients"]
        assert not found["teacher in training mode"]
        assert found["optimizers"] >= 1
        assert found["teacher parameters optimized"] == 0 < found["student parameters optimized"]
        assert found["teacher parameters in DDP"] == 0 < found["student parameters in DDP"]
        assert found["modules and state as before"] == [True, True, True]
        # One runs the teacher; on the last stage one gives the head, and one after the forward sees that it has run.
        assert found["hooks while attached"] == ([2, 1] if stage + 1 == pipeline else [1, 0])
        assert found["as before once detached"]
        assert found["messages in flight"] == 0
        assert found["loss changes with the teacher"]
        unset, *losses = found["losses by progress"]
        if pipeline == 1:
            assert "call attachment.on_step() before each step" in unset
            assert losses[0] < losses[2] and losses[1] == pytest.approx((losses[0] + losses[2]) / 2)
        padding, schedule_plan, twice, sizes = found["refusals"]
        assert "pad the vocabulary alike: 512 columns per rank against 1024" in padding
        assert "teacher: combined 1F1B" in schedule_plan and "remove overlap-moe-expert-parallel-comm" in schedule_plan
        assert "attached already" in twice
        assert "does not fit" in sizes and "configured" in sizes
        assert ("missing" if model else "saved") in sizes  # the GPTModel's tensors have other names or other sizes


@pytest.mark.parametrize("optimizer", ["plain", "distributed"])
def test_a_resumed_run_repeats_the_straight_one(workspace: Path, config: Path, teacher: Path, optimizer: str) -> None:
    straight, resumed = workspace / f"straight-{optimizer}", workspace / f"resumed-{optimizer}"
    settings = {
        "teacher.load": teacher,
        "megatron.train-iters": 6,
        "megatron.save-interval": 3,
        **({"megatron.use-distributed-optimizer": "true"} if optimizer == "distributed" else {}),
    }
    run_job(
        "distill",
        config,
        {**settings, "megatron.save": straight, "megatron.tensorboard-dir": straight / "tensorboard"},
        num_ranks=2,
    )
    run_job(
        "distill",
        config,
        {
            **settings,
            "megatron.load": straight,
            "megatron.ckpt-step": 3,
            "megatron.tensorboard-dir": resumed / "tensorboard",
        },
        num_ranks=2,
    )
    whole, half = scalars(straight / "tensorboard"), scalars(resumed / "tensorboard")
    for name in ("lm loss", "kd loss", "total loss", "grad-norm"):
        assert len(whole[name]) == 6
        assert half[name] == whole[name][3:], name
