"""HybridModel through whole jobs: the shipped configuration, resume, and checkpoints of any layout."""

from pathlib import Path

import pytest
import torch
from launch import ROOT, launch, run_job, scalars
from matrix import MAMBA, MAMBA_AND_DELTA, of_teacher, overrides
from stand_ins import program_for

from abkd_megatron.teacher.checkpoint import tensor_shapes

JOB = ("-m", "abkd_megatron")
STILL = {"lr": 0.0, "weight-decay": 0.0, "train-iters": 1, "save-interval": 1}


def test_the_shipped_configuration_trains(workspace: Path, config: Path) -> None:
    """With a teacher of its sizes that is trained for a moment."""
    places = {"data.dir": workspace / "hybrid-data"}
    small = {"megatron.train-iters": 2, "megatron.lr-warmup-iters": 1, "megatron.eval-iters": 1}
    of_teacher_file, file = (ROOT / f"configs/tiny_cpu_{name}.yaml" for name in ("teacher", "hybrid"))
    run_job("prepare", of_teacher_file, places)
    teacher = workspace / "teacher-of-hybrid"
    saved = {"megatron.save": teacher, "megatron.tensorboard-dir": teacher, "megatron.save-interval": 2}
    run_job("pretrain", of_teacher_file, {**places, **small, **saved}, num_ranks=2)
    student = workspace / "shipped-hybrid"
    given = {"megatron.save": student, "megatron.tensorboard-dir": student, "teacher.load": teacher}
    run_job("distill", file, {**places, **small, **given}, num_ranks=4)
    found = scalars(student)
    assert found["kd loss"][0] > 0 and len(found["kd loss"]) == len(found["kd loss validation"])
    # Only the student is saved.
    (iteration,) = student.glob("iter_*")
    names = tensor_shapes(iteration)
    assert "decoder.final_norm.weight" in names
    assert {name.split(".")[2] for name in names if name.startswith("decoder.layers.")} == {"0", "1", "2", "3"}


@pytest.fixture(scope="module")
def mamba_teacher(workspace: Path, config: Path) -> Path:
    folder = workspace / "mamba-teacher"
    sizes = {"hidden-size": 48, "ffn-hidden-size": 96, "seed": 7, "train-iters": 4, "save-interval": 4}
    settings = {**MAMBA_AND_DELTA, **sizes, "save": folder}
    run_job("pretrain", config, overrides(settings), program=[*program_for(settings), *JOB])
    return folder


def distilled(config: Path, folder: Path, num_ranks: int = 1, **settings: object) -> dict[str, list[float]]:
    given = {**MAMBA, **of_teacher(MAMBA_AND_DELTA), "tensorboard-dir": folder, "train-iters": 2}
    given |= {name.replace("_", "-"): value for name, value in settings.items()}
    run_job("distill", config, overrides(given), num_ranks=num_ranks, program=[*program_for(given), *JOB])
    return scalars(folder)


def test_a_checkpoint_of_any_layout_is_the_same_teacher(workspace: Path, config: Path, mamba_teacher: Path) -> None:
    """Loaded and saved in another layout, its pipes elsewhere, the teacher gives the same losses to the bit."""
    wanted = distilled(config, workspace / "of-one-rank", **{"teacher.load": mamba_teacher})
    sizes = {"hidden-size": 48, "ffn-hidden-size": 96}
    for name, layout in {
        "pipes": {"pipeline-model-parallel-size": 2, "hybrid-layer-pattern": "M|-*|-G-|*-"},
        "tensor": {"tensor-model-parallel-size": 2, "sequence-parallel": "true"},
    }.items():
        folder = workspace / f"mamba-teacher-{name}"
        given = {**MAMBA_AND_DELTA, **sizes, **STILL, **layout, "load": mamba_teacher, "finetune": "true"}
        given |= {"no-load-optim": "true", "save": folder}
        run_job("pretrain", config, overrides(given), num_ranks=2, program=[*program_for(given), *JOB])
        got = distilled(config, workspace / f"of-{name}", **{"teacher.load": folder})
        for loss in ("teacher lm loss", "kd loss", "lm loss"):
            assert got[loss] == wanted[loss], (name, loss)


def test_a_student_is_resumed(workspace: Path, config: Path, mamba_teacher: Path) -> None:
    """With a distributed optimizer over two pipeline stages and Mamba: losses equal to the bit."""
    folder = workspace / "resumed-hybrid"
    settings = {
        "teacher.load": mamba_teacher,
        "pipeline_model_parallel_size": 2,
        "hybrid_layer_pattern": "M|-*-",
        "use_distributed_optimizer": "true",
        "save": folder,
        "save_interval": 2,
        "train_iters": 4,
    }
    straight = distilled(config, folder / "straight", 2, **settings)
    resumed = distilled(config, folder / "resumed", 2, load=folder, ckpt_step=2, **settings)
    assert resumed["total loss"] == straight["total loss"][2:]
    assert resumed["lm loss"] == straight["lm loss"][2:]


def test_a_hybrid_checkpoint_of_a_gpt_model_is_rejected(workspace: Path, config: Path, mamba_teacher: Path) -> None:
    settings = {"teacher.load": mamba_teacher, "teacher.num-layers": 8}
    words = [f"{name}={value}" for name, value in settings.items()]
    (rank,) = launch([*JOB, "distill", "--config", config, *words], 1)
    assert rank.code == 2 and "teacher.hybrid-layer-pattern" in rank.output, rank.output[-3000:]
    words = [f"megatron.load={mamba_teacher}", "megatron.num-layers=8", "megatron.hidden-size=48"]
    (rank,) = launch([*JOB, "pretrain", "--config", config, *words], 1)
    assert rank.code == 2 and "megatron.hybrid-layer-pattern" in rank.output, rank.output[-3000:]


def test_the_stand_in_is_mamba_2() -> None:
    """The scan over all pairs of positions equals the recurrence over states."""
    import sys

    sys.path.insert(0, str(ROOT / "tests/stand_ins/mamba_ssm/ops/triton"))
    from ssd_combined import mamba_chunk_scan_combined

    generator = torch.Generator().manual_seed(1)
    batch, length, heads, size, groups, states = 2, 7, 4, 3, 2, 5
    x, dt = (torch.randn(batch, length, *shape, generator=generator) for shape in ((heads, size), (heads,)))
    B, C = (torch.randn(batch, length, groups, states, generator=generator) for _ in range(2))
    A, D = -torch.rand(heads, generator=generator), torch.randn(heads, generator=generator)
    got = mamba_chunk_scan_combined(x, dt, A, B, C, 4, D=D, dt_softplus=True)
    steps, state, wanted = torch.nn.functional.softplus(dt), torch.zeros(batch, heads, size, states), []
    for now in range(length):
        b, c = (it[:, now].repeat_interleave(heads // groups, dim=1) for it in (B, C))
        step = steps[:, now, :, None, None]
        state = state * (step * A[:, None, None]).exp() + step * x[:, now, ..., None] * b[:, :, None]
        wanted.append((state * c[:, :, None]).sum(-1) + D[:, None] * x[:, now])
    torch.testing.assert_close(got, torch.stack(wanted, 1), rtol=1e-4, atol=1e-5)
