"""The loss contract: sums over counted tokens, nothing from the others, the same names every time."""

import torch

from abkd_megatron.student.report import LossChecks, Report, masked_loss

UNCHECKED = LossChecks(nan=False)


def test_sums_and_counts() -> None:
    mask = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    total = torch.arange(6.0).view(2, 3).requires_grad_()
    report = {"lm loss": total.detach() / 2, "kd loss": total.detach() * 3}
    loss, num_tokens, sums = masked_loss(mask, total, Report(report, scheduled={"alpha": 0.5}), UNCHECKED)
    assert loss.item() == 0 + 2 + 4
    assert num_tokens.dtype == torch.int and num_tokens.item() == 3
    assert {name: pair.tolist() for name, pair in sums.items()} == {
        "lm loss": [3.0, 3.0],
        "kd loss": [18.0, 3.0],
        "total loss": [6.0, 3.0],
        "alpha": [0.5],
    }
    assert not any(pair.requires_grad for pair in sums.values())
    loss.backward()
    assert torch.equal(total.grad, mask)


def test_losses_between_layers_are_logged_and_their_gradient_is_left_alone() -> None:
    mask, total = torch.tensor([[1.0, 0.0, 1.0]]), torch.ones(1, 3).requires_grad_()
    hidden = {"hidden loss 1-2": (0.5, torch.tensor(8.0)), "hidden loss 2-2": (2.0, torch.tensor(3.0))}
    loss, _, sums = masked_loss(mask, total, Report({"lm loss": total.detach()}, hidden=hidden), UNCHECKED)
    assert {name: pair.tolist() for name, pair in sums.items()} == {
        "lm loss": [2.0, 2.0],
        "hidden loss 1-2": [8.0, 2.0],
        "hidden loss 2-2": [3.0, 2.0],
        "total loss": [2.0 + 0.5 * 8.0 + 2.0 * 3.0, 2.0],
    }
    assert loss.item() == 2.0
    loss.backward()
    assert torch.equal(total.grad, mask)


def test_without_a_teacher_it_is_the_stock_loss() -> None:
    mask, output = torch.rand(2, 5).round(), torch.randn(2, 5)
    loss, _, sums = masked_loss(mask, output, checks=UNCHECKED)
    assert torch.equal(loss, torch.sum(output.view(-1).float() * mask.view(-1)))
    assert list(sums) == ["lm loss"]


def test_a_token_that_does_not_count_poisons_nothing() -> None:
    output = torch.tensor([[1.0, torch.nan, torch.inf]], requires_grad=True)
    loss, num_tokens, _ = masked_loss(torch.tensor([[1.0, 0.0, 0.0]]), output, checks=UNCHECKED)
    loss.backward()
    assert loss.item() == 1 and num_tokens.item() == 1
    assert output.grad.tolist() == [[1.0, 0.0, 0.0]]


def test_no_token_counts() -> None:
    loss, num_tokens, sums = masked_loss(
        torch.zeros(1, 3), torch.ones(1, 3), Report({"lm loss": torch.ones(1, 3)}), UNCHECKED
    )
    assert loss.item() == 0 and num_tokens.item() == 0
    total, number = sums["lm loss"]
    assert total == 0 and 0 < number < 1e-9  # the mean is 0, not NaN


def selected_sums(mask: list[float], selected: list[float]) -> dict[str, list[float]]:
    numbers = torch.tensor([[2.0, 4.0, 6.0, 8.0]])
    report = {"lm loss": numbers, "kd loss": numbers, "teacher entropy": numbers}
    report["selected tokens"] = torch.tensor([selected])
    _, _, sums = masked_loss(
        torch.tensor([mask]), numbers, Report(report, selected_only=("teacher entropy",)), UNCHECKED
    )
    return {name: pair.tolist() for name, pair in sums.items()}


def test_what_is_of_selected_tokens_comes_with_their_number() -> None:
    sums = selected_sums([1.0, 1.0, 1.0, 0.0], [0.0, 1.0, 1.0, 1.0])
    assert sums["lm loss"] == sums["kd loss"] == sums["total loss"] == [12.0, 3.0]
    assert sums["teacher entropy"] == [10.0, 2.0]
    assert sums["selected tokens"] == [2.0, 3.0]


def test_a_micro_batch_without_selected_tokens_changes_no_mean() -> None:
    """Megatron adds up both numbers over micro-batches and ranks, and then divides."""
    some, none = (selected_sums([1.0] * 4, selected) for selected in ([0.0, 1.0, 0.0, 1.0], [0.0] * 4))
    both = torch.tensor(some["teacher entropy"]) + torch.tensor(none["teacher entropy"])
    assert (both[0] / both[1]).item() == 6.0
    nothing = torch.tensor([none["teacher entropy"], none["teacher entropy"]]).sum(dim=0)
    assert (nothing[0] / nothing[1]).item() == 0.0, "not NaN, which would stay in Megatron's average of its log"
    assert none["selected tokens"] == [0.0, 4.0]
