"""Training with numbers that change: the step's own, for all its micro-batches, and the same after resuming."""

from itertools import product
from pathlib import Path

import pytest
from launch import run_job, scalars

from abkd_megatron import AlphaBeta, ToDi
from abkd_megatron.errors import ConfigError
from abkd_megatron.losses.objective import Objective, ScheduledObjective
from abkd_megatron.losses.schedule import Progress, Schedule
from abkd_megatron.vocab_parallel.execution import Execution

TRAINED = ("lm loss", "kd loss", "total loss", "grad-norm")
# Four micro-batches of 2 sequences of 32 tokens a step: the same for all three at each step but in other counts.
SCHEDULES = {
    "kd_weight": "{schedule: linear, from: 1.0, to: 0.5, end: 5}",
    "alpha": "{schedule: cosine, from: 0.5, to: 0.2, end: 40, by: samples}",
    "temperature": "{schedule: piecewise, points: [[0, 3.0], [512, 2.0], [1024, 2.0], [1024, 1.0]], by: tokens}",
}
TAKEN = {
    "kd_weight": [1.0, 0.9, 0.8, 0.7, 0.6, 0.5],
    "alpha": [0.5, 0.471353, 0.396353, 0.303647, 0.228647, 0.2],
    "temperature": [3.0, 2.5, 2.0, 2.0, 1.0, 1.0],
}


@pytest.fixture(scope="module")
def train(workspace: Path, config: Path, teacher: Path, student: Path):
    def train(name: str, distillation: dict[str, object], num_ranks: int = 1, **megatron: object):
        tensorboard = workspace / "schedules" / name / "tensorboard"
        settings = {"train-iters": 6, "eval-interval": 3, "tensorboard-dir": tensorboard}
        settings |= {} if "load" in megatron else {"load": student, "finetune": "true"}
        settings |= {key.replace("_", "-"): value for key, value in megatron.items()}
        run_job(
            "distill",
            config,
            {
                "teacher.load": teacher,
                **{f"megatron.{key}": value for key, value in settings.items()},
                **{f"distillation.{key}": value for key, value in distillation.items()},
            },
            num_ranks=num_ranks,
        )
        return scalars(tensorboard)

    return train


@pytest.fixture(scope="module")
def saved(workspace: Path) -> Path:
    return workspace / "schedules" / "saved"


@pytest.fixture(scope="module")
def straight(train, saved: Path):
    return train("straight", SCHEDULES, save=saved, save_interval=3)


def test_each_step_has_its_own_numbers(straight) -> None:
    for name, taken in TAKEN.items():
        assert straight[name] == pytest.approx(taken, rel=1e-5), name
        # After steps 3 and 6, and twice once training is done: those of the step before.
        assert straight[f"{name} validation"] == pytest.approx([taken[2], *[taken[5]] * 3], rel=1e-5), name
    terms = zip(*(straight[name] for name in ("lm loss", "kd_weight", "kd loss")), strict=True)
    weighed = [lm + kd_weight * kd for lm, kd_weight, kd in terms]
    assert straight["total loss"] == pytest.approx(weighed, rel=1e-6)


def test_a_resumed_run_repeats_the_straight_one(train, straight, saved: Path) -> None:
    resumed = train("resumed", SCHEDULES, load=saved, ckpt_step=3)
    for name in (*TRAINED, *TAKEN):
        assert len(straight[name]) == 6
        assert resumed[name] == straight[name][3:], name


# A preset whose schedules begin at the limit case (1, 0) and count fractions of the run.
GLIDE = {"preset": "annealed", "lm_weight": 0.1}


def test_an_annealed_run_resumes_to_the_bit(train, workspace: Path) -> None:
    """Resumed inside of the glide, twice: with the length counted in steps, and in samples."""
    for name, length in (("steps", {}), ("samples", {"train_iters": "null", "train_samples": 48})):
        folder = workspace / "schedules" / f"glide-{name}"
        straight = train(f"glide-{name}", GLIDE, save=folder, save_interval=4, **length)
        assert straight["alpha"] == pytest.approx([1.0] * 4 + [1.0 - 0.8 / 3, 1.0 - 1.6 / 3], rel=1e-6)
        assert straight["beta"] == pytest.approx([0.0] * 4 + [0.7 / 3, 1.4 / 3], rel=1e-6)
        assert straight["alpha validation"][0] == 1.0
        assert straight["beta validation"][1:] == pytest.approx([1.4 / 3] * 3, rel=1e-6), "the step's before it"
        resumed = train(f"glide-{name}-resumed", GLIDE, load=folder, ckpt_step=4, **length)
        for key in (*TRAINED, "alpha", "beta"):
            assert resumed[key] == straight[key][4:], (name, key)


def test_a_growing_batch_counts_by_its_samples(train, workspace: Path) -> None:
    """Four steps of 4 sequences, then four of 8: a third of the data and half of the steps."""
    folder = workspace / "schedules" / "growing"
    growing = {"train_iters": "null", "train_samples": 48, "global_batch_size": "null"}
    growing |= {"step_batch_size_schedule": "0:4 512:8", "save_interval": 6, "eval_interval": 100}
    straight = train("growing", GLIDE, save=folder, **growing)
    fractions = [done / 48 for done in (0, 4, 8, 12, 16, 24, 32, 40)]
    assert straight["alpha"] == pytest.approx([1.0 - 0.8 * max(2 * it - 1, 0) for it in fractions], rel=1e-6)
    resumed = train("growing-resumed", GLIDE, load=folder, ckpt_step=6, **growing)
    for key in (*TRAINED, "alpha", "beta"):
        assert resumed[key] == straight[key][6:], key


def test_another_length_moves_the_fractions(train, workspace: Path) -> None:
    folder = workspace / "schedules" / "glide-steps"
    longer = train("longer", GLIDE, load=folder, ckpt_step=4, train_iters=8, override_opt_param_scheduler="true")
    assert longer["alpha"] == pytest.approx([1.0, 0.8, 0.6, 0.4], rel=1e-6)


def test_validation_alone_has_the_numbers_of_the_last_step(train, straight, saved: Path) -> None:
    validated = train("validated", SCHEDULES, load=saved, ckpt_step=6)
    assert "lm loss" not in validated
    for name in (*TAKEN, "kd loss"):
        assert validated[f"{name} validation"] == straight[f"{name} validation"][-2:], name


def test_numbers_that_change_train_another_student_and_constant_ones_the_same(train, straight) -> None:
    numbers = {"kd_weight": 1.0, "alpha": 0.5, "temperature": 3.0}
    plain = train("plain", numbers)
    constant = train("constant", {name: f"{{schedule: constant, value: {it}}}" for name, it in numbers.items()})
    for name in TRAINED:
        assert constant[name] == plain[name], name
        assert straight[name][0] == plain[name][0], name
        assert straight[name][-1] != plain[name][-1], name
    assert constant["alpha"] == [0.5] * 6 and "alpha" not in plain


def test_pipeline_equals_one_rank(train, straight) -> None:
    split = train("pipeline", SCHEDULES, 2, pipeline_model_parallel_size=2)
    for name in (*TRAINED, *TAKEN):
        assert split[name] == pytest.approx(straight[name], rel=1e-4), name


def test_a_weight_that_leaves_0_trains_without_the_teacher_before(train) -> None:
    schedule = "{schedule: piecewise, points: [[0, 0.0], [3, 0.0], [3, 1.0]]}"
    late = train("late", {"kd_weight": schedule})
    watched = train("watched", {"kd_weight": 0})
    for name in TRAINED:
        assert late[name][:3] == watched[name][:3], name
        assert late[name][-1] != watched[name][-1], name
    assert late["kd_weight"] == [0.0] * 3 + [1.0] * 3


OBJECTIVE = Objective(AlphaBeta(0.2, 0.7), lm_weight=0.5)


def test_a_step_has_one_objective() -> None:
    scheduled = ScheduledObjective(
        OBJECTIVE, {"alpha": Schedule.linear(0.2, 0.4, end=10), "kd_weight": Schedule.linear(1.0, 0.5, end=20)}
    )
    assert scheduled.at(Progress(5)) == Objective(AlphaBeta(0.30000000000000004, 0.7), kd_weight=0.875, lm_weight=0.5)
    assert scheduled.values(Progress(20)) == {"alpha": 0.4, "kd_weight": 0.5}
    assert ScheduledObjective(OBJECTIVE, {}).at(Progress(5)) == OBJECTIVE


def test_a_weight_of_0_at_some_step_takes_logits_at_all() -> None:
    down, up = Schedule.linear(1.0, 0.0, end=10), Schedule.linear(0.1, 1.0, end=10)
    for head, schedule in product(("auto", "fused"), (down, up)):
        scheduled = ScheduledObjective(Objective(AlphaBeta(0.2, 0.7)), {"kd_weight": schedule})
        if head == "fused" and schedule is down:
            with pytest.raises(ConfigError, match=r"head: fused.*kd_weight above 0"):
                Execution(head=head).resolve(scheduled)
            continue
        assert Execution(head=head).resolve(scheduled).head == ("materialized" if schedule is down else head)


@pytest.mark.parametrize(
    ("objective", "name", "schedule", "message"),
    [
        (OBJECTIVE, "gamma", Schedule.of(1.0), "temperature, kd_weight, lm_weight, alpha, beta .*got one of gamma"),
        (Objective(ToDi()), "detach", Schedule.of(1.0), "temperature, kd_weight, lm_weight, scale .*got one of detach"),
        (Objective(ToDi()), "scale", Schedule.linear(1.0, -1.0, end=5), "expected scale >= 0, got -1.0"),
        (OBJECTIVE, "temperature", Schedule.linear(1.0, 0.0, end=5), "temperature must be above 0 at every step"),
        (OBJECTIVE, "kd_weight", Schedule.linear(1.0, -0.5, end=5), "kd_weight must be at least 0 at every step"),
        (
            Objective(ToDi(), lm_weight=0.0),
            "kd_weight",
            Schedule.linear(1.0, 0.0, end=5),
            "both be 0, but are at iteration 5",
        ),
    ],
)
def test_refused(objective: Objective, name: str, schedule: Schedule, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ScheduledObjective(objective, {name: schedule})
