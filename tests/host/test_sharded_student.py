"""attach() takes a student in Megatron FSDP or trained by combined 1F1B, and refuses others that it cannot follow."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from launch import launch

from abkd_megatron.errors import ConfigError
from abkd_megatron.losses import AlphaBeta
from abkd_megatron.losses.objective import Objective


def found_by(program: str, num_ranks: int, plain: bool = False) -> dict:
    first, *_ = ranks = launch([Path(__file__).with_name(program)], num_ranks, plain=plain)
    for rank in ranks:
        assert rank.code == 0, rank.output[-6000:]
    (line,) = [line for line in first.output.splitlines() if line.startswith("FOUND ")]
    return json.loads(line.removeprefix("FOUND "))


def test_each_wrapper_is_refused_by_name() -> None:
    found = found_by("sharded.py", 1)
    assert found["Megatron"].startswith("student: expected Megatron FSDP of megatron-core 0.19"), found
    for wrapper in ("torch, by Megatron", "torch", "torch, a layer"):
        assert found[wrapper].startswith("student: torch FSDP2 is not supported: it shards"), found
    for compiled in ("compiled", "compiled in place"):
        assert found[compiled].startswith("student: torch.compile of the whole model is not supported"), found


def test_megatron_fsdp_trains_as_ddp_does() -> None:
    """Losses and gradient norms of three steps on two ranks, at each of its strategies."""
    # A mesh asks its groups for names, which strict ones do not have. There is no message between two ranks here.
    found = found_by("megatron_fsdp.py", 2, plain=True)
    fused, hidden = found.pop("rejected")
    assert "head: fused is not possible (student: the output layer has hooks" in fused
    assert "Megatron FSDP is supported with data parallelism only and losses on logits, got hidden_losses" in hidden
    plain = {", tied" * is_tied: found.pop(f"None{', tied' * is_tied}") for is_tied in (False, True)}
    assert len(found) == 4 and plain[""] != plain[", tied"]
    for name, steps in found.items():
        wanted = plain[", tied" if name.endswith("tied") else ""]
        for step, of_plain in zip(steps, wanted, strict=True):
            assert step == pytest.approx(of_plain, rel=1e-5), name


def test_combined_1f1b_trains_as_the_plain_schedule_does() -> None:
    """Losses and gradients of a step on two expert-parallel ranks, with materialized logits and in the fused head."""
    found = found_by("planned.py", 2)
    hidden, of_teacher = found["rejected"]
    assert "combined 1F1B is supported on one pipeline stage of a GPTModel and with losses on logits" in hidden
    assert of_teacher.startswith("teacher: combined 1F1B, which overlaps expert communication, is not supported")
    for head in ("materialized", "fused"):
        plain, planned = found[f"{head} False"], found[f"{head} True"]
        assert planned["losses"] == plain["losses"] and len(plain["losses"]["kd loss"]) == 3
        assert planned["gradients"] == pytest.approx(plain["gradients"], rel=1e-3)
        assert all(norm > 0 for name, norm in plain["gradients"].items() if "bias" not in name)


@pytest.mark.parametrize("name", ["tp", "pp", "cp", "ep"])
def test_megatron_fsdp_with_model_parallelism_is_refused(name: str) -> None:
    from abkd_megatron.student.wrappers import MegatronFSDP, _check_megatron_fsdp

    groups = {it: SimpleNamespace(size=lambda it=it: 1 + (it == name)) for it in ("tp", "pp", "cp", "ep")}
    wrapper = SimpleNamespace(module=MegatronFSDP.__new__(MegatronFSDP))
    with pytest.raises(ConfigError, match=f"got {name.upper()} 2; remove it, or use-megatron-fsdp"):
        _check_megatron_fsdp(wrapper, Objective(AlphaBeta(1, 0)), SimpleNamespace(**groups), 1)


def test_megatron_fsdp_with_several_teachers_is_refused() -> None:
    from abkd_megatron.student.wrappers import MegatronFSDP, _check_megatron_fsdp

    groups = SimpleNamespace(tp=SimpleNamespace(size=lambda: 1))
    wrapper = SimpleNamespace(module=MegatronFSDP.__new__(MegatronFSDP))
    with pytest.raises(ConfigError, match="got several teachers; remove it, or use-megatron-fsdp"):
        _check_megatron_fsdp(wrapper, Objective(AlphaBeta(1, 0)), groups, 2)
