"""A micro-batch's loss has the host wait for a GPU once, to see whether its losses are finite, and nowhere else.

Meta tensors stand for a GPU's (see tests/unit/host_waits.py); the output layers are Megatron's own.
"""

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from megatron.core import rerun_state_machine
from megatron.core.rerun_state_machine import RerunMode, RerunState
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer import TransformerConfig
from torch.testing._internal.distributed import fake_pg

from abkd_megatron import AlphaBeta
from abkd_megatron.cache.record import RecordLayout
from abkd_megatron.losses import AdaptiveKL, Sinkhorn
from abkd_megatron.losses.objective import Objective
from abkd_megatron.losses.selection import TokenSelection, positions_here
from abkd_megatron.student.cached import CachedTeacher
from abkd_megatron.student.head import compute_loss
from abkd_megatron.student.partly_cached import PartlyCachedBatch, compute_partly_cached_loss
from abkd_megatron.student.report import SELECTED, LossChecks, Report, masked_loss
from abkd_megatron.teacher.output_layer import OutputLayer
from abkd_megatron.vocab_parallel import VocabShard
from abkd_megatron.vocab_parallel.teacher_records import BUCKETED_KL, SAMPLED_KL

sys.path.append(str(Path(__file__).parents[1] / "unit"))
from host_waits import GPU, host_waits

SEQUENCE, BATCH, VOCAB, HIDDEN = 24, 2, 512, 16
NAMES = ("lm loss", "kd loss", "akl loss", "sinkhorn loss", "teacher lm loss")


@pytest.fixture(scope="module")
def group():
    dist.Backend.register_backend("silent", fake_pg._create_fake_pg, extended_api=True, devices=["cpu", "meta"])
    dist.init_process_group("silent", store=fake_pg.FakeStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def output_layer(group: dist.ProcessGroup, trained: bool) -> OutputLayer:
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=1,
        params_dtype=torch.bfloat16,
        use_cpu_initialization=True,
        perform_initialization=False,
    )
    layer = ColumnParallelLinear(
        HIDDEN,
        VOCAB,
        config=config,
        init_method=torch.nn.init.normal_,
        bias=False,
        skip_bias_add=False,
        tp_group=group,
    ).to(GPU)
    hidden = torch.empty(SEQUENCE, BATCH, HIDDEN, dtype=torch.bfloat16, device=GPU, requires_grad=trained)
    return OutputLayer(hidden, layer.requires_grad_(trained), None, lambda logits: logits)


OBJECTIVES = {
    "plain": {},
    "every": {"tokens": TokenSelection("every", n=3)},
    "disagreement": {"tokens": TokenSelection("disagreement")},
    "entropy": {"tokens": TokenSelection("teacher_entropy", at_least=1.0)},
    "logit losses": {"logit_losses": ((1.0, AdaptiveKL()), (0.5, Sinkhorn(group=8)))},
    "shared vocabulary": {"shared_vocab": VOCAB - 7},
    "watching": {"kd_weight": 0.0},
}
CASES = [(name, head) for name in OBJECTIVES for head in ("materialized", "fused")]
CASES = [(name, head) for name, head in CASES if head != "fused" or name in ("plain", *list(OBJECTIVES)[1:4])]


@pytest.mark.parametrize("packed", ["one sequence", "packed on the CPU", "packed on the GPU"])
@pytest.mark.parametrize(("name", "head"), CASES)
def test_the_loss_of_a_micro_batch(group, name, head, packed):
    objective = Objective(AlphaBeta(0.2, 0.7), **OBJECTIVES[name])
    student, teacher = output_layer(group, True), output_layer(group, False)
    ends = None if packed == "one sequence" else torch.tensor([0, 10, SEQUENCE])

    def run() -> None:
        ids = torch.zeros(SEQUENCE, BATCH, dtype=torch.int64, device=GPU)
        positions = positions_here(SEQUENCE, ends, 0, 1)
        loss = compute_loss(
            student,
            teacher,
            objective,
            ids,
            torch.ones(SEQUENCE, BATCH, device=GPU),
            VocabShard.megatron(VOCAB, group, VOCAB),
            group,
            lambda logits: logits.float().logsumexp(-1),
            ids,
            positions.to(GPU) if packed == "packed on the GPU" else positions,
            chunk_tokens=8 if head == "fused" else None,
        )
        loss.total.sum().backward()

    waits = host_waits(run)
    found = [wait for wait in waits.found if "the test" not in wait]
    if name == "every" and packed == "packed on the GPU":
        # Where the selected tokens are depends on the lengths of the sequences, which are there.
        (wait,) = found
        assert wait.startswith("copy to the host in /student/head.py")
    else:
        assert found == []
    assert waits.by_chance == [] and waits.launches > 0


@pytest.mark.parametrize("draws", [0, 4])
@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("plain", "materialized"),
        ("plain", "fused"),
        ("every", "fused"),
        ("entropy", "fused"),
        ("watching", "materialized"),
    ],
)
def test_the_loss_of_a_micro_batch_that_is_partly_cached(group, name, head, draws):
    objective = Objective(AlphaBeta(1.0, 0.0), **OBJECTIVES[name])
    student, teacher = output_layer(group, True), output_layer(group, False)
    layout = RecordLayout(VOCAB, 8, draws=draws)
    cache, found = CachedTeacher(layout, "lm"), []

    def run() -> None:
        ids = torch.zeros(SEQUENCE, BATCH, dtype=torch.int64, device=GPU)
        cache.packed = torch.zeros(BATCH, SEQUENCE, layout.bytes_per_token + 1, dtype=torch.uint8, device=GPU)
        side = PartlyCachedBatch.take(teacher, cache, ids[0] == 1, any_cached=True)
        loss = compute_partly_cached_loss(
            *(student, side, objective, ids, torch.ones(SEQUENCE, BATCH, device=GPU)),
            VocabShard.megatron(VOCAB, group, VOCAB),
            group,
            lambda logits: logits.float().logsumexp(-1),
            positions_here(SEQUENCE, None, 0, 1),
            kd_weights=None,
            lm_weights=None,
            chunk_tokens=8 if head == "fused" else None,
            gradient_in_place=False,
        )
        found.extend(loss.numbers(objective))
        loss.total.sum().backward()

    waits = host_waits(run)
    assert [wait for wait in waits.found if "the test" not in wait] == []
    assert waits.by_chance == [] and waits.launches > 0
    assert {"kl to teacher", SAMPLED_KL if draws else BUCKETED_KL, SELECTED} < set(found)


@pytest.fixture
def machine(monkeypatch):
    """Megatron's, in the middle of a run."""
    monkeypatch.setattr(rerun_state_machine, "_GLOBAL_RERUN_STATE_MACHINE", None)
    machine = rerun_state_machine.get_rerun_state_machine()
    machine.set_mode(RerunMode.VALIDATE_RESULTS)
    machine.state, machine.first_iteration_complete = RerunState.INITIAL_RUN, True
    return machine


@pytest.mark.parametrize("spikes", [False, True])
@pytest.mark.parametrize("step", ["first", "later"])
def test_all_losses_are_looked_at_in_one_copy(machine, step, spikes):
    machine.first_iteration_complete = step == "later"
    mask = torch.ones(BATCH, SEQUENCE, device=GPU)
    report = {name: torch.ones(BATCH, SEQUENCE, device=GPU) for name in NAMES}
    hidden = {
        "hidden loss 1-1": (1.0, torch.ones((), device=GPU)),
        "hidden loss 2-2": (1.0, torch.ones((), device=GPU)),
    }

    def run() -> None:
        output = torch.ones(BATCH, SEQUENCE, device=GPU, requires_grad=True)
        loss, _, _ = masked_loss(
            mask, output, Report(report, hidden=hidden, scheduled={"alpha": 0.5}), LossChecks(spikes=spikes)
        )
        loss.backward()

    (wait,) = host_waits(run).found
    assert wait.startswith("copy to the host in /student/loss_guard.py")


@pytest.mark.parametrize(("bad", "what"), [(torch.nan, "NaN"), (torch.inf, "Inf"), (-torch.inf, "Inf")])
def test_of_all_losses_in_one_copy_the_first_that_is_at_fault_is_named(machine, caplog, bad, what):
    fine, faulty = torch.ones(1, 3), torch.tensor([[1.0, bad, 1.0]])
    report = {"lm loss": fine, "teacher lm loss": fine, "kd loss": faulty, "akl loss": fine, "pearson loss": faulty}
    masked_loss(fine, faulty, Report(report))
    assert machine.rerun_requested and machine.failed_validation_call.caller.message == (
        f"found {what} in the pearson loss of a micro-batch"
    )
    (said,) = [record.getMessage() for record in caplog.records if "its sums over tokens" in record.getMessage()]
    assert f"pearson loss is {what} in a micro-batch" in said and "lm loss 3" in said


def test_a_spike_among_losses_in_one_copy(machine, caplog):
    ones = torch.ones(1, 3)
    report = {"lm loss": ones, "kd loss": ones}
    for _ in range(100):
        masked_loss(ones, ones, Report(report), LossChecks(spikes=True))
    assert not machine.rerun_requested
    masked_loss(ones, ones, Report({**report, "kd loss": 11.0 * ones}), LossChecks(spikes=True))
    assert machine.failed_validation_call.caller.message == "found a spike in the kd loss of a micro-batch"
    assert "kd loss is more than 10 times what it was in a micro-batch" in caplog.text
