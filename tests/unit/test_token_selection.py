"""Which tokens are distilled: what the rules pick, where tokens stand under context parallelism, what is refused."""

import pytest
import torch

from abkd_megatron.errors import ConfigError
from abkd_megatron.losses.selection import TokenSelection, positions_here

NAN = float("nan")


def test_every_takes_the_last_of_each_n():
    assert TokenSelection("every", n=4).at(torch.arange(10)).nonzero().flatten().tolist() == [3, 7]
    assert TokenSelection("every", n=2).at(torch.tensor([5, 0, 1])).tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("rule", "wanted"),
    [
        (TokenSelection("teacher_entropy", at_least=1.0), [0, 1, 1, 0]),
        (TokenSelection("teacher_entropy", at_most=1.0), [1, 1, 0, 0]),
        (TokenSelection("teacher_entropy", at_least=0.75, at_most=1.0), [0, 1, 0, 0]),
        (TokenSelection("disagreement"), [1, 0, 1, 0]),
        (TokenSelection("disagreement", kl_at_least=0.5), [0, 1, 1, 0]),
    ],
)
def test_what_the_models_say(rule, wanted):
    metrics = {
        "teacher entropy": torch.tensor([0.5, 1.0, 2.0, NAN]),
        "top-1 agreement": torch.tensor([0.0, 1.0, 0.0, 1.0]),
        "kl to teacher": torch.tensor([0.25, 0.5, 1.0, NAN]),
    }
    assert rule.of(metrics).int().tolist() == wanted
    assert not rule.by_position


def test_a_quantile_is_of_the_counted_tokens_of_a_sequence():
    entropy = torch.tensor([[0.4, 3.0], [0.1, NAN], [0.3, 2.0], [0.2, 1.0], [0.0, 0.5]])
    counted = torch.tensor([[1, 1], [1, 1], [1, 1], [1, 1], [0, 1]]) == 1

    def ranked(low, high, counted=counted):
        rule = TokenSelection("teacher_entropy", quantile=[low, high])
        return rule.ranked(entropy, counted, None).T.int().tolist()

    assert ranked(0.5, 1.0) == [[1, 0, 1, 0, 0], [1, 0, 1, 0, 0]], "four of the second five are numbers"
    assert ranked(0.0, 0.25) == [[0, 1, 0, 0, 0], [0, 0, 0, 0, 1]]
    assert ranked(0.0, 1.0) == [[1, 1, 1, 1, 0], [1, 0, 1, 1, 1]]
    assert ranked(0.0, 0.25, None) == [[0, 1, 0, 0, 1], [0, 0, 0, 0, 1]]
    rule = TokenSelection("teacher_entropy", quantile=[0.15, 1.0])
    assert rule.ranked(torch.rand(100, 3), None, None).sum(0).tolist() == [85] * 3
    assert rule.ranked(torch.rand(4, 1), torch.zeros(4, 1) == 1, None).sum() == 0
    assert rule.described() == {"select": "teacher_entropy", "quantile": [0.15, 1.0]} and rule.by_rank


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"select": "disagreement", "quantile": [0.1, 1.0]}, "no quantile with select: disagreement"),
        ({"select": "teacher_entropy", "quantile": [0.1, 1.0], "at_most": 1.0}, "got both"),
        ({"select": "teacher_entropy", "quantile": [0.1]}, r"\[low, high\], got \[0.1\]"),
        ({"select": "teacher_entropy", "quantile": [0.5, 0.5]}, "0 <= low < high <= 1"),
        ({"select": "teacher_entropy", "quantile": [0.5, 1.5]}, "0 <= low < high <= 1"),
        ({"select": "teacher_entropy", "quantile": [NAN, 1.0]}, "finite"),
        ({"select": "evry", "n": 2}, "unknown select 'evry'; did you mean 'every'"),
        ({"select": "every"}, "n to be a whole number of at least 2, got None: leave the selection out"),
        ({"select": "every", "n": 1}, "n to be a whole number of at least 2, got 1: leave the selection out"),
        ({"select": "every", "n": 0}, "n to be a whole number of at least 2, got 0"),
        ({"select": "every", "n": 2.5}, "n to be a whole number .* got 2.5"),
        ({"select": "every", "n": True}, "n to be a whole number .* got True"),
        (
            {"select": "every", "n": 2, "at_least": 1.0},
            "no at_least with select: every, which takes n, got 1.0; remove",
        ),
        ({"select": "disagreement", "n": 2}, "no n with select: disagreement, which takes kl_at_least"),
        ({"select": "disagreement", "kl_at_least": 0.0}, "kl_at_least to be a finite number above 0, got 0.0"),
        ({"select": "teacher_entropy"}, "at_least or at_most .* got neither; give one"),
        ({"select": "teacher_entropy", "at_least": NAN}, "at_least to be a finite number above 0, got nan"),
        ({"select": "teacher_entropy", "at_most": -1.0}, "at_most to be a finite number above 0, got -1.0"),
        (
            {"select": "teacher_entropy", "at_least": 2.0, "at_most": 1.0},
            "expected at_least <= at_most, got 2.0 and 1.0",
        ),
    ],
)
def test_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        TokenSelection(**arguments)


def test_described_and_shown():
    rule = TokenSelection("teacher_entropy", at_most=1.5)
    assert rule.described() == {"select": "teacher_entropy", "at_most": 1.5}
    assert str(rule) == "select: teacher_entropy, at_most: 1.5"
    assert str(TokenSelection("disagreement")) == "select: disagreement"


@pytest.mark.parametrize(
    ("lengths", "rank", "size", "wanted"),
    [
        ((8,), 0, 1, [0, 1, 2, 3, 4, 5, 6, 7]),
        ((3, 1, 4), 0, 1, [0, 1, 2, 0, 0, 1, 2, 3]),
        ((8,), 0, 2, [0, 1, 6, 7]),
        ((8,), 1, 2, [2, 3, 4, 5]),
        ((4, 8), 0, 2, [0, 3, 0, 1, 6, 7]),
        ((4, 8), 1, 2, [1, 2, 2, 3, 4, 5]),
        ((4, 0, 8), 1, 2, [1, 2, 2, 3, 4, 5]),
        ((24,), 2, 3, [8, 9, 10, 11, 12, 13, 14, 15]),
    ],
)
def test_where_tokens_stand(lengths, rank, size, wanted):
    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    assert positions_here(len(wanted), ends, rank, size).tolist() == wanted
    if len(lengths) == 1:
        assert positions_here(len(wanted), None, rank, size).tolist() == wanted


def test_tokens_after_the_last_end_are_a_sequence_of_their_own():
    ends = torch.tensor([0, 4])
    assert positions_here(7, ends, 0, 1).tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert [positions_here(6, ends, rank, 2).tolist() for rank in (0, 1)] == [[0, 3, 0, 1, 6, 7], [1, 2, 2, 3, 4, 5]]
