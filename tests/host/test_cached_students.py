"""The job `cache` writes the same records in every layout, once per sample, and any layout trains from them.

With all columns in fp32 a student trains as with the live teacher.
"""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from launch import launch, run_job, scalars

from abkd_megatron.cache.store import CacheReader
from abkd_megatron.vocab_parallel.teacher_records import TeacherRecords

TENSOR, PIPELINE = "tensor-model-parallel-size", "pipeline-model-parallel-size"
# {name: (ranks, teacher's layout)}.
LAYOUTS = {
    "one": (1, {}),
    "tensor": (2, {TENSOR: 2}),
    "pipeline": (2, {PIPELINE: 2}),
    "data": (2, {}),
}
EXACT = {"cache.top_k": 400, "cache.precision": "fp32"}
SAMPLES = 5 * 8 + 2 * 8


def settings(teacher: Path, directory: Path, layout: dict[str, int]) -> dict[str, object]:
    return {
        "teacher.load": teacher,
        "cache.dir": directory,
        **EXACT,
        **{f"teacher.{name}": value for name, value in layout.items()},
    }


@pytest.fixture(scope="module")
def caches(workspace: Path, config: Path, teacher: Path) -> dict[str, Path]:
    found = {name: workspace / f"cache-{name}" for name in LAYOUTS}
    for name, (ranks, layout) in LAYOUTS.items():
        run_job("cache", config, settings(teacher, found[name], layout), num_ranks=ranks)
    return found


def records(reader: CacheReader, key: bytes) -> TeacherRecords:
    packed = reader.read(key)
    assert packed is not None
    return reader.identity.layout.unpack(torch.from_numpy(packed))


def keys_of(directory: Path) -> set[bytes]:
    from safetensors.numpy import load_file

    return {row.tobytes() for path in directory.glob("*.safetensors") for row in load_file(path)["keys"]}


def dense(found: TeacherRecords) -> torch.Tensor:
    """[s, V] log-probabilities in the order of ids."""
    return torch.empty_like(found.log_probs).scatter_(-1, found.ids.long(), found.log_probs)


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "one"])
def test_every_layout_writes_the_same_records(caches: dict[str, Path], name: str) -> None:
    keys = keys_of(caches["one"])
    assert keys_of(caches[name]) == keys
    assert len(keys) == SAMPLES
    one, other = (CacheReader(caches[it]) for it in ("one", name))
    assert len(other) == SAMPLES
    for key in keys:
        a, b = records(one, key), records(other, key)
        torch.testing.assert_close(dense(b), dense(a), rtol=1e-5, atol=2e-5)
        torch.testing.assert_close(dense(a).logsumexp(-1), torch.zeros(32), rtol=0.0, atol=1e-5)
        for field in ("entropy", "label_log_prob"):
            torch.testing.assert_close(getattr(b, field), getattr(a, field), rtol=1e-5, atol=2e-5)


@pytest.fixture(scope="module")
def drawn(workspace: Path, config: Path, teacher: Path) -> dict[str, Path]:
    """Caches of 16 log-probabilities and 8 draws."""
    found = {name: workspace / f"cache-drawn-{name}" for name in ("one", "tensor", "pipeline")}
    for name, directory in found.items():
        ranks, layout = LAYOUTS[name]
        form = {"cache.top_k": 16, "cache.draws": 8}
        run_job("cache", config, {**settings(teacher, directory, layout), **form}, num_ranks=ranks)
    return found


@pytest.mark.parametrize("name", ["tensor", "pipeline"])
def test_every_layout_draws_the_same_tokens(drawn: dict[str, Path], name: str) -> None:
    one, other = (CacheReader(drawn[it]) for it in ("one", name))
    assert one.identity.draws == 8
    same, number = 0, 0
    for key in keys_of(drawn["one"]):
        a, b = records(one, key), records(other, key)
        assert a.draws is not None and b.draws is not None
        assert bool((a.draws.sum(-1) == 8).all())
        assert not (a.ids[:, :16, None] == a.ids[:, None, 16:]).any()
        # A logit that another layout rounds differently may move a token's border in the tail past a draw.
        equal = (a.ids[:, 16:] == b.ids[:, 16:]) & (a.draws == b.draws)
        same, number = same + int(equal.all(-1).sum()), number + len(a.ids)
        both = (a.ids == b.ids) & (a.ids >= 0)
        torch.testing.assert_close(a.log_probs[both], b.log_probs[both], rtol=1e-5, atol=2e-5)
    assert number == SAMPLES * 32 and same >= 0.99 * number


def test_a_second_job_writes_what_is_missing(caches: dict[str, Path], config: Path, teacher: Path) -> None:
    directory = caches["data"]
    before = {path: path.stat().st_mtime_ns for path in directory.iterdir()}
    more = {**settings(teacher, directory, {}), "megatron.train-iters": 6, "megatron.global-batch-size": 4}
    run_job("cache", config, more)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    lost = next(directory.glob("*.safetensors"))
    number = sum(1 for line in next(directory.glob(f"{lost.name.rpartition('-')[0]}.jsonl")).open())
    assert number == 1
    (directory / f"{lost.name.rpartition('-')[0]}.jsonl").unlink()
    lost.unlink()
    keys = keys_of(caches["one"])
    assert not keys <= keys_of(directory)
    run_job("cache", config, {**settings(teacher, directory, {TENSOR: 2}), "megatron.micro-batch-size": 1}, num_ranks=2)
    assert keys <= keys_of(directory)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"cache.top_k": 8}, "top_k: 400 in the cache, 8 in this job"),
        ({"distillation.temperature": 2}, "temperature: 1.0 in the cache, 2.0 in this job"),
        ({"megatron.context-parallel-size": 2}, "context-parallel-size"),
        ({"cache.top_k": 500}, "cache.top_k: expected 1 to the vocabulary's 400 tokens, got 500"),
    ],
)
def test_a_cache_of_something_else_is_rejected(
    caches: dict[str, Path], config: Path, teacher: Path, change: dict, message: str
) -> None:
    given = {**settings(teacher, caches["one"], {}), **change}
    words = [f"{key}={value}" for key, value in given.items()]
    for rank in launch(["-m", "abkd_megatron", "cache", config, *words], 2):
        assert rank.code == 2 and message in rank.output, rank.output[-3000:]


# ---- students


# {name: (ranks, the student's settings, the layout that wrote its cache)}.
STUDENTS = {
    "one": (1, {}, "tensor"),
    "fused": (1, {"distillation.head": "fused", "distillation.chunk_tokens": 16}, "one"),
    "tensor": (2, {f"megatron.{TENSOR}": 2, "megatron.sequence-parallel": True}, "pipeline"),
    "pipeline": (2, {f"megatron.{PIPELINE}": 2, "megatron.micro-batch-size": 1}, "data"),
    "data": (2, {"distillation.head": "fused", "distillation.chunk_tokens": 16}, "one"),
}
LOGGED = ("lm loss", "kd loss", "total loss", "grad-norm", "teacher lm loss", "teacher entropy", "top-1 agreement")


def train(workspace: Path, config: Path, student: Path, name: str, ranks: int, given: dict) -> dict[str, list[float]]:
    folder = workspace / f"events-{name}"
    common = {
        "megatron.load": student,
        "megatron.finetune": True,
        "megatron.tensorboard-dir": folder,
        "distillation.divergence": "alpha_beta",
        "distillation.alpha": 0.5,
        "distillation.beta": 0.5,
    }
    run_job("distill", config, {**common, **given}, num_ranks=ranks)
    return scalars(folder)


@pytest.fixture(scope="module")
def live(workspace: Path, config: Path, teacher: Path, student: Path) -> dict[str, list[float]]:
    return train(workspace, config, student, "live", 1, {"teacher.load": teacher})


def of_cache(directory: Path) -> dict[str, object]:
    """A student's settings, without the section `teacher` of the configuration's file."""
    return {"distillation.cache": directory}


@pytest.fixture(scope="module")
def alone(config: Path, workspace: Path) -> Path:
    """The configuration without a teacher."""
    path = workspace / "without-teacher.yaml"
    text = config.read_text()
    before, _, after = text.partition("teacher:\n")
    path.write_text(before + after[after.index("distillation:") :])
    return path


@pytest.mark.parametrize("name", STUDENTS)
def test_a_student_trains_as_with_the_live_teacher(
    caches: dict[str, Path],
    live: dict[str, list[float]],
    workspace: Path,
    alone: Path,
    student: Path,
    name: str,
) -> None:
    ranks, given, written = STUDENTS[name]
    found = train(workspace, alone, student, f"cached-{name}", ranks, {**given, **of_cache(caches[written])})
    assert_equal(found, live)


def assert_equal(found: dict[str, list[float]], live: dict[str, list[float]]) -> None:
    for key in (*LOGGED, *(f"{it} validation" for it in LOGGED if it != "grad-norm")):
        assert len(found[key]) == len(live[key]) > 0, key
        torch.testing.assert_close(
            torch.tensor(found[key]),
            torch.tensor(live[key]),
            rtol=1e-5,
            atol=1e-5,
            msg=lambda text, key=key: f"{key}: {text}",
        )


def test_students_train_from_draws(drawn: dict[str, Path], workspace: Path, alone: Path, student: Path) -> None:
    common = {**of_cache(drawn["one"]), "distillation.alpha": 0.8, "distillation.beta": 0.3}
    one = train(workspace, alone, student, "drawn-one", 1, common)
    assert len(one["sampled kl to teacher"]) == 5 and "bucketed kl to teacher" not in one
    layout = {f"megatron.{TENSOR}": 2, "distillation.head": "fused", "distillation.chunk_tokens": 16}
    found = train(workspace, alone, student, "drawn-tensor", 2, {**common, **layout})
    assert_equal(found, one)


def test_virtual_stages(caches: dict[str, Path], workspace: Path, config: Path, alone: Path, teacher: Path) -> None:
    layers = {"megatron.num-layers": 4}
    start = workspace / "student-of-4"
    saved = {"megatron.train-iters": 1, "megatron.save": start, "megatron.save-interval": 1}
    run_job("pretrain", alone, {**layers, **saved})
    # At this rate five steps do not multiply what rounding differs by: the gradient's norm rises to 11 at 1e-2.
    stages = {
        **layers,
        "megatron.lr": 1e-3,
        f"megatron.{PIPELINE}": 2,
        "megatron.num-layers-per-virtual-pipeline-stage": 1,
    }
    live = train(workspace, config, start, "live-4", 2, {**stages, "teacher.load": teacher})
    assert_equal(train(workspace, alone, start, "virtual", 2, {**stages, **of_cache(caches["one"])}), live)


@pytest.mark.parametrize(
    "tokens", ["{select: every, n: 4}", "{select: teacher_entropy, quantile: [0.3, 1.0]}"], ids=["every", "quantile"]
)
def test_selected_tokens(
    caches: dict[str, Path],
    workspace: Path,
    config: Path,
    alone: Path,
    teacher: Path,
    student: Path,
    request: pytest.FixtureRequest,
    tokens: str,
) -> None:
    name, chosen = request.node.callspec.id, {"distillation.tokens": tokens}
    live = train(workspace, config, student, f"live-{name}", 1, {**chosen, "teacher.load": teacher})
    given = {**chosen, **of_cache(caches["one"]), "distillation.head": "fused", "distillation.chunk_tokens": 16}
    found = train(workspace, alone, student, f"cached-{name}", 2, given)
    assert_equal(found, live)
    assert found["selected tokens"] == live["selected tokens"]
    assert 0 < found["selected tokens"][0] < 1


@pytest.fixture(scope="module")
def part(workspace: Path, config: Path, teacher: Path) -> Path:
    """A cache of the first of five batches."""
    found = workspace / "cache-part"
    few = {**settings(teacher, found, {}), "cache.top_k": 8, "cache.precision": "fp16", "megatron.train-iters": 1}
    run_job("cache", config, few)
    return found


def test_a_sample_that_is_missing(part: Path, workspace: Path, alone: Path, student: Path) -> None:
    """Rejected before a step, or trained on the cross entropy."""
    words = [f"{key}={value}" for key, value in of_cache(part).items()]
    for rank in launch(["-m", "abkd_megatron", "distill", alone, *words], 2):
        assert rank.code == 2 and "on_miss=lm" in rank.output, rank.output[-3000:]
        assert "iteration        1/" not in rank.output
    lenient = {**of_cache(part), "distillation.on_miss": "lm"}
    found = train(workspace, alone, student, "missing", 2, lenient)
    assert found["cached share"] == [1.0, 0.0, 0.0, 0.0, 0.0]
    assert found["selected tokens"] == found["cached share"]
    assert found["kd loss"][0] > 0 and found["kd loss"][1:] == [0.0] * 4
    assert all(0 < a <= b + 1 for a, b in zip(found["lm loss"], found["total loss"], strict=True))
    assert found["total loss"][1:] == found["lm loss"][1:]
    fused = {**lenient, "distillation.head": "fused", "distillation.chunk_tokens": 16}
    again = train(workspace, alone, student, "missing, fused", 1, fused)
    for key, values in found.items():
        if key in (*LOGGED, "cached share", "selected tokens"):
            torch.testing.assert_close(
                torch.tensor(again[key]),
                torch.tensor(values),
                rtol=1e-5,
                atol=1e-5,
                msg=lambda text, key=key: f"{key}: {text}",
            )


@pytest.mark.parametrize(
    "given, message",
    [
        ({"distillation.temperature": 2}, "temperature: 1.0 in the cache, 2.0 in this job"),
        ({"megatron.seq-length": 16}, "seq_length: 32 in the cache, 16 in this job"),
        ({"distillation.divergence": "clipped_kl"}, "clipped_kl"),
        ({"teacher.num-layers": 4}, "teacher.num-layers"),
        ({"distillation.cache": "/nowhere"}, "manifest.json"),
    ],
)
def test_a_job_that_the_cache_does_not_fit(
    caches: dict[str, Path], alone: Path, given: dict[str, object], message: str
) -> None:
    words = [f"{key}={value}" for key, value in {**of_cache(caches["one"]), **given}.items()]
    (rank,) = launch(["-m", "abkd_megatron", "distill", alone, *words], 1)
    assert rank.code == 2 and message in rank.output, rank.output[-3000:]


@pytest.mark.parametrize(
    "given, name",
    [
        ({"distillation.divergence": "todi"}, "ToDi"),
        (
            {"distillation.beta": "{schedule: linear, from: 0.2, to: 0.7, end: 5}", "distillation.alpha": 0.8},
            "beta=0.7",
        ),
    ],
)
def test_a_divergence_that_draws_do_not_suit(drawn: dict[str, Path], alone: Path, given: dict, name: str) -> None:
    chosen = {"distillation.divergence": "alpha_beta", **of_cache(drawn["one"]), **given}
    words = [f"{key}={value}" for key, value in chosen.items()]
    (rank,) = launch(["-m", "abkd_megatron", "distill", alone, *words], 1)
    assert rank.code == 2 and name in rank.output and "iteration        1/" not in rank.output, rank.output[-3000:]


def test_check_of_a_student_with_a_cache(caches: dict[str, Path], alone: Path) -> None:
    words = [f"{key}={value}" for key, value in of_cache(caches["one"]).items()]
    (rank,) = launch(["-m", "abkd_megatron", "check", alone, *words], 1)
    assert rank.code == 0 and f"of {SAMPLES} samples" in rank.output, rank.output[-3000:]
    (rank,) = launch(["-m", "abkd_megatron", "check", alone, *words, "distillation.temperature=2"], 1)
    assert rank.code == 2 and "temperature: 1.0" in rank.output, rank.output[-3000:]


def test_check_counts_the_samples_that_are_there(caches: dict[str, Path], part: Path, alone: Path) -> None:
    def checked(directory: Path, *words: str) -> tuple[int, str]:
        (rank,) = launch(["-m", "abkd_megatron", "check", alone, f"distillation.cache={directory}", *words], 1)
        return rank.code, rank.output

    code, said = checked(caches["one"])
    assert code == 0 and "train: 40 of 40 samples, 100.0%" in said, said[-3000:]
    assert "validation: 8 of 8 samples" in said and "test: 8 of 8 samples" in said
    code, said = checked(part)
    assert code == 2 and "train: 8 of 40 samples, 20.0%; the first that is missing is sample 8" in said, said[-3000:]
    code, said = checked(part, "distillation.on_miss=lm")
    assert code == 0 and "train: 8 of 40" in said, said[-3000:]


def test_estimate_of_a_student_with_a_cache(part: Path, alone: Path) -> None:
    drawn = ["distillation.cache=/nowhere", "cache.top_k=8", "cache.draws=4", "distillation.alpha=0.8"]
    drawn += ["distillation.beta=0.3"]
    for words in (
        [f"distillation.cache={part}"],
        [*drawn, "distillation.head=fused", "distillation.on_miss=lm"],
        [f"distillation.cache={part}", f"megatron.{PIPELINE}=2", "--world-size", "2"],
    ):
        (rank,) = launch(["-m", "abkd_megatron", "estimate", alone, *words], 1)
        assert rank.code == 0 and "K 8" in rank.output, rank.output[-3000:]
        assert ("K 8, 4 draws" in rank.output) == (words[0] == drawn[0])
        assert "LM heads and loss" in rank.output and "teacher's parameters" not in rank.output


def test_losses_are_compared_with_a_cache(drawn: dict[str, Path], workspace: Path, alone: Path) -> None:
    out = workspace / "compare-cached"
    given = {
        **of_cache(drawn["one"]),
        "distillation.alpha": 0.8,  # of the run that only watches
        "distillation.beta": 0.3,
        "compare.out": out,
        "compare.losses": "{CE only: {kd_weight: 0, lm_weight: 1}, forward: {alpha: 1, beta: 0}}",
        "compare.seeds": "[1234]",  # Megatron's default, in whose order the cache was written
        "distillation.on_miss": "lm",
        "megatron.save-interval": 5,
        "megatron.eval-interval": 5,
        "compare.at_once": 2,
        "compare.launch": f"{sys.executable} {Path(__file__).with_name('quick.py')}",
    }
    words = [f"{key}={value}" for key, value in given.items()]
    (rank,) = launch(["-m", "abkd_megatron", "compare", alone, *words], 1)
    assert rank.code == 0, rank.output[-3000:]
    results = json.loads((out / "results.json").read_text())
    assert [run["loss"] for run in results["runs"]] == ["CE only", "forward"]
    for run in results["runs"]:
        assert run["test"]["cached share"] == 1.0, "another order of the data"
        assert run["test"]["sampled kl to teacher"] > 0
        assert "kl to teacher" not in run["test"] and "calibration error" not in run["test"]
    assert "sampled KL(teacher, student)" in (out / "table.md").read_text()
    assert (out / "comparison.png").stat().st_size > 10_000


def test_a_damaged_cache_ends_the_ranks_that_do_not_read_it(
    caches: dict[str, Path], config: Path, teacher: Path, tmp_path: Path
) -> None:
    # Only the first tensor-parallel rank reads; the other must not wait for it in an exchange.
    damaged = tmp_path / "cache"
    shutil.copytree(caches["tensor"], damaged)
    shard = next(damaged.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    overrides = {**settings(teacher, damaged, {TENSOR: 2}), "megatron.distributed-timeout-minutes": 1}
    words = [f"{key}={value}" for key, value in overrides.items()]
    ranks = launch(["-m", "abkd_megatron", "cache", "--config", config, *words], 2)
    assert [rank.code for rank in ranks] == [2, 2]
    assert all(shard.name in rank.output and "TypeError" not in rank.output for rank in ranks)
