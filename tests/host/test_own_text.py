"""Steps on the student's own text: the same in every layout, resumed and repeated; and nothing but them changes."""

import re
from pathlib import Path

import pytest
from launch import Rank, launch, run_job, scalars
from matrix import LIKE_GPT, MOE
from test_determinism import differences, whole

PROGRAM, INJECT = (Path(__file__).with_name(name) for name in ("own_text.py", "inject.py"))
STEPS = 5
TENSOR = {"megatron.tensor-model-parallel-size": 2, "megatron.sequence-parallel": True}
PIPELINE = {"megatron.pipeline-model-parallel-size": 2}
VIRTUAL = {**PIPELINE, "megatron.num-layers-per-virtual-pipeline-stage": 1}
OVERLAPPED = {
    "megatron.use-distributed-optimizer": True,
    "megatron.overlap-grad-reduce": True,
    "megatron.overlap-param-gather": True,
}
DROPOUT = {"megatron.hidden-dropout": 0.1, "megatron.attention-dropout": 0.1}
# Own text in the steps after 1, 2 and 4 others.
SEED = 10


def on_policy(share: float, **more: object) -> str:
    given = {"share": share, "prompt_tokens": 8, "new_tokens": 20, "seed": SEED, **more}
    return "{" + ", ".join(f"{name}: {value}" for name, value in given.items()) + "}"


def run(
    config: Path, folder: Path, teacher: Path, num_ranks: int, *first: str, **settings: object
) -> tuple[dict[str, list[float]], list[Rank]]:
    given = {
        "teacher.load": teacher,
        "megatron.tensorboard-dir": folder / "tensorboard",
        "megatron.eval-interval": 3,
        "distillation.divergence": "reverse_kl",
        **settings.pop("given", {}),
        **settings,
    }
    program = (PROGRAM, *first) if first else ("-m", "abkd_megatron")
    given = {name: value for name, value in given.items() if value is not None}
    ranks = run_job("distill", config, given, num_ranks=num_ranks, program=program)
    return scalars(folder / "tensorboard"), ranks


def untimed(found: dict[str, list[float]]) -> dict[str, list[float]]:
    return {name: values for name, values in found.items() if "time" not in name and "seconds" not in name}


STUDENTS = {
    "dense": {},
    "deep": {"megatron.num-layers": 4},
    "experts": {"teacher.num-experts": "null", **{f"megatron.{name}": value for name, value in MOE.items()}},
}
# {name: (ranks, student, settings)}
LAYOUTS = {
    "tensor": (2, "dense", TENSOR),
    "pipeline": (2, "dense", PIPELINE),
    "interleaved": (2, "deep", VIRTUAL),
    "data": (2, "dense", OVERLAPPED),
    "hybrid": (2, "dense", {**TENSOR, **{f"megatron.{name}": value for name, value in LIKE_GPT.items()}}),
    "experts": (2, "experts", {"megatron.expert-model-parallel-size": 2}),
}


@pytest.fixture(scope="module")
def students(workspace: Path, config: Path, student: Path) -> dict[str, Path]:
    made = {"dense": student}
    for name in ("deep", "experts"):
        made[name] = workspace / f"student-of-own-text-{name}"
        more = {"megatron.train-iters": 1, "megatron.save": made[name], "megatron.save-interval": 1}
        of_student = {key: value for key, value in STUDENTS[name].items() if key.startswith("megatron.")}
        run_job("pretrain", config, {**more, **of_student})
    return made


def start(students: dict[str, Path], name: str = "dense") -> dict[str, object]:
    return {"megatron.load": students[name], "megatron.finetune": True, **STUDENTS[name]}


@pytest.fixture(scope="module")
def on_one(workspace: Path, config: Path, teacher: Path, students: dict[str, Path]) -> dict[str, dict]:
    found = {}
    for name in STUDENTS:
        given = {**start(students, name), "distillation.on_policy": on_policy(0.5)}
        found[name], _ = run(config, workspace / f"own-one-{name}", teacher, 1, given=given)
    return found


def test_steps_are_on_data_or_on_own_text(on_one: dict[str, dict]) -> None:
    found = on_one["dense"]
    own = {name for name in found if name.startswith("own text")}
    assert own >= {
        *("own text lm loss", "own text kd loss", "own text total loss", "own text length", "own text ended"),
        *("own text distinct-2", "own text sampling seconds", "own text teacher lm loss"),
    }
    assert len(found["own text kd loss"]) == len(found["own text length"]) == 3
    assert len(found["kd loss"]) == len(found["lm loss"]) == STEPS - 3
    assert found["own text total loss"] == found["own text kd loss"], "own labels are not trained on"
    assert all(1 <= length <= 20 for length in found["own text length"])
    assert all(0 < share <= 1 for share in found["own text distinct-2"])
    assert len(found["grad-norm"]) == STEPS
    assert not any(name.startswith("own text") and "validation" in name for name in found)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_trains_on_the_same_text(
    workspace: Path, config: Path, teacher: Path, students: dict, on_one: dict, name: str
) -> None:
    ranks, of, layout = LAYOUTS[name]
    given = {**start(students, of), **layout, "distillation.on_policy": on_policy(0.5)}
    found, _ = run(config, workspace / f"own-{name}", teacher, ranks, given=given)
    one = untimed(on_one[of])
    assert untimed(found).keys() == one.keys()
    for key in ("own text length", "own text ended", "own text distinct-2"):
        assert found[key] == pytest.approx(one[key], rel=1e-6), key
    for key, values in one.items():
        if key.startswith(("own text", "kd loss", "lm loss", "grad-norm")):
            assert found[key] == pytest.approx(values, rel=1e-4, abs=1e-6), key


def test_in_bf16_the_greedy_text_is_what_the_trained_pass_takes(
    workspace: Path, config: Path, teacher: Path, students: dict
) -> None:
    """But for logits that round to the same number."""
    found = {}
    for name, layout in (("fp32", {}), ("bf16", {"megatron.bf16": True})):
        policy = on_policy(1, temperature=0)
        given = {**start(students), **TENSOR, **layout, "distillation.on_policy": policy, "megatron.train-iters": 2}
        found[name], _ = run(config, workspace / f"own-{name}", teacher, 2, given=given)
    assert found["fp32"]["own text top-1 accuracy"] == [1, 1]
    assert min(found["bf16"]["own text top-1 accuracy"]) > 0.95
    first = {name: numbers["own text kd loss"][0] for name, numbers in found.items()}  # before weights differ
    assert first["bf16"] == pytest.approx(first["fp32"], rel=2e-2)


@pytest.mark.parametrize("name, layout", [("tensor", TENSOR), ("interleaved", VIRTUAL), ("data", OVERLAPPED)])
def test_sampling_itself_changes_nothing(
    workspace: Path, config: Path, teacher: Path, name: str, layout: dict[str, object]
) -> None:
    layers = 4 if name == "interleaved" else 2
    common = {**layout, **DROPOUT, "megatron.num-layers": layers, "megatron.save-interval": STEPS}
    found = {}
    for kind in ("plain", "unused"):
        folder = workspace / f"own-{kind}-{name}"
        given = {**common, "megatron.save": folder / "save"}
        first = ()
        if kind == "unused":
            given["distillation.on_policy"] = on_policy(1)
            first = ("unused", "-")
        found[kind], ranks = run(config, folder, teacher, 2, *first, given=given)
        sampled = [re.findall(r"^SAMPLED (\d+)$", rank.output, re.MULTILINE) for rank in ranks]
        assert [len(of) for of in sampled] == [STEPS * (kind == "unused")] * 2
        if kind == "unused":
            assert sampled[0] == sampled[1]
    assert untimed(found["plain"]) == untimed(found["unused"])
    saved = [whole(workspace / f"own-{kind}-{name}" / "save", STEPS) for kind in found]
    # Megatron's shared-out optimizer saves memory between parameters that nobody has written.
    assert [name for name in differences(*saved) if not name.startswith("optimizer.distributed")] == []


def test_share_0_is_the_run_without(workspace: Path, config: Path, teacher: Path) -> None:
    plain, _ = run(config, workspace / "own-none", teacher, 1)
    none, _ = run(config, workspace / "own-0", teacher, 1, given={"distillation.on_policy": on_policy(0)})
    assert untimed(plain) == untimed(none)


@pytest.fixture(scope="module")
def straight(workspace: Path, config: Path, teacher: Path) -> tuple[Path, dict[str, list[float]]]:
    """A run whose dropout would show a random state that is not put back."""
    folder = workspace / "own-straight"
    given = {
        **PIPELINE,
        **DROPOUT,
        "megatron.save": folder / "save",
        "megatron.save-interval": 2,
        "distillation.on_policy": on_policy(0.5),
    }
    found, _ = run(config, folder, teacher, 2, given=given)
    return folder, found


def test_a_resumed_run_is_equal_to_the_bit(
    workspace: Path, config: Path, teacher: Path, straight: tuple[Path, dict]
) -> None:
    before, whole_run = straight
    folder = workspace / "own-resumed"
    given = {
        **PIPELINE,
        **DROPOUT,
        "megatron.load": before / "save",
        "megatron.ckpt-step": 2,
        "megatron.save": folder / "save",
        "megatron.save-interval": 2,
        "distillation.on_policy": on_policy(0.5),
    }
    found, _ = run(config, folder, teacher, 2, given=given)
    for name, values in untimed(found).items():
        assert values == untimed(whole_run)[name][-len(values) :], name
    assert len(found["own text kd loss"]) == 2
    assert differences(whole(before / "save", STEPS), whole(folder / "save", STEPS)) == []


def test_a_repeated_step_is_equal_to_the_bit(
    workspace: Path, config: Path, teacher: Path, straight: tuple[Path, dict]
) -> None:
    before, once = straight
    folder = workspace / "own-repeated"
    given = {
        **PIPELINE,
        **DROPOUT,
        "megatron.save": folder / "save",
        "megatron.save-interval": 2,
        "megatron.rerun-mode": "validate_results",
        "distillation.on_policy": on_policy(0.5),
    }
    found, ranks = run(config, folder, teacher, 2, "repeated", "-", given=given)
    assert {*re.findall(r"^REPEATED (\w+)$", ranks[1].output, re.MULTILINE)} == {"True", "False"}
    assert untimed(found) == untimed(once)
    differing = differences(whole(before / "save", STEPS), whole(folder / "save", STEPS))
    assert [name for name in differing if not name.startswith("rerun_state_machine")] == []


def test_a_rank_killed_while_it_samples_ends_the_job(config: Path, teacher: Path) -> None:
    given = {**PIPELINE, "teacher.load": teacher, "distillation.on_policy": on_policy(1)}
    words = [f"{name}={value}" for name, value in given.items()]
    other, killed = launch([INJECT, "sampling", 2, 1, "SIGKILL", "--", "distill", config, *words], 2)
    assert killed.code == -9 and other.code == 1
    assert "ended in step 2 because another rank of the job has ended" in other.output
    assert other.ended - killed.ended < 15


def test_estimators_see_what_the_student_drew(workspace: Path, config: Path, teacher: Path, students: dict) -> None:
    """k1 and k3 are the exact divergence within four standard errors; in validation they are the divergence itself."""
    found, which = {}, ("k1", "k2", "k3")
    losses = "[{name: reverse_kl}, " + ", ".join(f"{{name: {name}, weight: 0.5}}" for name in which) + "]"
    for name, ranks, layout in (("one", 1, {}), ("tensor", 2, TENSOR)):
        given = {**start(students), **layout, "distillation.divergence": None, "distillation.losses": losses}
        given |= {"distillation.on_policy": on_policy(1), "megatron.train-iters": 3, "distillation.diagnostics": True}
        found[name], _ = run(config, workspace / f"own-estimators-{name}", teacher, ranks, given=given)
    one, tensor = untimed(found["one"]), untimed(found["tensor"])
    assert tensor.keys() == one.keys()
    for key in (*(f"own text {name} loss" for name in which), "own text kd loss", "own text lm loss", "grad-norm"):
        assert tensor[key] == pytest.approx(one[key], rel=1e-4, abs=1e-6), key
    tokens = [8 * length for length in one["own text length"]]
    k1, k2, k3 = (
        sum(n * value for n, value in zip(tokens, one[f"own text {name} loss"], strict=True)) / sum(tokens)
        for name in which
    )
    whole = sum(n * value for n, value in zip(tokens, one["own text kd loss"], strict=True)) / sum(tokens)
    exact = whole - 0.5 * (k1 + k2 + k3)
    error = ((2 * k2 - k1**2) / sum(tokens)) ** 0.5
    assert abs(k1 - exact) < 4 * error < exact and abs(k3 - exact) < 4 * error
    exact_on_data = one["reverse kl to teacher validation"][-1]
    assert one["kd loss validation"][-1] == pytest.approx(2.5 * exact_on_data, rel=1e-4)


SOURCE = """
def halves(prompts):
    return [row[:4] for row in prompts]"""


def test_text_of_a_source_is_trained_on(workspace: Path, config: Path, teacher: Path, students: dict) -> None:
    folder = workspace / "own-text-source"
    folder.mkdir()
    (folder / "own_source.py").write_text(SOURCE)
    found = {}
    for name, ranks, layout in (("one", 1, {}), ("tensor", 2, TENSOR), ("pipeline", 2, PIPELINE)):
        policy = on_policy(1, source="own_source:halves")
        given = {**start(students), **layout, "distillation.on_policy": policy, "megatron.train-iters": 2}
        found[name], _ = run(config, folder / name, teacher, ranks, "source", str(folder), given=given)
        assert found[name]["own text length"] == [4.0, 4.0]
    for name in ("tensor", "pipeline"):
        assert found[name]["own text kd loss"] == pytest.approx(found["one"]["own text kd loss"], rel=1e-4)


REWARD = """
def of_length(prompts, texts):
    assert all(prompts)
    return [len(text) for text in texts]
"""


def test_rewards_are_compared_within_groups_in_every_layout(
    workspace: Path, config: Path, teacher: Path, students: dict
) -> None:
    folder = workspace / "rewards"
    folder.mkdir()
    (folder / "own_reward.py").write_text(REWARD)
    found = {}
    policy = on_policy(1, reward="own_reward:of_length", group=2, reward_weight=0.5)
    for name, ranks, layout in (("one", 1, {}), ("tensor", 2, TENSOR), ("pipeline", 2, PIPELINE), ("data", 2, {})):
        given = {**start(students), **layout, "distillation.on_policy": policy, "megatron.train-iters": 2}
        found[name], _ = run(config, folder / name, teacher, ranks, "source", str(folder), given=given)
    one = found.pop("one")
    assert all(reward > 0 for reward in one["own text reward"])
    assert one["own text total loss"] != one["own text kd loss"]
    for of_layout in found.values():
        for key in ("own text reward", "own text length", "own text total loss", "own text kd loss", "grad-norm"):
            assert of_layout[key] == pytest.approx(one[key], rel=1e-4, abs=1e-6), key


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"distillation.cache": "somewhere"}, "a cache has no records of the student's own text"),
        ({"distillation.on_policy": on_policy(0.5, prompt_tokens=14)}, "prompt_tokens + new_tokens of at most"),
        ({"distillation.on_policy": on_policy(0.5, source="nowhere:at_all")}, "module:function that can be imported"),
        ({"distillation.on_policy": on_policy(0.5, reward="a:b", group=3)}, "a group that divides micro-batch-size 2"),
        ({"distillation.on_policy": on_policy(0.5, group=2)}, "expected 2 or more with a reward"),
        ({"distillation.on_policy": "{share: 1, new_tokens: 4}"}, "expected prompt_tokens"),
        ({"megatron.dataloader-inter-document-masking": True}, "got documents"),
        ({"megatron.sft": True, "megatron.sft-tokenizer-prompt-format": "identity"}, "with which all tokens count"),
        ({"distillation.on_policy": on_policy(1.5)}, "share: expected 0 to 1"),
        ({"distillation.kd_weight": 0}, "expected kd_weight above 0 at every step"),
        ({"megatron.context-parallel-size": 2}, "context-parallel-size 1"),
        ({"megatron.mtp-num-layers": 1}, "no multi-token prediction"),
    ],
)
def test_what_does_not_go_together_is_rejected(config: Path, teacher: Path, settings: dict, message: str) -> None:
    given = {"distillation.on_policy": on_policy(0.5), **settings}
    if "distillation.cache" not in settings:
        given["teacher.load"] = teacher
    words = [f"{name}={value}" for name, value in given.items()]
    for rank in launch(["-m", "abkd_megatron", "distill", config, *words], 2):
        assert rank.code == 2 and message in rank.output, rank.output[-3000:]
