"""The real Megatron trains the same student through the fused head as through logits that exist.

Four micro-batches a step; chunks that do not divide them; tied and untied output layers, tensor and sequence parallel,
data parallel with overlapped reduction, pipeline parallel, validation. Sequence parallelism, for whose norms Megatron
needs a GPU's kernels, with its output layer alone.
"""

import json
from pathlib import Path

import pytest
from launch import launch, run_job, scalars

NAMES = ("lm loss", "kd loss", "total loss", "kl to teacher", "teacher entropy", "top-1 agreement")
TIED = {
    "megatron.untie-embeddings-and-output-weights": "false",
    "teacher.untie-embeddings-and-output-weights": "true",
}
TP = {"megatron.tensor-model-parallel-size": 2}
DP = {
    "megatron.use-distributed-optimizer": "true",
    "megatron.overlap-grad-reduce": "true",
    "megatron.global-batch-size": 8,
}
PP = {"megatron.pipeline-model-parallel-size": 2}
# (ranks, what differs); each is compared with the materialised run of the same student on one rank.
LAYOUTS = {
    "one rank": (1, {}),
    "TP 2": (2, TP),
    "DP 2": (2, DP),
    "tied": (1, TIED),
    "tied, TP 2 x PP 2": (4, {**TIED, **TP, **PP}),
}


@pytest.fixture(scope="module")
def run(workspace: Path, config: Path, teacher: Path):
    found: dict[str, dict[str, list[float]]] = {}

    def run(name: str, num_ranks: int, overrides: dict) -> dict[str, list[float]]:
        if name not in found:
            tensorboard = workspace / "head" / name.replace(" ", "_")
            common = {"megatron.tensorboard-dir": tensorboard, "teacher.load": teacher, "megatron.seed": 5}
            ranks = run_job("distill", config, {**common, **overrides}, num_ranks=num_ranks)
            how = "materialised" if "wanted" in name else "fused with the loss: chunks of 24 tokens"
            said = [rank.output.count(f"abkd_megatron: LM head {how}") for rank in ranks]
            assert said == [0] * (num_ranks - 1) + [1], ranks[-1].output[-9000:]
            assert ranks[-1].output.count(" kernel (chosen by device)") == 1
            found[name] = scalars(tensorboard)
        return found[name]

    return run


@pytest.fixture(scope="module")
def tied_student(workspace: Path, config: Path) -> Path:
    path = workspace / "tied_student"
    overrides = {"megatron.train-iters": 1, "megatron.save": path, "megatron.save-interval": 1}
    run_job("pretrain", config, {**overrides, "megatron.untie-embeddings-and-output-weights": "false"})
    return path


@pytest.mark.parametrize("layout", LAYOUTS)
def test_trains_as_through_logits(run, student: Path, tied_student: Path, layout: str) -> None:
    num_ranks, overrides = LAYOUTS[layout]
    start = {"megatron.load": tied_student if "tied" in layout else student, "megatron.finetune": "true"}
    tied = TIED if "tied" in layout else {}
    overrides = {**overrides, **start}
    wanted = run("tied wanted" if tied else "wanted", 1, {**tied, **start, "distillation.head": "materialised"})
    fused = {"distillation.head": "fused", "distillation.chunk_tokens": 24}
    got = run(layout, num_ranks, {**overrides, **fused})
    for name in (*NAMES, "grad-norm"):
        assert len(got[name]) == 5
        assert got[name] == pytest.approx(wanted[name], rel=1e-4), name
    for name in NAMES:
        assert got[f"{name} validation"] == pytest.approx(wanted[f"{name} validation"], rel=1e-4), name


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_equals_megatrons_output_layer(num_ranks: int) -> None:
    ranks = launch([Path(__file__).with_name("output_layer.py")], num_ranks)
    for rank in ranks:
        assert rank.code == 0, rank.output[-6000:]
        (line,) = [line for line in rank.output.splitlines() if line.startswith("FOUND ")]
        found = json.loads(line.removeprefix("FOUND "))
        assert len(found) == 3 * (16 if num_ranks > 1 else 8)
        assert all(worst <= 1.0 for worst in found.values()), found
