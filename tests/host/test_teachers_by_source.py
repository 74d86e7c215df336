"""Teachers by dataset of a blend, in the command line's own job: one run, its layouts, its record and its errors.

The second teacher is live, or a cache of its predictions: losses and gradient norms are the same.
"""

import json
import sys
from pathlib import Path

import pytest
from launch import Rank, launch, run_job, scalars
from matrix import check_refused, run_refused

from abkd_megatron.cache.store import CacheReader

TRAINED = ("lm loss", "kd loss", "total loss", "teacher lm loss", "grad-norm", "total loss validation")
LAYOUTS = {
    "DP 2, teachers of TP 2": {
        "teacher.tensor-model-parallel-size": 2,
        "distillation.head": "fused",
        "distillation.chunk_tokens": 24,
    },
    "PP 2, teachers of PP 1": {
        "megatron.pipeline-model-parallel-size": 2,
        "megatron.timing-log-level": 2,
        "teacher.pipeline-model-parallel-size": 1,
    },
}
# {name: (ranks, settings)} of a job whose second teacher is cached.
WITH_CACHE = {
    "one rank": (1, {}),
    "TP 2 with SP": (
        2,
        {
            "megatron.tensor-model-parallel-size": 2,
            "megatron.sequence-parallel": "true",
            "distillation.head": "fused",
            "distillation.chunk_tokens": 24,
        },
    ),
    "PP 2": (2, {"megatron.pipeline-model-parallel-size": 2}),
    "DP 2": (2, {"distillation.on_miss": "lm"}),
}
SMALL = "num-layers: 2, hidden-size: 32, ffn-hidden-size: 64"


@pytest.fixture(scope="module")
def settings(workspace: Path, config: Path, teacher: Path, student: Path) -> dict[str, object]:
    """A blend of two datasets, whose second has the untrained student as its teacher."""
    data = workspace / "data"
    return {
        "data.dir": "null",
        "megatron.tokenizer-type": "SentencePieceTokenizer",
        "megatron.tokenizer-model": data / "tokenizer.model",
        "megatron.data-cache-path": workspace / "cache",
        "megatron.train-data-path": f"[0.6, {data / 'train'}, 0.4, {data / 'valid'}]",
        "megatron.valid-data-path": f"[0.6, {data / 'train'}, 0.4, {data / 'valid'}]",
        "megatron.test-data-path": f"[{data / 'test'}]",
        "megatron.train-iters": 3,
        "megatron.load": student,
        "megatron.finetune": "true",
        "teacher.load": teacher,
        "teachers": f"[{{sources: [0], load: {teacher}}}, {{sources: [{data / 'valid'}], load: {student}, {SMALL}}}]",
    }


@pytest.fixture(scope="module")
def records(workspace: Path, config: Path, settings: dict[str, object], student: Path) -> Path:
    """A cache of what the second teacher predicts for the second dataset, whole and exact."""
    found = workspace / "teachers" / "records"
    of_teacher = dict(pair.split(": ") for pair in SMALL.split(", "))
    given = {f"teacher.{name}": value for name, value in of_teacher.items()}
    given |= {"teacher.load": student, "teachers": "null", "cache.dir": found, "cache.sources": "[1]"}
    given |= {"cache.top_k": 400, "cache.precision": "fp32"}
    run_job("cache", config, {**settings, **given})
    return found


@pytest.fixture(scope="module")
def cached(workspace: Path, teacher: Path, records: Path) -> dict[str, object]:
    """The second teacher's cache in its place."""
    path = workspace / "data" / "valid"
    return {"teachers": f"[{{sources: [0], load: {teacher}}}, {{sources: [{path}], cache: {records}}}]"}


@pytest.fixture(scope="module")
def train(workspace: Path, config: Path, settings: dict[str, object]):
    def train(name: str, num_ranks: int = 1, **others: object) -> tuple[dict[str, list[float]], list[Rank]]:
        tensorboard = workspace / "teachers" / name / "tensorboard"
        ranks = run_job(
            "distill", config, {**settings, "megatron.tensorboard-dir": tensorboard, **others}, num_ranks=num_ranks
        )
        return scalars(tensorboard), ranks

    return train


@pytest.fixture(scope="module")
def saved(workspace: Path) -> Path:
    return workspace / "teachers" / "saved"


@pytest.fixture(scope="module")
def on_one_rank(train, saved: Path):
    return train("one rank", **{"megatron.save": saved, "megatron.save-interval": 3})


def test_equal_checkpoints_are_held_once(on_one_rank) -> None:
    (rank,) = on_one_rank[1]
    assert rank.output.count("teacher of source 0: the same as the teacher, held once") == 1
    assert "held once" not in rank.output.replace("teacher of source 0: the same as the teacher, held once", "")


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_equal_one_rank(train, on_one_rank, name: str) -> None:
    found, _ = train(name, 2, **LAYOUTS[name])
    for key in TRAINED:
        assert len(on_one_rank[0][key]) >= 2
        assert found[key] == pytest.approx(on_one_rank[0][key], rel=1e-4), key


@pytest.mark.parametrize("name", WITH_CACHE)
def test_a_cached_teacher_trains_as_the_live_one(
    train, on_one_rank, cached: dict[str, object], records: Path, name: str
) -> None:
    num_ranks, others = WITH_CACHE[name]
    found, ranks = train(f"cached, {name}", num_ranks, **cached, **others)
    for key in TRAINED:
        assert found[key] == pytest.approx(on_one_rank[0][key], rel=1e-5), key
    # Each divergence is a mean over its own tokens; their mean by the share of tokens is that over all.
    shares, live = found["cached share"], on_one_rank[0]["kl to teacher"]
    of_both = zip(shares, found["kl to teacher"], found["bucketed kl to teacher"], strict=True)
    assert all(0 < share < 1 for share in shares)
    assert [(1 - share) * of_live + share * of_records for share, of_live, of_records in of_both] == pytest.approx(
        live, rel=1e-5
    )
    assert ("selected tokens" in found) == ("distillation.on_miss" in others)
    assert any(f"of {CacheReader(records).identity.teacher_path}: 400 log-probabilities" in it.output for it in ranks)


def test_the_cache_has_the_samples_of_its_source_only(records: Path) -> None:
    # Of 3 batches of 8 samples to train on, and as many for two validations.
    assert 0 < len(CacheReader(records)) < 24


def test_check_counts_the_samples_of_the_cached_source(
    config: Path, settings: dict[str, object], cached: dict[str, object]
) -> None:
    words = [f"{key}={value}" for key, value in {**settings, **cached}.items()]
    (rank,) = launch(["-m", "abkd_megatron", "check", config, *words], 1)
    assert rank.code == 0, rank.output[-3000:]
    assert "valid: of " in rank.output and "samples, 100.0%" in rank.output


def test_estimate_with_a_cache(config: Path, settings: dict[str, object], cached: dict[str, object]) -> None:
    words = [f"{key}={value}" for key, value in {**settings, **cached}.items()]
    (rank,) = launch(["-m", "abkd_megatron", "estimate", config, *words], 1)
    assert rank.code == 0 and "teacher's parameters" in rank.output, rank.output[-3000:]


@pytest.mark.parametrize("with_cache", [False, True])
def test_losses_are_compared(
    workspace: Path, config: Path, settings: dict[str, object], cached: dict[str, object], with_cache: bool
) -> None:
    out = workspace / "teachers" / f"compare-{with_cache}"
    given = {
        **settings,
        **(cached if with_cache else {}),
        "compare.out": out,
        "compare.losses": "{forward: {alpha: 1, beta: 0}}",
        "compare.seeds": "[1234]",  # in whose order the cache was written
        "megatron.save-interval": 3,
        "teacher.weights": "int8" if with_cache else "device",
        "compare.launch": f"{sys.executable} {Path(__file__).with_name('quick.py')}",
    }
    words = [f"{key}={value}" for key, value in given.items()]
    (rank,) = launch(["-m", "abkd_megatron", "compare", config, *words], 1)
    assert rank.code == 0, rank.output[-3000:]
    results = json.loads((out / "results.json").read_text())
    (run,) = results["runs"]
    assert results["summary"]["teacher"]["cross entropy"]["mean"] > 0
    if with_cache:  # rounded before the next teacher is looked at
        log = next(out.glob("*/*/run.log")).read_text()
        assert 0 < log.index("the teacher: teacher's layers:") < log.index("teacher of source 0: the same as the")
    assert ("bucketed kl to teacher" in run["test"]) == with_cache != ("calibration error" in run["test"])


# {name: (settings in place of others, what the message says)}; TEACHER, STUDENT and DATA are paths.
REFUSED = {
    "resumed with swapped teachers": (
        {"megatron.load": "SAVED", "megatron.finetune": "false", "teachers": "[{sources: [0], load: STUDENT, SMALL}]"},
        r"another teacher or loss than it was trained with:\n"
        r"  teacher of source 0: \S*teacher/iter_0000008 .* in the checkpoint, \S*student/iter_0000001 .* in this run\n"
        r"  teacher of source 1: \S*student/iter_0000001 .* in the checkpoint, \S*teacher/iter_0000008 .* in this run",
    ),
    "no blend": (
        {"megatron.train-data-path": "[DATA/train]"},
        r"teachers: expected a blend of several datasets for training, got 1.*or remove teachers",
    ),
    "no such dataset": ({"teachers": "[{sources: [2], load: TEACHER}]"}, r"teachers: expected a source from 0 to 1"),
    "no such path": ({"teachers": "[{sources: [DATA/tran], load: TEACHER}]"}, r"teachers: unknown path of a dataset"),
    "one dataset of two teachers": (
        {"teachers": "[{sources: [1], load: TEACHER}, {sources: [DATA/valid], load: STUDENT, SMALL}]"},
        r"got teacher of source 1 and teacher of source \S*valid for the dataset at position 1",
    ),
    "no checkpoint": (
        {"teachers": "[{sources: [1], load: DATA/nothing}]"},
        r"teacher of source 1: .*DATA/nothing".replace("DATA", r"\S*data"),
    ),
    "another model": (
        {"teachers": "[{sources: [1], load: STUDENT}]"},
        r"teacher of source 1: .*in its entry of the list `teachers` what differs.*num-layers",
    ),
    "resumed with a cache in place of a teacher": (
        {"megatron.load": "SAVED", "megatron.finetune": "false", "teachers": "[{sources: [1], cache: RECORDS}]"},
        r"teacher of source 1: .* in the checkpoint, .*, from a cache of top 400, fp32\) in this run",
    ),
    "a cache of another temperature": (
        {"distillation.temperature": 2, "teachers": "[{sources: [1], cache: RECORDS}]"},
        r"teacher of source 1: .*temperature: 1.0 in the cache, 2.0 in this job",
    ),
    "a loss on logits with a cache": (
        {"distillation.divergence": "akl", "teachers": "[{sources: [1], cache: RECORDS}]"},
        r"expected a loss that a teacher cache has records for, got the losses akl",
    ),
    "no such cache": (
        {"teachers": "[{sources: [1], cache: DATA/nothing}]"},
        r"teacher of source 1: expected a teacher cache in .*data/nothing",
    ),
    "samples that are not in the cache": (
        {"teachers": "[{sources: [0, 1], cache: RECORDS}]"},
        r"expected the teacher's records of sample \d+ in the cache, found none",
    ),
    "another dtype": (
        {"teachers": "[{sources: [1], load: TEACHER, bf16: true}]"},
        r"teacher of source 1: expected one dtype of all teachers, got torch.bfloat16 and torch.float32",
    ),
}


@pytest.fixture(scope="module")
def ended(
    workspace: Path,
    config: Path,
    settings: dict[str, object],
    teacher: Path,
    student: Path,
    records: Path,
    saved: Path,
    on_one_rank,
) -> list[dict]:
    paths = {"TEACHER": teacher, "STUDENT": student, "DATA": workspace / "data", "SAVED": saved}
    paths |= {"SMALL": SMALL, "RECORDS": records}
    cases = {}
    for name, (others, _) in REFUSED.items():
        words = [f"{key}={value}" for key, value in {**settings, **others}.items()]
        for short, path in paths.items():
            words = [word.replace(short, str(path)) for word in words]
        cases[name] = ["distill", "--config", str(config), *words]
    folder = workspace / "teachers" / "refused"
    folder.mkdir()
    return run_refused(cases, 2, folder)


@pytest.mark.parametrize("name", REFUSED)
def test_refused(ended: list[dict], name: str) -> None:
    check_refused(ended, name, "distill", REFUSED[name][1])
