"""Bad input ends every rank before the first step, with one clear message and an exit code that is not 0.

docs/bad-input.md has what was seen: WRITE_BAD_INPUT=1 writes it, otherwise it is compared.
"""

import os
import re
from collections.abc import Mapping
from math import nan
from pathlib import Path

import pytest
import torch
from bad_input import (
    ALONE,
    CASES,
    FILES,
    NO_JOB,
    PAGE,
    TENSORS,
    Case,
    Row,
    code,
    decisive,
    file_of,
    render,
    settings_shown,
)
from launch import launch
from matrix import check_refused, run_refused

from abkd_megatron import AlphaBeta, ToDi, vocab_parallel_divergence
from abkd_megatron.errors import AbkdError
from abkd_megatron.losses.objective import Objective
from abkd_megatron.losses.selection import TokenSelection
from abkd_megatron.vocab_parallel import VocabShard, vocab_parallel_distillation

ROWS: dict[str, Row] = {}
"""What the tests of this module have found."""
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


def record(name: str, case: Case, said: str, ended: int) -> None:
    ROWS[name] = Row(case.group, name, settings_shown(case), said, str(ended))


@pytest.mark.parametrize("name", CASES)
def test_every_rank_says_what_is_wrong(ended: list[Ended], workspace: Path, name: str) -> None:
    case = CASES[name]
    check_refused(ended, name, case.job, case.message)
    said = {decisive(rank[name][1], workspace) for rank in ended}
    assert len(said) == 1, "the ranks say different things"
    record(name, case, said.pop(), ended[0][name][0])


@pytest.mark.parametrize("name", ALONE)
def test_a_process_says_what_is_wrong(ended_alone: Ended, workspace: Path, name: str) -> None:
    case = ALONE[name]
    code, stderr = ended_alone[name]
    assert code == 2, stderr
    assert "Traceback" not in stderr
    assert re.search(case.message, decisive(stderr, workspace)), stderr
    record(name, case, decisive(stderr, workspace), code)


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_no_configuration(ended_alone: Ended, workspace: Path, name: str) -> None:
    content, message = FILES[name]
    exit_code, stderr = ended_alone[name]
    assert exit_code == 2, stderr
    said = decisive(stderr, workspace)
    assert re.search(message, said), stderr
    shown = code(repr(content)[2:-1]) if content else "nothing"
    ROWS[name] = Row("config", name, f"a file: {shown}", said, str(exit_code))


@pytest.mark.parametrize("name", TENSORS)
def test_the_python_api_says_what_is_wrong(workspace: Path, name: str) -> None:
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
    ROWS[name] = Row("tensors", name, code(expression), " ".join(str(caught.value).split()), kind)


def test_the_process_ends_with_that_code(config: Path) -> None:
    (rank,) = launch(["-m", "abkd_megatron", "pretrain", "--config", config, "device=cuda"], 1)
    assert rank.code == 2
    assert "error: expected an NVIDIA GPU, found none; set `device: cpu`" in rank.output


def test_the_page_is_what_was_found() -> None:
    names = [*CASES, *ALONE, *FILES, *TENSORS]
    assert len(set(names)) == len(names) >= 60
    if len(ROWS) != len(names):
        pytest.skip("needs all of this file, and every test of it to pass")
    document = PAGE.read_text()
    before, mark, rest = document.partition("<!-- bad input -->\n")
    _, end, after = rest.partition("<!-- /bad input -->")
    assert mark and end, f"{PAGE.name} has lost its marks"
    found = before + mark + render({name: ROWS[name] for name in names}) + end + after
    assert "/tmp" not in found
    if os.environ.get("WRITE_BAD_INPUT"):
        PAGE.write_text(found)
    else:
        assert document == found, f"{PAGE.name} is not what was found; WRITE_BAD_INPUT=1 writes it anew"
