"""The distance of hidden states is that of plain autograd, and keeps the two tensors alone for backward."""

import pytest
import torch
from torch import Tensor

from abkd_megatron.student.hidden import hidden_distance

KINDS = ["mse", "cosine"]
SHAPE = (5, 3, 64)


def plain(kind: str, student: Tensor, teacher: Tensor) -> Tensor:
    student, teacher = (of if of.dtype == torch.float64 else of.float() for of in (student, teacher))
    if kind == "mse":
        return (student - teacher).square().mean(-1)
    return 1 - torch.nn.functional.cosine_similarity(student, teacher, dim=-1)


def hidden_states(dtype: torch.dtype, *shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, *(shape or SHAPE), generator=generator, dtype=torch.float64).to(dtype)
    return student.requires_grad_(), teacher


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_the_derivative(kind):
    student, teacher = hidden_states(torch.float64, 3, 2, 7)
    assert torch.autograd.gradcheck(lambda of: hidden_distance(kind, of, teacher), student)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_value_and_gradient_are_those_of_plain_autograd_to_the_bit(kind, dtype):
    student, teacher = hidden_states(dtype)
    student.data[0, 0] = teacher[0, 0]
    student.data[1, 1] = 0.0  # of no direction
    weights = torch.rand(SHAPE[:-1], generator=torch.Generator().manual_seed(1))
    (got, of_got), (wanted, of_wanted) = (
        (value, torch.autograd.grad((value * weights).sum(), student)[0])
        for value in (of(kind, student, teacher) for of in (hidden_distance, plain))
    )
    assert torch.equal(got, wanted) and got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(of_got, of_wanted) and of_got.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_kept_are_the_two_tensors_as_they_are(kind, dtype):
    student, teacher = hidden_states(dtype)

    def kept(distance) -> dict[int, int]:
        storages = {}

        def keep(tensor: Tensor) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            distance(kind, student, teacher).sum()
        return storages

    ours = kept(hidden_distance)
    assert ours == {of.untyped_storage().data_ptr(): of.untyped_storage().nbytes() for of in (student, teacher)}
    if dtype == torch.bfloat16:
        assert sum(ours.values()) <= sum(kept(plain).values()) / (1 if kind == "mse" else 2)


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_without_a_gradient_passes_on_none_whatever_it_holds(kind):
    student, teacher = hidden_states(torch.bfloat16)
    student.data[1, 2], student.data[3, 0] = torch.nan, torch.inf
    mask = torch.ones(SHAPE[:-1])
    mask[1, 2] = mask[3, 0] = 0.0
    torch.where(mask == 0, 0.0, hidden_distance(kind, student, teacher) * mask).sum().backward()
    assert student.grad.isfinite().all()
    assert (student.grad[[1, 3], [2, 0]] == 0).all() and (student.grad[0] != 0).any()
