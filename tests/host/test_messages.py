"""Messages between a teacher's stages: of Megatron's dtype, and at the moment of Megatron's own."""

import copy
import inspect
import re

import pytest
import torch
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.timers import Timers
from megatron.core.transformer import TransformerConfig

from abkd_megatron.teacher.channel import Outbox
from abkd_megatron.teacher.runner import hidden_between_stages


@pytest.mark.parametrize(("fp32_residual", "dtype"), [(False, torch.bfloat16), (True, torch.float32)])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_hidden_states_have_the_dtype_of_the_residual_stream(
    fp32_residual: bool, dtype: torch.dtype, sequence_parallel: bool
) -> None:
    config = TransformerConfig(
        num_layers=2,
        hidden_size=8,
        num_attention_heads=2,
        tensor_model_parallel_size=2,
        pipeline_model_parallel_size=2,
        sequence_parallel=sequence_parallel,
        bf16=True,
        params_dtype=torch.bfloat16,
        pipeline_dtype=torch.bfloat16,
        fp32_residual_connection=fp32_residual,
    )
    shape = (16 // (2 if sequence_parallel else 1), 3, 8)
    assert hidden_between_stages(config, 16, 3, 2) == (shape, dtype)


def test_megatron_announces_its_sends_and_receives_as_expected() -> None:
    """`Outbox` sees them by these timers alone: a new name would leave messages of the teacher behind."""
    names = set(re.findall(r"config\.timers\('([\w-]+)', log_level", inspect.getsource(P2PCommunicator)))
    assert set(Outbox._SENDS) == {name for name in names if re.match("forward-(backward-)?send", name)}
    assert set(Outbox._RECEIVES) == {name for name in names if re.search("forward-(backward-)?recv", name)}


def watched(timers: Timers | None, received: list[str]) -> tuple[TransformerConfig, Outbox]:
    config = TransformerConfig(num_layers=2, hidden_size=8, num_attention_heads=2)
    config.timers = timers
    outbox = Outbox(config, received.append)
    outbox.watch()
    return config, outbox


@pytest.mark.parametrize("log_level", [None, 0, 2])
def test_messages_leave_with_megatrons_send(log_level: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: happened.append("synchronized"))
    timers = None if log_level is None else Timers(log_level, "minmax")
    config, outbox = watched(timers, happened)
    assert outbox.log_level == (log_level or 0)
    outbox.add(lambda: happened.append("sent"))
    for name in ("forward-compute", "backward-send", "forward-recv"):
        config.timers(name, log_level=2).start()
        config.timers(name).stop()
    assert "sent" not in happened and happened.count("forward-recv") == 1
    happened.clear()
    config.timers("forward-send-backward-recv", log_level=2).start()
    # Last, so that nothing synchronizes between it and Megatron's own send.
    assert happened == ["synchronized"] * (log_level == 2) + ["sent"]
    config.timers("forward-send-backward-recv").stop()
    outbox.unwatch()
    assert config.timers is timers


def test_timers_that_megatron_sets_anew_are_watched_again() -> None:
    received: list[str] = []
    config, outbox = watched(Timers(0, "minmax"), received)
    assert copy.deepcopy(config.timers) is config.timers
    for timers in (None, Timers(0, "max"), type(config.timers)()):  # as evaluate() does, and a config read from YAML
        config.timers = timers
        outbox.watch()
        outbox.watch()
        config.timers("forward-recv", log_level=2).start()
        outbox.unwatch()
        assert config.timers is timers
    assert received == ["forward-recv"] * 3
