"""Every row of the matrix trains as on one rank or is refused, and the table in docs/parallelism.md says just that."""

import email
import json
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from gradients import whole
from launch import run_job, scalars
from matrix import (
    REFERENCES,
    ROWS,
    Row,
    check_log,
    check_refused,
    of_teacher,
    overrides,
    recorded,
    run_refused,
)
from stand_ins import program_for
from torch import Tensor

LOGS: dict[tuple[str, str], str] = {}
"""What the last rank of a row's job printed, by its reference and name."""


class Trained(NamedTuple):
    logged: dict[str, list[float]]
    """As TensorBoard has it."""
    gradients: dict[str, Tensor]
    """Of the first step."""


# As conftest.py makes the teacher that most share.
TEACHER = {"num-layers": 4, "hidden-size": 48, "ffn-hidden-size": 96, "seed": 7}
TRAINED = [row for row in ROWS if row.refused is None]
REFUSED = [row for row in ROWS if row.refused is not None]


@pytest.fixture(scope="module")
def short_documents(workspace: Path, config: Path) -> Path:
    """The text of `config`, every line a document: their ends are all over the micro-batches."""
    source, prepared = workspace / "lines.jsonl", workspace / "short-documents"
    text = "".join(file.read_text() for file in Path(email.__file__).parent.glob("*.py"))
    source.write_text("\n".join(json.dumps({"text": line}) for line in text.splitlines()))
    run_job("prepare", config, {"data.source": f"[{source}]", "data.dir": prepared})
    return prepared


@pytest.fixture(scope="module")
def made(workspace: Path, config: Path, short_documents: Path):
    """Trains and saves a model for a reference; the text of all of them has one tokenizer."""

    @cache
    def made(kind: str, name: str) -> Path:
        path = workspace / "matrix" / f"{kind} {name}"
        if kind == "student":
            settings = {**REFERENCES[name].student, "train-iters": 1, "save-interval": 1}
        else:
            settings = {**TEACHER, **REFERENCES[name].teacher, "train-iters": 8, "save-interval": 8}
        settings |= {"data.dir": short_documents, "save": path}
        run_job("pretrain", config, overrides(settings), program=[*program_for(settings), "-m", "abkd_megatron"])
        return path

    return made


@pytest.fixture(scope="module")
def teacher_of(made):
    return lambda name: made("teacher", name if REFERENCES[name].teacher else "default")


@pytest.fixture(scope="module")
def train(workspace: Path, config: Path, teacher_of, made, student: Path, short_documents: Path):
    """Trains with some settings beside those of a reference."""

    def train(reference: str, name: str, num_ranks: int, settings: dict) -> Trained:
        by = REFERENCES[reference]
        tensorboard = workspace / "matrix" / name
        settings = {
            "data.dir": short_documents,
            "distillation.head": "materialized",
            "train-iters": 3,
            "load": made("student", reference) if by.student else student,
            "finetune": "true",
            "teacher.load": teacher_of(reference),
            "tensorboard-dir": tensorboard,
            **by.student,
            **of_teacher(by.teacher),
            **by.beside,
            **settings,
        }
        program = [*program_for(settings), Path(__file__).with_name("gradients.py"), tensorboard / "gradients"]
        ranks = run_job("distill", config, overrides(settings), num_ranks=num_ranks, program=program)
        check_log(ranks, settings)
        LOGS[reference, name] = ranks[-1].output
        return Trained(scalars(tensorboard), whole(sorted((tensorboard / "gradients").iterdir())))

    return train


@pytest.fixture(scope="module")
def trained_on_one_rank(train):
    return cache(lambda reference: train(reference, f"one rank, {reference}", 1, {}))


@pytest.fixture(scope="module")
def on_one_rank(trained_on_one_rank):
    return lambda reference: trained_on_one_rank(reference).logged


@pytest.fixture(scope="module")
def ended(workspace: Path, config: Path, teacher_of, short_documents: Path) -> list[dict[str, tuple[int, str]]]:
    """How every refused row ended, on the ranks of one job."""
    cases = {}
    (num_ranks,) = {row.num_ranks for row in REFUSED}
    for row in REFUSED:
        of = of_teacher(REFERENCES[row.reference].teacher)
        shared = {"data.dir": short_documents, "teacher.load": teacher_of(row.reference)}
        settings = overrides({**shared, **of, **row.settings})
        words = [f"{key}={value}" for key, value in settings.items()]
        cases[str(row)] = ["distill", "--config", str(config), *words]
    return run_refused(cases, num_ranks, workspace)


@pytest.mark.parametrize("row", TRAINED, ids=str)
def test_trains_as_on_one_rank(train, trained_on_one_rank, row: Row) -> None:
    with recorded(row.feature, row.where, f"equal to one rank within {row.tolerance}"):
        wanted, expected = trained_on_one_rank(row.reference)
        got, gradients = train(row.reference, f"{ROWS.index(row)}", row.num_ranks, dict(row.settings))
        for name in row.names:
            assert len(got[name]) == len(wanted[name]) == (2 if "validation" in name else 3), name
            assert got[name] == pytest.approx(wanted[name], rel=float(row.tolerance)), name
        if row.is_compared_with_gpt:
            gradients = {as_of_gpt(name): gradient for name, gradient in gradients.items()}
        check_gradients(gradients, expected, float(row.tolerance))
        if "bf16" in row.settings:
            assert got["lm loss"] != wanted["lm loss"], "this was fp32"
        # How long the teacher took is another time's; it is known of every step, on whatever ranks it ran.
        assert len(got["teacher seconds"]) == 3 and all(seconds > 0 for seconds in got["teacher seconds"])
        assert "teacher seconds validation" not in got


def as_of_gpt(name: str) -> str:
    """The name of a weight of a HybridModel `*-*-` in a GPTModel, where two of its layers are one."""
    layer = re.match(r"decoder\.layers\.(\d+)\.(\S+)(.*)", name)
    if layer is None:
        return name.replace("decoder.final_norm.", "decoder.final_layernorm.")
    return f"decoder.layers.{layer[2]} {int(layer[1]) // 2}{layer[3]}"


def check_gradients(got: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    """Compare every weight's, to a part of the largest of its tensor."""
    assert got.keys() == wanted.keys() and len(wanted) > 10
    for name, expected in wanted.items():
        here = got[name]
        if here.shape != expected.shape:  # rows of tokens that the vocabulary has not: more ranks, more padding
            rows = min(len(here), len(expected))
            assert here.shape[1:] == expected.shape[1:] and not here[rows:].any() and not expected[rows:].any(), name
            here, expected = here[:rows], expected[:rows]
        torch.testing.assert_close(
            here, expected, rtol=0, atol=tolerance * expected.abs().max().item(), msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("row", REFUSED, ids=str)
def test_is_refused(ended, row: Row) -> None:
    assert row.refused is not None
    error = check_refused(ended, str(row), "distill", row.refused)
    _, _, remedy = error.partition("; ")
    assert remedy and "\n" not in error, error
    with recorded(row.feature, "", f"refused: {remedy}"):
        pass


def test_the_report_is_what_is_trained(on_one_rank) -> None:
    one = on_one_rank("default")
    assert one["total loss"] == pytest.approx(
        [lm + kd for lm, kd in zip(one["lm loss"], one["kd loss"], strict=True)], rel=1e-6
    )
    assert one["kd loss"][-1] < one["kd loss"][0]
    assert all(0 <= share <= 1 for share in one["top-1 agreement"])
    # Cross entropy to the teacher is entropy + KL, and so is never below the teacher's entropy.
    assert all(kl > 0 for kl in one["kl to teacher"])


def test_how_losses_are_averaged_matters(on_one_rank) -> None:
    """Else the rows on uneven micro-batches would show nothing."""
    plain, uneven, per_token = map(on_one_rank, ("default", "uneven", "uneven, per token"))
    assert uneven["grad-norm"][0] != pytest.approx(per_token["grad-norm"][0], rel=1e-3)
    # What is logged is one mean over all tokens in both.
    assert uneven["total loss"][0] == pytest.approx(per_token["total loss"][0], rel=1e-6)
    assert uneven["lm loss"][0] != pytest.approx(plain["lm loss"][0], rel=1e-4)


@pytest.mark.parametrize(
    "name", [name for name, reference in REFERENCES.items() if "distillation.tokens" in reference.beside]
)
def test_the_report_of_a_selection(on_one_rank, name: str) -> None:
    one = on_one_rank(name)
    shares = one["selected tokens"]
    assert all(0 < share <= 1 for share in shares), shares
    assert min(shares) < 1, shares
    assert one["total loss"] == pytest.approx(
        [lm + kd for lm, kd in zip(one["lm loss"], one["kd loss"], strict=True)], rel=1e-6
    )
    means = [kl * share for kl, share in zip(one["kl to teacher"], one["selected tokens"], strict=True)]
    if name == "every third token":  # the metrics are of the selected tokens; the divergence is KL
        assert one["kd loss"] == pytest.approx(means, rel=1e-5)
    if REFERENCES[name].teacher:
        return
    # The first step is of the same models, and its cross entropy of all counted tokens.
    everything = on_one_rank("uneven, per token")
    assert one["lm loss"][0] == pytest.approx(everything["lm loss"][0], rel=1e-6)
    if name == "every third token":
        assert one["student entropy"][0] != pytest.approx(everything["student entropy"][0], rel=1e-6)
    else:  # the metrics are of all tokens
        for metric in ("teacher lm loss", "kl to teacher", "teacher entropy", "student entropy", "top-1 agreement"):
            assert one[metric][0] == pytest.approx(everything[metric][0], rel=1e-6), metric
        assert one["kd loss"][0] < one["kl to teacher"][0]


def test_waiting_hidden_states_are_bounded(train, on_one_rank) -> None:
    """One micro-batch's; in an interleaved schedule, those of the micro-batches that go through one stage in a row."""
    rows = [row for row in TRAINED if "pipeline-model-parallel-size" in row.settings and row.tolerance == "1e-4"]
    logs = {row: log for row in rows if (log := LOGS.get((row.reference, str(ROWS.index(row))))) is not None}
    seen = set()
    for row, log in logs.items():
        (found,) = re.findall(r"at most (\d+) micro-batches at a time waited here, (\d+) bytes", log)
        in_a_row = 1
        if "VPP" in row.where or "layout" in "".join(row.settings):
            stages = row.settings["pipeline-model-parallel-size"]
            in_a_row = int(str(row.settings.get("microbatch-group-size-per-virtual-pipeline-stage", stages)))
        # [s, b, H] in the teacher's precision, of which sequence parallelism leaves a rank its part.
        each = 32 * 2 * 48 * (2 if row.reference == "bf16 teacher" else 4) // (2 if " SP" in row.where else 1)
        assert tuple(map(int, found)) == (in_a_row, in_a_row * each), str(row)
        seen.add(in_a_row)
    if not logs:
        pytest.skip("needs rows: run the whole file")
    assert len(logs) < len(rows) or seen == {1, 2, 3, 4}
