"""Packed sequences, any lengths, loss masks and context parallelism: all train as the plain form does on one rank.

Through Megatron's models, schedules and gradient reduction: see sequences.py.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from launch import launch
from sequences import CASES

Found = dict[str, dict[str, float]]
SUMS = {"lm loss", "kd loss", "total loss", "teacher lm loss", "kl to teacher", "teacher entropy", "student entropy"}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Found]:
    references = tmp_path_factory.mktemp("sequences") / "references.pt"
    jobs: dict[int, Found] = {}

    def found(num_ranks: int) -> Found:
        if num_ranks not in jobs:
            if num_ranks > 1:
                found(1)  # which leaves the references
            ranks = launch([Path(__file__).with_name("sequences.py"), references], num_ranks)
            for number, rank in enumerate(ranks):
                assert rank.code == 0, f"rank {number} of {num_ranks}:\n{rank.output[-6000:]}"
            (line,) = [line for line in ranks[0].output.splitlines() if line.startswith("FOUND ")]
            jobs[num_ranks] = json.loads(line.removeprefix("FOUND "))
        return jobs[num_ranks]

    return found


@pytest.mark.parametrize(("num_ranks", "case"), [(ranks, case) for ranks, cases in CASES.items() for case in cases])
def test_trains_as_the_plain_form_does(found: Callable[[int], Found], num_ranks: int, case: str) -> None:
    errors = found(num_ranks)[case]
    assert errors.keys() > SUMS
    assert sum(name.startswith("gradient of ") for name in errors) == 4 * 10 + 3 + ("ToDi" in case)
    assert all(worst <= 2e-5 for worst in errors.values()), errors
