"""What is looked at before the first step ends every rank of a real job there, or is left out by name."""

import io
import logging
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from launch import ROOT, Rank, launch, run_job
from test_stock_script import command_line, kd_arguments, run_script
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from abkd_megatron.config.schema import PREFLIGHT, Config, DistillationConfig
from abkd_megatron.errors import ConfigError
from abkd_megatron.losses import AlphaBeta
from abkd_megatron.losses.objective import Objective
from abkd_megatron.preflight.first_step import (
    LARGEST,
    Observed,
    check_batch,
    check_fp32_range,
    check_teacher_loss,
    digest,
    sums_by_teacher,
)
from abkd_megatron.preflight.models import wrong_losses
from abkd_megatron.preflight.rules import (
    CHECKS,
    EARLY_CHECKS,
    FIRST_STEP_CHECKS,
    Check,
    Finding,
    Phase,
    Verdict,
    run_checks,
)
from abkd_megatron.vocab_parallel import VocabShard

TEMPERATURE = 0.08  # at which Neyman's chi-square of these models is beyond fp32's digits, and not infinite
TENSOR, PIPELINE = "megatron.tensor-model-parallel-size=2", "megatron.pipeline-model-parallel-size=2"


def edited(teacher: Path, folder: Path, edit: Callable[[str, torch.Tensor], None]) -> Path:
    """A copy of a checkpoint whose tensors `edit` has changed, by name, where they lie."""
    shutil.copytree(teacher, folder)
    (directory,) = folder.glob("iter_*")
    index = FileSystemReader(directory).read_metadata()
    for item, place in index.storage_data.items():
        if not isinstance(index.state_dict_metadata[item.fqn], TensorStorageMetadata):
            continue
        with (directory / place.relative_path).open("r+b") as file:
            file.seek(place.offset)
            tensor = torch.load(io.BytesIO(file.read(place.length)))
            edit(item.fqn, tensor)
            buffer = io.BytesIO()
            torch.save(tensor, buffer)
            assert len(buffer.getvalue()) == place.length
            file.seek(place.offset)
            file.write(buffer.getvalue())
    return folder


def zero(name: str, tensor: torch.Tensor) -> None:
    tensor.zero_()


@pytest.fixture(scope="module")
def zeroed(workspace: Path, teacher: Path) -> Path:
    return edited(teacher, workspace / "zeroed", zero)


# ---- jobs that are refused


def check_none_trained(ranks: list[Rank], message: str, code: int = 2) -> None:
    for rank in ranks:
        assert rank.code == code, rank.output[-6000:]
        assert re.search(message, rank.output), rank.output[-6000:]
        assert not re.search(r"iteration +1/", rank.output)


def distill(config: Path, teacher: Path, *settings: str) -> list[Rank]:
    return launch(["-m", "abkd_megatron", "distill", "--config", config, f"teacher.load={teacher}", *settings], 2)


def test_a_teacher_of_zeros_is_refused(config: Path, zeroed: Path) -> None:
    message = (
        r"error: expected trained weights of the teacher, got nothing but zeros in embedding\.word_embeddings\.weight"
    )
    ranks = distill(config, zeroed, TENSOR)
    check_none_trained(
        ranks, message + r" \[\d+, 48\] on rank \d, and \d+ more tensors; .*skip_preflight=\[teacher_weights\]"
    )


def test_logits_without_room_are_refused(config: Path, teacher: Path) -> None:
    words = ["distill", "--config", config, f"teacher.load={teacher}", "distillation.head=materialized", PIPELINE]
    ranks = launch([Path(__file__).with_name("little_memory.py"), *words], 2)
    message = (
        r"error: expected room for \S+ GiB of logits, both models' of \d+ tokens and their gradient, got \S+ GiB "
        r"free on rank 1 with both models loaded; .*skip_preflight=\[memory\]"
    )
    check_none_trained(ranks, message)


def test_a_number_that_is_none_is_refused_where_others_do_not_see_it(
    workspace: Path, config: Path, teacher: Path
) -> None:
    def spoil(name: str, tensor: torch.Tensor) -> None:
        if name == "decoder.final_layernorm.weight":
            tensor[3] = math.nan

    ranks = distill(config, edited(teacher, workspace / "nan", spoil), PIPELINE)
    check_none_trained(ranks, r"got NaN or infinite numbers in decoder.final_layernorm.weight \[48\] on rank 1; give")
    assert "(found on rank 1)" in ranks[0].output


def test_a_loss_that_forgets_the_other_ranks_is_refused(config: Path, teacher: Path) -> None:
    losses = "distillation.losses=[{name: forward_kl}, {name: preflight_losses.OwnColumns}]"
    message = r"got a value of OwnColumns that is 0\.\d+ times the dense one .*skip_preflight=\[gradient\]"
    check_none_trained(distill(config, teacher, TENSOR, losses), message)


def test_a_teacher_of_other_ids_is_refused_on_every_stage(workspace: Path, config: Path, teacher: Path) -> None:
    def reverse(name: str, tensor: torch.Tensor) -> None:
        if name == "output_layer.weight":
            tensor.mul_(-20)

    other = edited(teacher, workspace / "other-ids", reverse)
    check_none_trained(
        distill(config, other, PIPELINE),
        r"the teacher's cross entropy on the first step is \d+\.\d+ nats, guessing costs ln 400 = 5.991",
    )


def test_a_forward_step_of_different_tokens_is_refused(tmp_path: Path, config: Path, teacher: Path) -> None:
    text = (ROOT / "examples" / "pretrain_gpt.py").read_text()
    assert text.count('batch["tokens"],') == 1
    script = tmp_path / "pretrain_gpt.py"
    script.write_text(text.replace('batch["tokens"],', 'batch["tokens"].roll(int(__import__("os").environ["RANK"])),'))
    words = [*command_line(config, {"tensor-model-parallel-size": 2}), *kd_arguments(teacher, {})]
    message = "expected the student's tensor-parallel ranks 0, 1 to be given the same tokens"
    check_none_trained(run_script(script, words, 2), message, code=1)


def test_what_is_skipped_trains(config: Path, zeroed: Path) -> None:
    settings = {
        "teacher.load": zeroed,
        "distillation.skip_preflight": "[teacher_weights]",
        "megatron.pipeline-model-parallel-size": 2,
        "megatron.train-iters": 2,
    }
    ranks = run_job("distill", config, settings, num_ranks=2)
    assert re.search(r"iteration +2/ +2 ", ranks[-1].output)
    for rank in ranks:  # a warning, since guessing is no worse than guessing
        assert "is 5.991 nats, guessing costs ln 400 = 5.991: it has learned next to nothing" in rank.output


# ---- the parts


def test_the_configuration_knows_the_checks() -> None:
    late = {check.name for check in CHECKS if check.phase in (Phase.MODELS, Phase.FIRST_STEP)}
    assert set(PREFLIGHT) == late - {"expected_loss", "fp32_range"}
    assert len({check.name for check in CHECKS}) == len(CHECKS)
    config = Config(distillation=DistillationConfig(skip_preflight=["gradients"]))
    (problem,) = [it for it in config.problems("prepare") if "preflight" in str(it)]
    assert "did you mean 'gradient'" in str(problem)


@pytest.mark.parametrize(("of_value", "of_slopes"), [(2.0, 1.0), (1.0, 2.0)], ids=["value", "gradient"])
def test_sums_that_are_not_those_of_the_terms_are_found(of_value: float, of_slopes: float) -> None:
    """As a loss that counts something once a rank."""

    class Repeated(AlphaBeta):
        def finalize(self, sums: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor | None]:
            value, slopes = super().finalize(sums)
            assert slopes is not None
            return of_value * value, of_slopes * slopes

    arguments = VocabShard(0, 300, 300), 300, torch.float32, torch.device("cpu")
    assert wrong_losses(Objective(AlphaBeta(0.2, 0.7)), *arguments) == []
    (wrong,) = wrong_losses(Objective(Repeated(0.2, 0.7)), *arguments)
    assert wrong.startswith("a value of" if of_value == 2.0 else "a gradient of")
    if of_value == 2.0:
        assert "that is 2 times the dense one" in wrong


def test_a_digest_tells_order() -> None:
    tokens = torch.tensor([[5, 7, 9], [1, 2, 3]])
    assert digest(tokens) == digest(tokens.clone())
    assert digest(tokens) != digest(tokens.flip(0))
    assert digest(tokens) != digest(torch.tensor([[6, 6, 9], [1, 2, 3]]))


def test_batches_are_compared() -> None:
    both, first, second = (0, 1), (0,), (1,)
    check_batch([(both, 7), (both, 7), None], [(first, 3), (second, 4), None])
    with pytest.raises(ConfigError, match=r"student's .*ranks 0, 1"):
        check_batch([(both, 7), (both, 8)], [(both, 7), (both, 7)])
    with pytest.raises(ConfigError, match=r"teacher's .*ranks 0, 1"):
        check_batch([(both, 7), (both, 7)], [(both, 7), (both, 8)])
    with pytest.raises(ConfigError, match="tokens in the first step"):
        check_batch([(both, 7), (both, 7)], [(both, 8), (both, 8)])


def test_a_divergence_beyond_fp32_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        for loss, kd_weight in ((0.5 * LARGEST, 1.0), (2 * LARGEST, 0.4), (1e14, 0.0), (2 * LARGEST, 1e-3)):
            check_fp32_range(loss, kd_weight)
        assert not caplog.records
        for loss, kd_weight in ((2 * LARGEST, 1.0), (1.0, 2 * LARGEST), (math.inf, 1.0), (math.nan, 1.0)):
            caplog.clear()
            check_fp32_range(loss, kd_weight)
            assert "raise the temperature" in caplog.text


@pytest.mark.parametrize("temperature", [1.0, TEMPERATURE])
def test_a_job_is_warned_of_a_divergence_beyond_fp32(config: Path, teacher: Path, temperature: float) -> None:
    settings = {
        "teacher.load": teacher,
        "distillation.divergence": "neyman_chi_square",
        "distillation.temperature": temperature,
        "distillation.skip_preflight": "[gradient, batch, teacher_loss]",  # whatever else is left out
        "megatron.pipeline-model-parallel-size": 2,
        "megatron.train-iters": 1,
    }
    for rank in run_job("distill", config, settings, num_ranks=2):
        assert ("fp32 has no digit left" in rank.output) == (temperature == TEMPERATURE), rank.output[-3000:]


def test_a_teacher_is_refused_above_guessing_and_warned_of_near_it(caplog: pytest.LogCaptureFixture) -> None:
    for loss in (math.log(400) + 0.6, math.nan, math.inf):
        with pytest.raises(ConfigError, match="expected a teacher"):
            check_teacher_loss(loss, 400)
    with caplog.at_level(logging.WARNING):
        check_teacher_loss(math.log(400) - 0.2, 400)
        assert not caplog.records
        check_teacher_loss(math.log(400) + 0.4, 400)
    assert "it has learned next to nothing" in caplog.text


def test_a_bad_teacher_of_one_source_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    """A mean over all teachers' tokens would hide it."""
    losses, counted = torch.tensor([[1.0, 2.0], [9.0, math.nan], [7.0, 8.0]]), torch.tensor([[1, 1], [1, 0], [1, 1]])
    sums = sums_by_teacher(losses, counted, torch.tensor([0, 2, 0]), 3)
    assert sums.tolist() == [[18.0, 4.0], [0.0, 0.0], [9.0, 1.0]]
    given = {"student": [], "teachers": [], "kd_loss": None, "vocab_size": 400, "kd_weight": 1.0, "expected_loss": None}
    of_teachers = {"the teacher": 4.5, "the teacher of source 1": None, "the teacher of source 2": 9.0}
    with pytest.raises(ConfigError, match=r"the teacher of source 2's cross entropy on the first step is 9\.000"):
        run_checks(FIRST_STEP_CHECKS, Observed(**given, teacher_losses=of_teachers))
    assert "the teacher of source 1 has no token in the first step" in capsys.readouterr().out


def test_check_runs_the_early_phases() -> None:
    assert {check.phase for check in EARLY_CHECKS} == {Phase.CONFIG, Phase.FILES}
    assert {check.phase for check in CHECKS if check not in EARLY_CHECKS} == {Phase.MODELS, Phase.FIRST_STEP}


def test_a_failed_check_names_the_setting_that_skips_it(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(_: None) -> None:
        raise ConfigError("expected A, got B")

    checks = [
        Check("loss", Phase.CONFIG, lambda _: Finding("something differs", Verdict.WARNING)),
        Check("memory", Phase.MODELS, fail),
    ]
    with pytest.raises(ConfigError, match=r"^expected A, got B; .*distillation\.skip_preflight=\[memory\]$"):
        run_checks(checks, None)
    assert "WARNING: something differs" in capsys.readouterr().out
    assert list(run_checks(checks, None, ["memory"])) == ["loss"]
    with pytest.raises(ConfigError, match=r"^expected A, got B$"):
        run_checks([Check("student's checkpoint", Phase.FILES, fail)], None)
