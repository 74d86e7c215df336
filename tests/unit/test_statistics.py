"""The record of the whole vocabulary is the same however the ranks' records come together."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from abkd_megatron import AlphaBeta
from abkd_megatron.kernels.record import Layout
from abkd_megatron.vocab_parallel.stats import merge, pack, shift_max, unpack

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
