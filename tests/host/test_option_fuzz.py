"""A few of Megatron's options through the fuzz that a person runs over all of them: python option_fuzz.py."""

import argparse
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import option_fuzz
import pytest
from option_fuzz import CONTEXTS, REFUSED, SAME, Case, Fuzz, cases, summary, try_case

from abkd_megatron.config.megatron_args import megatron_options
from abkd_megatron.cpu_backend import MEGATRON_DEFAULTS


def try_in(workspace: Path, case: Case) -> dict[str, Any]:
    return try_case(Fuzz(workspace), case)


@pytest.fixture(scope="module")
def tried(workspace: Path, config: Path, teacher: Path, student: Path) -> Iterator[Callable[[Case], dict[str, Any]]]:
    # In a process of its own, which gets the stand-in for a GPU for good.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield lambda case: pool.submit(try_in, workspace, case).result()


@pytest.fixture(scope="module")
def every() -> dict[str, Case]:
    return {str(case): case for case in cases(megatron_options(), MEGATRON_DEFAULTS)}


def test_every_boolean_and_choice_has_its_values(every: dict[str, Case]) -> None:
    wanted = {
        action.dest
        for action in megatron_options().values()
        if (action.nargs == 0 and action.dest != "help") or action.type is bool or action.choices is not None
    }
    assert len(wanted) > 350
    assert {case.dest for case in every.values()} == wanted
    assert {case.context for case in every.values()} <= set(CONTEXTS)
    assert every["no-rope-fusion=false"].base == "true"  # on a CPU it is there already
    assert every["lr-decay-style=cosine"].base == "linear"
    assert every["moe-router-load-balancing-type=[none]"].base == "[aux_loss]"


def test_an_option_is_rejected(tried: Callable, every: dict[str, Case]) -> None:
    found = tried(every["use-torch-fsdp2=true"])
    assert found["class"] == REFUSED
    assert "torch FSDP2 is not supported" in found["said"]


def test_an_option_trains_to_the_same_losses(tried: Callable, every: dict[str, Case]) -> None:
    case = every["sequence-parallel=true"]
    found = tried(case)
    assert (found["class"], found["layout"]) == (SAME, "TP 2"), found
    assert f"| {SAME} | 1 |" in summary({str(case): found})


def test_what_a_job_says_is_told_from_what_it_dies_of() -> None:
    rank = option_fuzz.Rank
    named = rank(2, "abkd-megatron distill: error: expected A, got B\n", 0.0)
    assert option_fuzz._ended([named], "distill").ended == "rejected"
    died = rank(1, 'Traceback (most recent call last):\n  File "/a/b.py", line 3, in f\nValueError: no\n', 0.0)
    assert option_fuzz._ended([named, died], "distill").said == "exit [2, 1]: ValueError: no @ b.py:3 f"
    killed = rank(-9, "", 0.0)
    assert option_fuzz._ended([killed], "distill").ended == "hang"
    assert isinstance(megatron_options()["bf16"], argparse.Action)
