"""Several teachers by data source train as the dense form in fp64 does, in every layout: see several_teachers.py."""

from collections.abc import Callable
from pathlib import Path

import pytest
from launch import found_per_ranks
from matrix import recorded
from several_teachers import CASES

Found = dict[str, dict[str, float]]
SUMS = {"lm loss", "kd loss", "total loss", "teacher lm loss", "kl to teacher"}


def place(num_ranks: int, name: str) -> tuple[str, str]:
    """Feature and place in the table."""
    case = CASES[num_ranks][name]
    sizes = {"TP": case.tp, "PP": case.pp, "VPP": case.virtual or 1, "DP": num_ranks // (case.tp * case.pp)}
    where = " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1) or "1 rank"
    feature = "several teachers by data source" + ", one of them cached" * (case.cached is not None)
    return feature, where + " with SP" * case.sequence_parallel


PLACES = [place(num_ranks, case) for num_ranks, cases in CASES.items() for case in cases]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Found]:
    references = tmp_path_factory.mktemp("several-teachers") / "references.pt"
    return found_per_ranks(Path(__file__).with_name("several_teachers.py"), references)


@pytest.mark.parametrize(("num_ranks", "case"), [(ranks, case) for ranks, cases in CASES.items() for case in cases])
def test_trains_as_the_dense_form_does(found: Callable[[int], Found], num_ranks: int, case: str) -> None:
    with recorded(*place(num_ranks, case), "equal to the dense form in fp64 on one rank within 2e-5"):
        errors = found(num_ranks)[case]
        assert errors.keys() > SUMS
        assert sum(name.startswith("gradient of ") for name in errors) == 4 * 10 + 3
        assert all(worst <= 2e-5 for worst in errors.values()), errors
