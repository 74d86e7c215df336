"""The accuracy benchmark at a tiny vocabulary: every case and loss, and nothing wrong passes it.

Proves: equal models give exactly 0; where nothing cancels, loss and gradient keep their limits; the peer computes the
same losses; a value, a gradient or a bf16 path that is wrong is above its limit, as NaN is, and is listed; a reason is
given for an H that is rounded and not for one that is wrong; the report is written as printed.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from abkd_megatron import AlphaBeta, kernels

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(BENCHMARKS))
    import accuracy as benchmark

TOKENS, VOCAB = 2, 512
CASES = ["randn*2", "both peaked", "near", "peaked and near", "offset", "randn*20", "equal"]


@pytest.fixture(scope="module")
def rows():
    before = kernels.use("auto")
    contestants = {"eager": benchmark.ours("eager"), benchmark.PEER: benchmark.autograd_loss}
    yield benchmark.measure(contestants, TOKENS, VOCAB)
    kernels.use(before)


@pytest.fixture
def exact():
    """Of one loss and case where nothing cancels."""
    return benchmark.Exact(AlphaBeta(0.2, 0.7), *benchmark.cases(TOKENS, VOCAB)["randn*2"])


def test_every_case_and_loss_has_a_row(rows):
    assert [(row["case"], row["loss"]) for row in rows] == [(case, loss) for case in CASES for loss in benchmark.LOSSES]
    text = benchmark.table(rows, "eager")
    assert all(f"\n{row['case']:16} {row['loss']:20}" in text for row in rows)


def test_the_cases_are_what_they_say():
    of = benchmark.cases(TOKENS, VOCAB)
    assert all(x.dtype == torch.bfloat16 and x.shape == (TOKENS, VOCAB) for pair in of.values() for x in pair)
    for case in ("both peaked", "peaked and near"):
        student, teacher = of[case]
        assert torch.equal(student.argmax(-1), teacher.argmax(-1)) and student.amax(-1).min() > 20
    student, teacher = (x.float() for x in of["near"])
    assert 0 < (student - teacher).abs().mean() < 0.03
    student, teacher = (x.float().mean() for x in of["offset"])
    assert abs(student - 200) < 1 and abs(teacher + 300) < 1
    assert torch.equal(*of["equal"])


def test_equal_models_give_exactly_nothing(rows):
    for row in rows:
        if row["case"] == "equal":
            result = row["results"]["eager"]
            assert all(result[name] == 0.0 for name in (*benchmark.LIMITS, "absolute", "relative")), row
            assert result["above"] == []


def test_limits_hold_where_nothing_cancels(rows):
    for row in rows:
        result = row["results"]["eager"]
        assert result["loss"] <= 1 and result["loss, bf16"] <= 1, row
        if row["loss"] != "total variation":  # of first order in the errors of a probability
            assert result["relative"] < 1e-4, row
        # Where the student is sure of one token, h - q H cancels; in these losses also where both models are.
        tiny = (
            row["loss"] in ("skew forward KL", "skew reverse KL", "total variation") and row["largest gradient"] < 1e-8
        )
        if row["case"] != "randn*20" and not tiny:
            assert result["gradient"] <= 1e-5 and result["above"] == [], row


@pytest.mark.parametrize("loss", benchmark.LOSSES)
def test_the_peer_is_the_same_loss(loss):
    student, teacher = (x.double() for x in benchmark.cases(TOKENS, VOCAB)["randn*2"])
    divergence = benchmark.LOSSES[loss]
    wanted = benchmark.differentiated(benchmark.dense, student, teacher, divergence)

    def peer(student, teacher, divergence):
        return benchmark.from_logs(student.log_softmax(-1), teacher.log_softmax(-1), divergence)

    torch.testing.assert_close(benchmark.differentiated(peer, student, teacher, divergence), wanted)


def only_bf16(student, teacher, divergence):
    return benchmark.dense(student, teacher, divergence) * (1.001 if student.dtype == torch.bfloat16 else 1.0)


WRONG = {
    "value": (lambda s, t, d: benchmark.dense(s, t, d) + 1e-3, {"loss", "loss, bf16"}),
    "bf16": (only_bf16, {"loss, bf16"}),
    "gradient": (lambda s, t, d: benchmark.dense(s, t, d) + 1e-4 * (s - s.detach()).sum(-1), {"gradient"}),
    "nan": (lambda s, t, d: benchmark.dense(s, t, d) * float("nan"), {"loss", "loss, bf16", "gradient"}),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_loss_is_above_its_limit(what, exact, rows):
    loss, wanted = WRONG[what]
    result = exact.result(loss, benchmark.LIMITS)
    assert {found["what"] for found in result["above"]} == wanted
    assert not any("why" in found for found in result["above"])
    row = {**rows[0], "results": {"wrong": result, benchmark.PEER: rows[0]["results"][benchmark.PEER]}}
    text = benchmark.table([row], "wrong")
    assert text.count("!") == len(wanted) + 1 and text.count("no reason found") == len(wanted)
    assert exact.result(benchmark.dense, benchmark.LIMITS)["above"] == []


def test_equal_models_have_no_allowance():
    def hair(student, teacher, divergence):
        return 1e-30 * (1 + student.sum(-1))

    for row in benchmark.measure({"hair": hair}, 1, 64):
        if row["case"] == "equal":
            assert {found["what"] for found in row["results"]["hair"]["above"]} == set(benchmark.LIMITS)


@pytest.mark.parametrize(("by", "explained"), [(2.0**-24, True), (2.0**-10, False)])
def test_only_a_rounded_h_is_a_reason(by, explained):
    # One token has all of the student's mass and none of the teacher's: h and H are near 2, the gradient near 0.
    student, teacher = (torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(0)) for _ in range(2))
    student[:, 0] += 60
    teacher[:, 1] += 60
    exact = benchmark.Exact(AlphaBeta(0.5, 0.5), student.bfloat16(), teacher.bfloat16())

    def off(student, teacher, divergence):  # its gradient has 2 q_j more, times `by`
        loss = benchmark.dense(student, teacher, divergence)
        log_q = student.double().log_softmax(-1).detach()
        return loss + 2 * by * (log_q.exp() * (student - student.detach())).sum(-1)

    (found,) = exact.result(off, benchmark.LIMITS)["above"]
    assert found["what"] == "gradient" and ("why" in found) == explained


def test_the_command_line_writes_what_it_prints(tmp_path):
    report = tmp_path / "new" / "accuracy.json"
    command = [sys.executable, BENCHMARKS / "accuracy.py", "--kernels", "eager", "--tokens", "1", "--vocab", "64"]
    done = subprocess.run([*command, "--json", report], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    written = json.loads(report.read_text())
    assert (written["tokens"], written["vocab"], written["limits"]) == (1, 64, benchmark.LIMITS)
    assert written["machine"]["versions"] == benchmark.machine()["versions"]
    assert len(written["rows"]) == len(CASES) * len(benchmark.LOSSES)
    assert benchmark.table(written["rows"], "eager") in done.stdout


def test_the_rows_survive_json(rows):
    assert json.loads(json.dumps(rows)) == rows
