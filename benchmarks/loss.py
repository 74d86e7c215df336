"""Time, memory, communication and accuracy of the losses, compared with others: ``python benchmarks/loss.py``.

Contestants, by default on logits of 1024 tokens x 32768 vocabulary columns (over all ranks):

- ours, by each kernel: alpha-beta with cross entropy and metrics, into a buffer and in place; alpha-beta, forward KL,
  ToDi, Jensen-Shannon, both skew KLs, total variation and a sum of three alone;
- Megatron's vocabulary-parallel cross entropy: of one tensor, where a divergence reads two;
- ModelOpt's LogitsKLLoss: a forward KL;
- alpha-beta by autograd, on one rank: in log space, and in textbook form with powers of a softmax;
- the limit: the time to read both logits twice and write one gradient at the speed of a copy.

The row of a contestant that cannot run has the reason. Measured per contestant:

- time: forward, sum and backward to the gradient of the logits; one thread per rank, the slower rank. Every round runs
  every contestant once, in rotating order, so that noise affects all. A ratio is the median over rounds. Logits are
  copied before each run, untimed, because Megatron overwrites fp32 logits. malloc keeps freed memory, as the CUDA
  caching allocator does; fresh pages would cost more than the losses.
- bytes per logit: the peak of torch's CPU allocator during the call, divided by the rank's number of logits. It
  includes the gradient and operator temporaries, not the logits.
- collectives, and the bytes that one rank sends (an all-gather returns this times the ranks). ModelOpt leaves the sum
  of the loss over ranks to its caller; it is not counted.
- errors against the dense fp64 definition, on some rows of the full vocabulary with the student equal to the teacher
  plus noise: relative for the loss, relative to the row's largest element for the gradient. In bf16, rounding of the
  gradient costs up to 2^-8.

Ranks are processes on this machine, over gloo. A table per (dtype, tensor parallel size) goes to stdout, ``loss.json``
and ``loss.png`` to the output directory.
"""

import argparse
import importlib
import importlib.metadata
import json
import math
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import start_processes
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from abkd_megatron import kernels
from abkd_megatron.losses import (
    AlphaBeta,
    Divergence,
    JensenShannon,
    SkewForwardKL,
    SkewReverseKL,
    ToDi,
    TotalVariation,
    WeightedSum,
    reference_cross_entropy,
    reference_divergence,
)
from abkd_megatron.vocab_parallel import VocabShard, vocab_parallel_distillation, vocab_parallel_divergence

BACKENDS = ("eager", "cpp")  # kernels of ours; each adds its rows
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ERROR_ROWS = 16
ENVIRONMENT = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "60000000000",
    "OMP_NUM_THREADS": "1",
    "KINETO_LOG_LEVEL": "99",  # else the profiler reports that there is no GPU
}
MEGATRON = "Megatron cross entropy, one tensor"
MODELOPT = "ModelOpt LogitsKLLoss (forward KL)"
LIMIT = "limit: 4 reads, 1 write"
TEXTBOOK = "autograd, textbook: alpha-beta"
RATIOS = {"x Megatron": MEGATRON, "x ModelOpt": MODELOPT, "x textbook": TEXTBOOK, "x limit": LIMIT}
WIDTHS = (26, 12, 12, 12, 9, 13, 12, 10, 12, 10)  # of what follows a name in the table

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Of student logits, teacher logits [N, 1, columns] and labels [N, 1]: one number a token, of N elements."""
Timer = Callable[[], float]
Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """Of one table."""

    dtype: str
    tensor_parallel: int
    tokens: int
    vocab: int
    rounds: int
    peers: bool = True
    """Whether Megatron's and ModelOpt's losses, slow to import, take part."""


@dataclass(frozen=True)
class Contestant:
    """A loss and its dense fp64 definition, or why there is no loss."""

    name: str
    loss: Loss | None
    reference: Loss | None = None
    is_share: bool = False
    """Whether the loss is this rank's share, to be summed over the ranks."""
    why: str = ""


# ---- the contestants


def dense(divergence: Divergence) -> Loss:
    """The definition of a divergence."""
    return lambda student, teacher, labels: reference_divergence(divergence, student, teacher)


def ours(backend: str, group: dist.ProcessGroup | None) -> list[Contestant]:
    """This package's losses on one of its kernels."""
    alpha_beta = AlphaBeta(0.2, 0.7)

    def several(student: Tensor, teacher: Tensor, labels: Tensor, in_place: bool = False) -> Tensor:
        shard = VocabShard.megatron(student.shape[-1], group)
        logits = student.view_as(student)  # as a model's, no leaf
        terms = vocab_parallel_distillation(logits, teacher, alpha_beta, labels, shard, gradient_in_place=in_place)
        return terms.divergence + terms.cross_entropy

    def in_place(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        return several(student, teacher, labels, in_place=True)

    def dense_several(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        return reference_divergence(alpha_beta, student, teacher) + reference_cross_entropy(student, labels)

    def alone(divergence: Divergence) -> Loss:
        return lambda student, teacher, labels: vocab_parallel_divergence(student, teacher, divergence, tp_group=group)

    def contestant(name: str, loss: Loss, reference: Loss) -> Contestant:
        def on_backend(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
            kernels.use(backend)
            return loss(student, teacher, labels)

        return Contestant(f"ours, {backend}: {name}", on_backend, reference)

    divergences = {
        "alpha-beta": alpha_beta,
        "forward KL": AlphaBeta(1, 0),
        "ToDi": ToDi(),
        "Jensen-Shannon": JensenShannon(),
        "skew forward KL": SkewForwardKL(),
        "skew reverse KL": SkewReverseKL(),
        "total variation": TotalVariation(),
        "both KLs + Jensen-Shannon": WeightedSum(
            [(1, AlphaBeta(1, 0)), (0.5, AlphaBeta(0, 1)), (0.3, JensenShannon())]
        ),
    }
    return [
        contestant("alpha-beta + CE + metrics", several, dense_several),
        contestant("the same, in place", in_place, dense_several),
        *(contestant(name, alone(divergence), dense(divergence)) for name, divergence in divergences.items()),
    ]


def megatron_cross_entropy(world_size: int) -> Loss:
    """Megatron's loss, in Megatron's groups, which ModelOpt's takes too."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=world_size)
    return lambda student, teacher, labels: vocab_parallel_cross_entropy(student, labels)


def modelopt_kl(world_size: int) -> Loss:
    """ModelOpt's loss, up to the reductions over tokens and ranks that its caller does."""
    from megatron.core.transformer import TransformerConfig

    size = world_size  # heads have to divide among the ranks
    config = TransformerConfig(
        num_layers=1, hidden_size=size, num_attention_heads=size, tensor_model_parallel_size=size
    )
    module = importlib.import_module("modelopt.torch.distill.plugins.megatron").LogitsKLLoss(config)
    return lambda student, teacher, labels: module(student, teacher)[0]


def log_space(student: Tensor, teacher: Tensor, labels: Tensor, a: float = 0.2, b: float = 0.7) -> Tensor:
    """Alpha-beta by autograd, from log-probabilities."""
    log_p, log_q = teacher.float().log_softmax(-1), student.float().log_softmax(-1)
    of_p, of_q = torch.exp((a + b) * log_p), torch.exp((a + b) * log_q)
    return -(torch.exp(a * log_p + b * log_q) - a / (a + b) * of_p - b / (a + b) * of_q).sum(-1) / (a * b)


def textbook(student: Tensor, teacher: Tensor, labels: Tensor, a: float = 0.2, b: float = 0.7) -> Tensor:
    """Alpha-beta by autograd, from probabilities."""
    p, q = teacher.float().softmax(-1), student.float().softmax(-1)
    return -(p**a * q**b - a / (a + b) * p ** (a + b) - b / (a + b) * q ** (a + b)).sum(-1) / (a * b)


def peer(
    name: str, build: Callable[[int], Loss], world_size: int, reference: Loss, is_share: bool = False
) -> Contestant:
    """Another package's loss, or why it is not to be had here."""
    try:
        return Contestant(name, build(world_size), reference, is_share)
    except Exception as error:  # importing a large package may raise anything
        return Contestant(name, None, why=f"{type(error).__name__}: {error}".splitlines()[0])


def contestants(world_size: int, group: dist.ProcessGroup | None, peers: bool) -> list[Contestant]:
    """All but the limit, in the table's order."""
    result = [contestant for backend in BACKENDS for contestant in ours(backend, group)]
    if peers:
        result += [
            peer(MEGATRON, megatron_cross_entropy, world_size, lambda s, t, labels: reference_cross_entropy(s, labels)),
            peer(MODELOPT, modelopt_kl, world_size, dense(AlphaBeta(1, 0)), is_share=world_size > 1),
        ]
    for name, loss in (("log space", log_space), ("textbook", textbook)):
        name = f"autograd, {name}: alpha-beta"
        if world_size == 1:
            result.append(Contestant(name, loss, dense(AlphaBeta(0.2, 0.7))))
        else:
            result.append(Contestant(name, None, why="needs the whole vocabulary on one rank"))
    return result


# ---- the measurements, on one rank


@dataclass(frozen=True)
class Batch:
    """Logits [N, 1, columns] and labels [N, 1]."""

    student: Tensor
    teacher: Tensor
    labels: Tensor

    @classmethod
    def random(cls, tokens: int, columns: int, vocab: int, seed: int = 0) -> "Batch":
        """Teacher logits of deviation 2, the student's with noise of deviation 1 on top; fp32."""
        generator = torch.Generator().manual_seed(seed)
        teacher = 2.0 * torch.randn(tokens, 1, columns, generator=generator)
        student = teacher + torch.randn(tokens, 1, columns, generator=generator)
        labels = torch.randint(vocab, (tokens, 1), generator=generator.manual_seed(0))  # every rank's are the same
        return cls(student, teacher, labels)

    def to(self, dtype: torch.dtype, columns: slice = slice(None)) -> "Batch":
        """Some of the columns in a dtype."""
        student, teacher = (x[..., columns].to(dtype).contiguous() for x in (self.student, self.teacher))
        return Batch(student, teacher, self.labels)

    def leaf(self) -> Tensor:
        """A copy of the student's logits, to be differentiated."""
        return self.student.clone().requires_grad_()

    def gradient(self, loss: Loss, leaf: Tensor) -> Tensor:
        """Forward and backward. Not into leaf.grad: a model's logits are no leaf, and some would be copied there."""
        return torch.autograd.grad(loss(leaf, self.teacher, self.labels).sum(), leaf)[0]


class Collectives(TorchDispatchMode):
    """Counts the collectives under it, and the bytes that this rank puts into them."""

    def __init__(self) -> None:
        super().__init__()
        self.found = {"collectives": 0, "bytes": 0}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "c10d" in func.namespace:
            place_of_input = {"c10d::allreduce_": 0, "c10d::_allgather_base_": 1}[func.name()]
            given = args[place_of_input]
            self.found["collectives"] += 1
            self.found["bytes"] += sum(x.nbytes for x in ([given] if isinstance(given, Tensor) else given))
        return func(*args, **(kwargs or {}))


def collectives(loss: Loss, batch: Batch) -> Row:
    """Those of forward and of backward."""
    leaf = batch.leaf()
    with Collectives() as forward:
        total = loss(leaf, batch.teacher, batch.labels).sum()
    with Collectives() as backward:
        torch.autograd.grad(total, leaf)
    return {"forward": forward.found, "backward": backward.found}


def peak_bytes(loss: Loss, batch: Batch) -> int:
    """The most that torch's CPU allocator had handed out at a time since the call."""
    leaf = batch.leaf()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        batch.gradient(loss, leaf)
    with tempfile.TemporaryDirectory() as directory:
        trace = Path(directory, "trace.json")
        profiler.export_chrome_trace(str(trace))
        events = [event for event in json.loads(trace.read_text())["traceEvents"] if event["name"] == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: float(event["ts"])):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


def errors(contestant: Contestant, whole: Batch, dtype: torch.dtype, rank: int, world_size: int) -> Row:
    """Largest of the loss, relative, and of the gradient, relative to its row's largest."""
    assert contestant.loss is not None and contestant.reference is not None
    whole = whole.to(dtype)
    exact = whole.student.double().requires_grad_()
    expected = contestant.reference(exact, whole.teacher, whole.labels).flatten()
    (expected_gradient,) = torch.autograd.grad(expected.sum(), exact)
    width = exact.shape[-1] // world_size
    columns = slice(rank * width, (rank + 1) * width)
    batch = whole.to(dtype, columns)
    leaf = batch.leaf()
    loss = contestant.loss(leaf, batch.teacher, batch.labels).flatten()
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    if contestant.is_share:
        loss = loss.detach()
        dist.all_reduce(loss)
    of_gradient = (gradient - expected_gradient[..., columns]).abs() / expected_gradient.abs().amax(-1, keepdim=True)
    return {"loss error": (loss / expected - 1).abs().max().item(), "gradient error": of_gradient.max().item()}


def seconds(action: Callable[[], Any]) -> float:
    """What the action takes, begun by all ranks together."""
    if dist.is_initialized():
        dist.barrier()
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def loss_timer(loss: Loss, batch: Batch) -> Timer:
    """Of forward and backward."""

    def timer() -> float:
        leaf = batch.leaf()
        return seconds(lambda: batch.gradient(loss, leaf))

    return timer


def limit_timer(batch: Batch) -> Timer:
    """Of 4 reads and 1 write: a copy, which is 1 read and 1 write, takes 2/5 of that."""
    target = torch.empty_like(batch.student)
    return lambda: 5 / 2 * seconds(lambda: target.copy_(batch.student))


def run_rounds(timers: list[tuple[Row, Timer]], rounds: int) -> None:
    """Gives every row the seconds of every round; round 0 only warms up."""
    for index in range(rounds + 1):
        first = index % len(timers)
        for row, timer in timers[first:] + timers[:first]:
            taken = timer()
            row["seconds"] = [*row["seconds"], taken] if index else []
        progress(f"round {index} of {rounds}")


def measure(settings: Settings, rank: int = 0, group: dist.ProcessGroup | None = None) -> list[Row]:
    """The rows of a table, as this rank of the group sees them; without ratios."""
    world_size, dtype = settings.tensor_parallel, DTYPES[settings.dtype]
    few = Batch.random(ERROR_ROWS, settings.vocab, settings.vocab)
    batch = Batch.random(settings.tokens, settings.vocab // world_size, settings.vocab, seed=1 + rank).to(dtype)
    rows: list[Row] = []
    timers: list[tuple[Row, Timer]] = []
    for contestant in contestants(world_size, group, settings.peers):
        row: Row = {"name": contestant.name}
        rows.append(row)
        if contestant.loss is None:
            row["why"] = contestant.why
            continue
        row |= errors(contestant, few, dtype, rank, world_size)
        row |= collectives(contestant.loss, batch)
        row["bytes per logit"] = peak_bytes(contestant.loss, batch) / batch.student.numel()
        timers.append((row, loss_timer(contestant.loss, batch)))
        progress(f"measured {contestant.name}")
    rows.append({"name": LIMIT, "bytes per logit": float(dtype.itemsize)})
    timers.append((rows[-1], limit_timer(batch)))
    run_rounds(timers, settings.rounds)
    return rows


def progress(text: str) -> None:
    """To stderr, from the first rank."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(text, file=sys.stderr, flush=True)


# ---- the ranks and their results


def rank_main(rank: int, settings: Settings, directory: str) -> None:
    """One rank, a process of its own: leaves its rows in the directory."""
    torch.set_num_threads(1)
    world_size = settings.tensor_parallel
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=world_size)
    rows = measure(settings, rank, dist.group.WORLD if world_size > 1 else None)
    Path(directory, f"rows_{rank}.json").write_text(json.dumps(rows))
    dist.barrier()
    dist.destroy_process_group()


def run(settings: Settings) -> list[Row]:
    """The finished rows of a table, from processes of their own."""
    ranks = settings.tensor_parallel
    with tempfile.TemporaryDirectory(prefix="abkd_benchmark_") as directory:
        start_processes(rank_main, (settings, directory), nprocs=ranks, daemon=True, start_method="spawn")
        return finish([json.loads(Path(directory, f"rows_{rank}.json").read_text()) for rank in range(ranks)])


def finish(rows_of_ranks: list[list[Row]]) -> list[Row]:
    """The worst rank's numbers, and the ratios to Megatron's and ModelOpt's losses and to the limit."""
    rows = [dict(row) for row in rows_of_ranks[0]]
    for row, *of_ranks in zip(rows, *rows_of_ranks, strict=True):
        for key in row.keys() & {"bytes per logit", "loss error", "gradient error"}:
            row[key] = max(other[key] for other in of_ranks)
        if "seconds" in row:
            taken = [max(times) for times in zip(*(other["seconds"] for other in of_ranks), strict=True)]
            row |= {"seconds": taken, "median": median(taken), "min": min(taken), "max": max(taken)}
    measured = {row["name"]: row for row in rows if "seconds" in row}
    for row in measured.values():
        for key, name in RATIOS.items():
            if name in measured:
                row[key] = median(x / y for x, y in zip(row["seconds"], measured[name]["seconds"], strict=True))
    return rows


def table(settings: Settings, rows: list[Row]) -> str:
    """Rows as text."""
    heads = ["ms: median (min-max)", *RATIOS, "bytes/logit", "forward", "backward", "loss error", "gradient"]
    text = f"{settings.dtype}, tensor parallel {settings.tensor_parallel}: {settings.tokens} tokens x {settings.vocab}"
    for name, cells in [("", heads), *((row["name"], cells_of(row)) for row in rows)]:
        text += f"\n{name:42}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, WIDTHS, strict=False))
    return text + "\nforward, backward: collectives / bytes that a rank puts into them\n"


def cells_of(row: Row) -> list[str]:
    """What follows the name of a row; of one that did not run, a single text."""
    if "why" in row:
        return [f"  cannot run: {row['why']}"]
    low, middle, high = (1000 * row[key] for key in ("min", "median", "max"))
    return [
        f"{middle:.1f} ({low:.1f}-{high:.1f})",
        *(f"{row[key]:.2f}" if key in row else "-" for key in RATIOS),
        f"{row['bytes per logit']:.2f}",
        *("{collectives} / {bytes}".format(**row[key]) if key in row else "-" for key in ("forward", "backward")),
        *(f"{row[key]:.1e}" if key in row else "-" for key in ("loss error", "gradient error")),
    ]


def picture(runs: list[Row], path: Path) -> None:
    """Time and memory of every contestant in every run, as bars."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [row["name"] for row in runs[0]["rows"]]
    figure, axes = pyplot.subplots(1, 2, figsize=(14, 1.5 + 0.24 * len(names) * len(runs)), sharey=True)
    bar_height = 0.84 / len(runs)
    for axis, key, text, origin in ((axes[0], "x Megatron", "{:.2g}x", 1), (axes[1], "bytes per logit", "{:.1f} B", 0)):
        for index, of_run in enumerate(runs):
            color = pyplot.colormaps["tab20"](index % 20)  # its colors come in pairs, as the runs do
            places = [place + (index - (len(runs) - 1) / 2) * bar_height for place in range(len(names))]
            values = [row.get(key, math.nan) for row in of_run["rows"]]
            label = f"{of_run['dtype']}, TP={of_run['tensor_parallel']}"
            bars = axis.barh(places, values, bar_height, label=label, color=color)
            axis.bar_label(
                bars, ["" if math.isnan(value) else text.format(value) for value in values], padding=2, size=8
            )
            for place, value in zip(places, values, strict=True):
                if math.isnan(value):
                    axis.text(origin, place, " n/a", size=8, verticalalignment="center")
        axis.margins(x=0.1, y=0.01)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_xlabel(f"time of forward and backward, x {MEGATRON}")
    axes[0].set_xscale("log")
    axes[0].axvline(1.0, color="black", linewidth=0.8, linestyle=":")
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    axes[1].set_xlabel("peak bytes a local logit, the gradient included")
    axes[1].legend(loc="lower right")
    figure.suptitle(f"{runs[0]['tokens']} tokens x {runs[0]['vocab']} columns, CPU, 1 thread a rank; less is better")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def machine() -> Row:
    """What the numbers were measured on and with."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    cpu = next((line.partition(":")[2].strip() for line in lines if "model name" in line), platform.processor())
    versions = {"python": platform.python_version()}
    for package in ("torch", "megatron-core", "nvidia-modelopt"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {"cpu": cpu, "cores": os.cpu_count(), "load before": os.getloadavg()[0], "versions": versions}


def main() -> None:
    """Makes every table, the report and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--vocab", type=int, default=32768, help="columns over all ranks")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tensor-parallel", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    given = parser.parse_args()
    if any(given.vocab % ranks for ranks in given.tensor_parallel):
        parser.error(f"--vocab {given.vocab} does not divide into {given.tensor_parallel} equal shards")
    if any(os.environ.get(name) != value for name, value in ENVIRONMENT.items()):
        # malloc and OpenMP read theirs only when a process starts.
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ENVIRONMENT})

    given.out.mkdir(parents=True, exist_ok=True)
    report: Row = {"machine": machine(), "runs": []}
    for dtype in given.dtype:
        for ranks in given.tensor_parallel:
            progress(f"-- {dtype}, tensor parallel {ranks}")
            settings = Settings(dtype, ranks, given.tokens, given.vocab, given.rounds)
            rows = run(settings)
            report["runs"].append({**asdict(settings), "rows": rows})
            print(table(settings, rows), flush=True)
    (given.out / "loss.json").write_text(json.dumps(report, indent=1) + "\n")
    picture(report["runs"], given.out / "loss.png")


if __name__ == "__main__":
    main()
