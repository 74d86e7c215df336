"""Our head in place of the model's own: equal to the bit, and gone without a trace. See model_output.py."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import launch
from torch import Tensor

from abkd_megatron.errors import HostError
from abkd_megatron.teacher.model import process_output


def test_the_model_is_left_as_it_was() -> None:
    (rank,) = launch([Path(__file__).with_name("model_output.py")], 1)
    assert rank.code == 0, rank.output[-6000:]
    (line,) = [line for line in rank.output.splitlines() if line.startswith("FOUND ")]
    found = json.loads(line.removeprefix("FOUND "))
    assert len(found) == 3 * 10
    assert all(found.values()), [name for name, well in found.items() if not well]


class Config:
    hidden_size, mtp_num_layers = 4, None


class Deaf(torch.nn.Module):
    """Takes an output_processor and does not call it."""

    post_process = True

    def forward(self, input_ids: Tensor, output_processor: Any = None, output_processor_context: Any = None) -> Tensor:
        return input_ids.float()


class Headed(torch.nn.Module):
    """Does not look at post_process."""

    post_process, config = True, Config

    def forward(self, input_ids: Tensor) -> Tensor:
        return input_ids.float()


@pytest.mark.parametrize("model", [Deaf(), Headed()], ids=lambda it: type(it).__name__)
def test_a_head_that_did_not_run_is_an_error(model: Any) -> None:
    """Else a job would train on cross entropy only."""
    handles = process_output(model, lambda args, kwargs: "context", lambda **given: pytest.fail("was called"))
    for _ in range(2):
        with pytest.raises(HostError, match=type(model).__name__):
            model(torch.ones(2, 3, dtype=torch.int64))
        assert model.post_process is True
    for handle in handles:
        handle.remove()
    assert model(torch.ones(2, 3)).sum() == 6
