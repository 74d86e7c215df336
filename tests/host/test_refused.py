"""Bad input ends every rank before the first step, with one clear message and an exit code that is not 0."""

import re
from collections.abc import Mapping
from math import nan
from pathlib import Path

import pytest
import torch
from bad_input import ALONE, CASES, FILES, NO_JOB, TENSORS, decisive, file_of
from launch import launch
from matrix import check_refused, run_refused

from abkd_megatron import AlphaBeta, ToDi, vocab_parallel_divergence
from abkd_megatron.errors import AbkdError
from abkd_megatron.losses.objective import Objective
from abkd_megatron.losses.selection import TokenSelection
from abkd_megatron.vocab_parallel import VocabShard, vocab_parallel_distillation

Ended = Mapping[str, tuple[int, str]]


@pytest.fixture(scope="module")
def places(workspace: Path, config: Path, teacher: Path, spoilt: Path) -> dict[str, Path]:
    """What the settings of the cases name."""
    return {"workspace": workspace, "config": config, "teacher": teacher, "other": spoilt}


@pytest.fixture(scope="module")
def ended(places: dict[str, Path]) -> list[Ended]:
    """How each of `CASES` ended, on each rank of one job."""
    cases = {
        name: [case.job, "--config", str(places["config"]), f"teacher.load={places['teacher']}"]
        + [setting.format(**places) for setting in case.settings]
        for name, case in CASES.items()
    }
    return run_refused(cases, 2, places["workspace"])


@pytest.fixture(scope="module")
def ended_alone(places: dict[str, Path]) -> Ended:
    """How each of `ALONE` and of `FILES` ended, all in one process."""
    cases = {}
    for name, case in ALONE.items():
        environment = case.how.strip("`").split() if case.group == "environment" else []
        words = [setting.format(**places) for setting in case.settings]
        cases[name] = [*NO_JOB, *environment, case.job, *words]
    for name in FILES:
        cases[name] = [*NO_JOB, "show-config", str(file_of(places["workspace"], name))]
    (found,) = run_refused(cases, 1, places["workspace"])
    return found


@pytest.mark.parametrize("name", CASES)
def test_every_rank_says_what_is_wrong(ended: list[Ended], workspace: Path, name: str) -> None:
    case = CASES[name]
    check_refused(ended, name, case.job, case.message)
    said = {decisive(rank[name][1], workspace) for rank in ended}
    assert len(said) == 1, "the ranks say different things"


@pytest.mark.parametrize("name", ALONE)
def test_a_process_says_what_is_wrong(ended_alone: Ended, workspace: Path, name: str) -> None:
    case = ALONE[name]
    code, stderr = ended_alone[name]
    assert code == 2, stderr
    assert "Traceback" not in stderr
    assert re.search(case.message, decisive(stderr, workspace)), stderr


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_no_configuration(ended_alone: Ended, workspace: Path, name: str) -> None:
    _, message = FILES[name]
    exit_code, stderr = ended_alone[name]
    assert exit_code == 2, stderr
    assert re.search(message, decisive(stderr, workspace)), stderr


@pytest.mark.parametrize("name", TENSORS)
def test_the_python_api_says_what_is_wrong(name: str) -> None:
    expression, kind, message = TENSORS[name]
    names = {
        **{"AlphaBeta": AlphaBeta, "ToDi": ToDi, "Objective": Objective, "TokenSelection": TokenSelection},
        **{"VocabShard": VocabShard, "nan": nan, "randn": torch.randn, "zeros": torch.zeros},
        "vocab_parallel_divergence": vocab_parallel_divergence,
        "vocab_parallel_distillation": vocab_parallel_distillation,
    }
    with pytest.raises(AbkdError, match=message) as caught:
        eval(expression, names)
    assert caught.type.__name__ == kind


def test_the_process_ends_with_that_code(config: Path) -> None:
    (rank,) = launch(["-m", "abkd_megatron", "pretrain", "--config", config, "device=cuda"], 1)
    assert rank.code == 2
    assert "error: expected an NVIDIA GPU, found none; set `device: cpu`" in rank.output
