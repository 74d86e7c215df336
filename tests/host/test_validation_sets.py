"""Validation: named sets of which every row is read once, before the first step, and the best checkpoint by it."""

import json
from pathlib import Path

import pytest
from launch import Rank, run_job, scalars

OF_SETS = ("lm loss", "kd loss", "teacher lm loss", "kl to teacher", "top-1 agreement")
BEST = "a kl to teacher"
# 22 rows in batches of 8: the last one is filled up.
ROWS = 11
LAYOUTS = {
    "TP 2": {"megatron.tensor-model-parallel-size": 2, "megatron.sequence-parallel": "true"},
    "PP 2": {
        "megatron.pipeline-model-parallel-size": 2,
        "megatron.eval-micro-batch-size": 1,
        "distillation.head": "fused",
        "distillation.chunk_tokens": 24,
    },
    "DP 2": {
        "megatron.use-distributed-optimizer": "true",
        "megatron.overlap-grad-reduce": "true",
        "megatron.overlap-param-gather": "true",
    },
}


@pytest.fixture(scope="module")
def run(workspace: Path, config: Path, teacher: Path, student: Path):
    data = workspace / "data"

    def run(
        name: str, given: dict[str, object], num_ranks: int = 1, job: str = "distill", file: Path = config
    ) -> tuple[Path, dict[str, list[float]], list[Rank]]:
        folder = workspace / "validation" / name
        settings = {
            "teacher.load": teacher,
            "megatron.load": student,
            "megatron.finetune": "true",
            "megatron.train-iters": 4,
            "megatron.eval-interval": 2,
            "megatron.save": folder,
            "megatron.save-interval": 3,
            "megatron.tensorboard-dir": folder / "tensorboard",
            "validation.sets": f"{{a: {data / 'valid'}, b: {data / 'test'}}}",
            "validation.rows": ROWS,
            "validation.at_start": "true",
            "validation.best": BEST,
            **given,
        }
        ranks = run_job(job, file, {key: of for key, of in settings.items() if of is not None}, num_ranks=num_ranks)
        return folder, scalars(folder / "tensorboard") if (folder / "tensorboard").exists() else {}, ranks

    return run


@pytest.fixture(scope="module")
def on_one_rank(run):
    return run("one rank", {})


def best_of(folder: Path) -> dict:
    return json.loads((folder / "best.json").read_text())


def kept(folder: Path) -> list[str]:
    return sorted(it.name for it in (folder / "best").glob("iter_*"))


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_equal_one_rank(run, on_one_rank, name: str) -> None:
    folder, found, _ = run(name, LAYOUTS[name], num_ranks=2)
    of_one_folder, of_one, _ = on_one_rank
    names = [name for name in of_one if name.endswith(" validation")]
    assert {f"{of} {number} validation" for of in "ab" for number in OF_SETS} <= set(names)
    for key in (*names, "lm loss", "kd loss", "grad-norm"):
        assert found[key] == pytest.approx(of_one[key], rel=1e-5, abs=1e-6), key
    assert best_of(folder)["value"] == pytest.approx(best_of(of_one_folder)["value"], rel=1e-5)
    assert kept(folder) == kept(of_one_folder) == ["iter_0000004"]


def test_the_mean_of_all_sets_is_that_of_their_tokens(on_one_rank) -> None:
    """All rows have the same number of counted tokens, and both sets the same number of rows."""
    _, found, _ = on_one_rank
    for name in OF_SETS:
        first, second, whole = (found[f"{of}{name} validation"] for of in ("a ", "b ", ""))
        # Before the first step, after steps 2 and 4, and after training.
        assert len(whole) == 4 and whole[2] == whole[3]
        assert whole == pytest.approx([(a + b) / 2 for a, b in zip(first, second, strict=True)], rel=1e-6), name
    # The frozen teacher has seen the same text each time.
    assert len(set(found["teacher lm loss validation"])) == 1


def test_training_is_what_it_is_without(run, on_one_rank, workspace: Path) -> None:
    without = {"validation.sets": "{}", "validation.at_start": "false", "validation.best": "null"}
    # One worker of the data loader, whose seed is drawn from the run's random numbers.
    _, plain, _ = run("without", {**without, "validation.rows": "null"})
    _, at_start, _ = run("at start", {**without, "validation.rows": "null", "validation.at_start": "true"})
    _, found, _ = on_one_rank
    trained = [name for name in plain if name in ("lm loss", "kd loss", "total loss", "grad-norm")]
    assert len(trained) == 4 and all(plain[name] == found[name] == at_start[name] for name in trained)
    # Megatron's own validations after it read what they read without it.
    for name in ("lm loss validation", "kl to teacher validation"):
        assert at_start[name][1:] == plain[name] and len(plain[name]) == 4  # with the test split


def test_the_best_checkpoint(run, on_one_rank, workspace: Path) -> None:
    folder, found, _ = on_one_rank
    best = best_of(folder)
    assert best["iteration"] == 4 and best["number"] == BEST and best["rows"] == ROWS
    assert best["value"] == pytest.approx(min(found[f"{BEST} validation"]), rel=1e-6)
    # It can be loaded, as a student and as a teacher, and is the one with that number.
    sizes = {"num-layers": 2, "hidden-size": 32, "ffn-hidden-size": 64, "load": folder / "best"}
    as_both = {"megatron.load": folder / "best", **{f"teacher.{name}": value for name, value in sizes.items()}}
    _, again, _ = run("from best", {**as_both, "megatron.train-iters": 1})
    for name in ("a lm loss", "a teacher lm loss", "b teacher lm loss"):
        before = found[f"{name.replace('teacher ', '')} validation"][-1]
        assert again[f"{name} validation"][0] == pytest.approx(before, rel=1e-5), name


def test_a_resumed_run_knows_the_best(run, on_one_rank, workspace: Path) -> None:
    resume = {"megatron.finetune": "false", "megatron.override-opt_param-scheduler": "true"}
    folder, before, _ = run("resumed", {"megatron.save-retain-interval": 300})
    longer = {**resume, "megatron.load": folder, "megatron.train-iters": 6}
    better = {**best_of(folder), "value": 1e-9}
    (folder / "best.json").write_text(json.dumps(better))
    _, after, _ = run("resumed", longer)
    assert best_of(folder) == better and kept(folder) == ["iter_0000004"]
    # No second validation at step 0: after step 6 and after training.
    assert len(after["lm loss validation"]) == len(before["lm loss validation"]) + 2
    (folder / "best.json").write_text(json.dumps({**better, "value": 1e9}))
    run("resumed", {**longer, "megatron.train-iters": 8})
    assert best_of(folder)["iteration"] == 8 and kept(folder) == ["iter_0000008"]


def test_interleaved_pipeline_without_a_teacher(run, teacher: Path) -> None:
    sizes = {"num-layers": 4, "hidden-size": 48, "ffn-hidden-size": 96, "load": teacher}
    settings = {f"megatron.{key}": value for key, value in sizes.items()} | {"validation.best": "b lm loss"}
    folder, of_one, _ = run("pretrain", settings, job="pretrain")
    stages = {"megatron.pipeline-model-parallel-size": 2, "megatron.num-layers-per-virtual-pipeline-stage": 1}
    other, found, _ = run("pretrain interleaved", {**settings, **stages}, num_ranks=2, job="pretrain")
    for key in ("lm loss validation", "a lm loss validation", "b lm loss validation", "lm loss"):
        assert found[key] == pytest.approx(of_one[key], rel=1e-5) and len(found[key]) == 4, key
    assert best_of(other)["value"] == pytest.approx(best_of(folder)["value"], rel=1e-5)


def test_a_cached_teacher(run, on_one_rank, workspace: Path, config: Path, teacher: Path) -> None:
    cache = workspace / "validation" / "cache"
    writes = {"cache.dir": cache, "cache.top_k": 16, "validation.best": None, "megatron.save": None}
    run("writing", {**writes, "megatron.load": None, "megatron.finetune": None}, job="cache")
    before, _, after = config.read_text().partition("teacher:\n")
    without_teacher = workspace / "validation" / "without-teacher.yaml"
    without_teacher.write_text(before + after[after.index("distillation:") :])
    reads = {"teacher.load": None, "distillation.cache": cache, "validation.best": "b bucketed kl to teacher"}
    folder, found, _ = run("cached", reads, file=without_teacher)
    _, live, _ = on_one_rank
    for name in ("lm loss", "a lm loss", "b lm loss", "teacher lm loss", "a teacher lm loss"):
        assert found[f"{name} validation"][0] == pytest.approx(live[f"{name} validation"][0], rel=1e-3), name
    assert best_of(folder)["value"] == pytest.approx(min(found["b bucketed kl to teacher validation"]), rel=1e-6)
