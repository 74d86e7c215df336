"""Packed sequences, any lengths, loss masks and context parallelism: all train as the plain form does on one rank.

Through Megatron's models, schedules and gradient reduction: see sequences.py.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
from launch import found_per_ranks
from matrix import recorded
from sequences import CASES

Found = dict[str, dict[str, float]]
FEATURES = {
    "packed": "packed sequences (thd)",
    "variable": "sequences of any length, `variable_seq_lengths`",
    "masked": "loss masks with empty rows and empty micro-batches",
    "context": "context parallel",
    "packed context": "context parallel, packed sequences",
}
OF_CHUNKS = {"lm loss", "kd loss", "total loss", "teacher lm loss", "chunk log-ratio", "aligned bytes"}
SUMS = {"lm loss", "kd loss", "total loss", "teacher lm loss", "kl to teacher", "teacher entropy", "student entropy"}


def place(num_ranks: int, name: str) -> tuple[str, str]:
    """Feature and place in the table."""
    case = CASES[num_ranks][name]
    sizes = {"TP": case.tp, "PP": case.pp, "CP": case.cp, "DP": num_ranks // (case.tp * case.pp * case.cp)}
    where = " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)
    feature = FEATURES[case.data] + ", divergence on every third token" * bool(case.every)
    feature += ", weights per token" * case.factors
    feature += ", teacher cache" * case.cached
    feature += ", multi-token prediction distilled" * bool(case.heads)
    feature += ", teacher with another tokenizer" * case.chunks
    feature += f", teacher.weights {case.weights}" * (case.weights != "device")
    feature += ", HybridModel `*-` compared with GPTModel" * case.hybrid
    return feature, where or "1 rank"


PLACES = [place(num_ranks, case) for num_ranks, cases in CASES.items() for case in cases]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Found]:
    references = tmp_path_factory.mktemp("sequences") / "references.pt"
    return found_per_ranks(Path(__file__).with_name("sequences.py"), references)


@pytest.mark.parametrize(("num_ranks", "case"), [(ranks, case) for ranks, cases in CASES.items() for case in cases])
def test_trains_as_the_plain_form_does(found: Callable[[int], Found], num_ranks: int, case: str) -> None:
    with recorded(*place(num_ranks, case), "equal to the plain form on one rank within 2e-5"):
        errors = found(num_ranks)[case]
        num_parameters = 4 * 10 + 3 + ("ToDi" in case) + 14 * CASES[num_ranks][case].heads
        assert errors.keys() > (
            OF_CHUNKS if "chunks" in case else SUMS | {"selected tokens"} if "every" in case else SUMS
        )
        assert sum(name.startswith("gradient of ") for name in errors) == num_parameters
        assert all(worst <= 2e-5 for worst in errors.values()), errors
