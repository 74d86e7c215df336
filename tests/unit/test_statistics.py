"""The record of the whole vocabulary is the same however the ranks' records come together."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from abkd_megatron import AlphaBeta, ToDi
from abkd_megatron.kernels import eager
from abkd_megatron.kernels.record import Layout
from abkd_megatron.losses import JensenShannon, WeightedSum
from abkd_megatron.vocab_parallel.stats import conclude, merge, pack, shift_max, unpack

LAYOUT = Layout(AlphaBeta(0.2, 0.7), True, 2.0)
MAXIMA = st.sampled_from([0.0, -0.0, 1e-40, -1e-40, 1.5, -1.5, 3e38, -3e38, -math.inf])


def records(maxima: list[list[float]], ids: list[list[int]]) -> torch.Tensor:
    """[R, fields, 1] of student and teacher maxima and their ids; other fields arbitrary."""
    generator = torch.Generator().manual_seed(0)
    made = torch.rand(len(maxima), LAYOUT.size, 1, dtype=torch.float64, generator=generator)
    for record, of_maxima, of_ids in zip(made, maxima, ids, strict=True):
        record[LAYOUT.maxima, 0] = torch.tensor(of_maxima).double()  # of fp32 logits
        record[LAYOUT.tops, 0] = torch.tensor(of_ids).double()
    return made


@settings(deadline=None)
@given(
    st.lists(st.tuples(MAXIMA, MAXIMA, st.integers(0, 2**29 - 1), st.integers(0, 2**29 - 1)), min_size=1, max_size=5)
)
def test_a_reduction_finds_what_a_gathering_does(shards):
    of_ranks = records([shard[:2] for shard in shards], [shard[2:] for shard in shards])
    gathered = merge(of_ranks, AlphaBeta(0.2, 0.7), LAYOUT)
    reduced = unpack(torch.stack([pack(record, LAYOUT) for record in of_ranks]).amax(dim=0), LAYOUT)
    sums = torch.stack([shift_max(record, reduced, AlphaBeta(0.2, 0.7), LAYOUT) for record in of_ranks]).sum(dim=0)
    assert torch.equal(reduced[LAYOUT.maxima], gathered[LAYOUT.maxima])
    assert torch.equal(reduced[LAYOUT.targets], gathered[LAYOUT.targets])
    there = gathered[LAYOUT.maxima].isfinite()
    assert torch.equal(reduced[LAYOUT.tops][there], gathered[LAYOUT.tops][there])
    torch.testing.assert_close(sums, LAYOUT.additive(gathered), rtol=1e-13, atol=0)


def records_of_shards(ranks: int, divergence, layout: Layout) -> torch.Tensor:
    """[R, fields, N] of rows that are ordinary, equal, infinite, NaN, or without a shard in one model or both."""
    generator, width, inf = torch.Generator().manual_seed(ranks), 8, math.inf
    student, teacher = 3 * torch.randn(2, 13, ranks * width, generator=generator)
    student[0, 3], teacher[1, 2], student[2, 4], teacher[3, 1] = math.nan, math.nan, inf, inf
    student[4, :width] = teacher[5, :width] = student[6, :width] = teacher[6, :width] = -inf
    student[7] = student[8] = teacher[8] = student[9, 1:] = -inf
    teacher[10] = student[10]
    labels = torch.randint(0, ranks * width, (13,), generator=generator) if layout.has_labels else None
    made = []
    for rank in range(ranks):
        columns = slice(rank * width, rank * width + (0 if rank == 7 else width))  # the last of 8 has only padding
        shards = student[:, columns], teacher[:, columns], labels, columns.start
        made.append(eager.local_record(*shards, divergence, layout, torch.float32))
    return torch.stack(made)


SUM = WeightedSum([(1.0, AlphaBeta(1, 0)), (0.5, ToDi())])


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("divergence", [AlphaBeta(0.2, 0.7), AlphaBeta(0.5, -0.5), JensenShannon(), SUM], ids=str)
def test_all_ranks_are_merged_as_one_by_one(divergence, ranks):
    for has_labels, temperature in ((True, 1.0), (False, 1.0), (True, 2.0), (False, 2.0)):
        layout = Layout(divergence, has_labels, temperature)
        of_ranks = records_of_shards(ranks, divergence, layout)
        whole = merge(of_ranks, divergence, layout)
        sums = shift_max(of_ranks[0], whole, divergence, layout)
        for record in of_ranks[1:]:
            sums += shift_max(record, whole, divergence, layout)
        bits = (numbers.nan_to_num(nan=7.0).view(torch.int64) for numbers in (layout.additive(whole), sums))
        assert torch.equal(*bits) and torch.equal(layout.additive(whole).isnan(), sums.isnan())


class Launches(TorchDispatchMode):
    """Counts the operators that compute or copy."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        of_result = [result.alias_info for result in func._schema.returns]
        self.count += not all(alias is not None and not alias.is_write for alias in of_result)
        return func(*args, **(kwargs or {}))


def test_launches_hardly_grow_with_the_ranks():
    counts = []
    for ranks in (2, 8):
        of_ranks = torch.rand(ranks, LAYOUT.size, 3, dtype=torch.float64)
        with Launches() as launches:
            conclude(merge(of_ranks, AlphaBeta(0.2, 0.7), LAYOUT), AlphaBeta(0.2, 0.7), LAYOUT)
        counts.append(launches.count)
    assert counts[1] - counts[0] == 6 and counts[0] < 300  # one addition per rank


@pytest.mark.parametrize("has_labels", [True, False])
def test_what_is_packed_is_a_copy(has_labels):
    layout = Layout(AlphaBeta(0.2, 0.7), has_labels, 1.0)
    record = torch.ones(layout.size, 3, dtype=torch.float64)
    packed = pack(record, layout)
    assert packed.is_contiguous()
    packed.zero_()
    assert (record == 1).all()


def test_rebasing_to_its_own_maxima_changes_nothing():
    record = records([[1.5, -0.25]], [[3, 4]])[0]
    same = shift_max(record, record, AlphaBeta(0.2, 0.7), LAYOUT)
    torch.testing.assert_close(same, LAYOUT.additive(record), rtol=1e-15, atol=0)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("has_labels", [True, False])
def test_every_field_is_a_sum_or_found_by_the_largest(has_labels, temperature):
    layout = Layout(AlphaBeta(0.2, 0.7), has_labels, temperature)
    fields = torch.arange(layout.size).unsqueeze(-1)
    others = [fields[at] for at in (layout.maxima, *((layout.targets, layout.tops) if has_labels else ()))]
    sums = layout.additive(fields)
    assert sorted(torch.cat([sums, *others]).flatten().tolist()) == list(range(layout.size))
    again = torch.full_like(fields, -1)
    layout.set_additive(again, sums)
    assert torch.equal(again[sums.flatten()], sums) and (again == -1).sum() == layout.size - len(sums)
