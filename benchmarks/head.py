"""Time and memory of the fused LM head, compared with materialized logits: ``python benchmarks/head.py``.

From hidden states and weights of both models to the gradients of the student's, of the sum over tokens of
mask * (alpha-beta + cross entropy), in fp32. The contestants:

- plain autograd: products, alpha-beta in log space and torch's cross entropy, on one rank;
- materialized: products, then vocab_parallel_distillation; and with the gradient written in place of the logits;
- fused: vocab_parallel_distillation_head, with gradients computed in forward, or from logits recomputed in backward.

The row of a contestant that cannot run has the reason. Measured per contestant:

- time: forward, backward and, on several ranks, the all-reduce of the hidden states' gradient; one thread per rank, the
  slowest rank. Rounds, ratios and malloc are as in loss.py. With more ranks than cores, times are only indicative.
- peak: the peak of torch's CPU allocator during the call, including gradients, excluding hidden states and weights. The
  table also has the prediction of the analytical model.
- error: the largest error of the two gradients, relative to the largest element of the gradient in "materialized".

The figure shows memory on one rank with narrow hidden states, over the vocabulary size and over the tokens.

The analytical model counts operations and bytes of the products, for any sizes. Ranks are processes on this machine,
over gloo. Tables go to stdout, ``head.json`` and ``head.png`` to the output directory.
"""

import argparse
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from loss import ENVIRONMENT, Row, Timer, log_space, machine, progress, run_rounds, seconds
from torch import Tensor
from torch.multiprocessing.spawn import start_processes
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

from abkd_megatron import kernels
from abkd_megatron.losses import AlphaBeta
from abkd_megatron.vocab_parallel import VocabShard, vocab_parallel_distillation
from abkd_megatron.vocab_parallel.fused_head import automatic_chunk_tokens, vocab_parallel_distillation_head

DIVERGENCE = AlphaBeta(0.2, 0.7)
AUTOGRAD = "plain autograd"
MATERIALIZED, IN_PLACE = "materialized", "materialized, in place"
IN_FORWARD, RECOMPUTED = "fused, gradient in forward", "fused, recomputed in backward"
AUTOGRAD_BYTES, MOST_BYTES = 60, 2**33  # of plain autograd: more than a logit takes (44), and what it is allowed
VOCABULARIES, TOKENS = (2**13, 2**15, 2**17, 2**18), (512, 2048, 8192, 32768)  # of the picture
# NVIDIA, H100 Tensor Core GPU data sheet, H100 SXM: bf16 1,979 teraFLOP/s with sparsity, half of it dense; 3.35 TB/s.
RIDGE = 989e12 / 3.35e12
MIB = 2**20
WIDTHS = (24, 11, 11, 11, 11, 9)  # of what follows a name in the main table


@dataclass(frozen=True)
class Settings:
    """Of one table."""

    tensor_parallel: int
    tokens: int
    vocab: int
    hidden: int = 512
    teacher_hidden: int = 1024
    """At least `hidden`."""
    chunk: int | None = None
    """Tokens of a chunk; None lets the head size it."""
    rounds: int = 3
    """0 for memory and errors alone."""

    @property
    def chunk_tokens(self) -> int:
        """Tokens of a chunk of the fused head."""
        of_token = 2 * self.vocab // self.tensor_parallel * 4 * (2 if self.tensor_parallel > 1 else 1)
        return self.chunk or automatic_chunk_tokens(torch.device("cpu"), of_token)


# ---- the contestants


@dataclass(frozen=True)
class Case:
    """What this rank's heads are given, and the mask that multiplies the losses."""

    student_hidden: Tensor
    student_weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    labels: Tensor
    mask: Tensor
    shard: VocabShard

    @classmethod
    def random(cls, settings: Settings, rank: int, group: dist.ProcessGroup | None) -> "Case":
        """Logits of deviation 2, the student's from the first of the teacher's hidden states; a quarter masked."""
        generator = torch.Generator().manual_seed(0)
        width, h, wide = settings.vocab // settings.tensor_parallel, settings.hidden, settings.teacher_hidden
        hidden = torch.randn(settings.tokens, wide, generator=generator)
        weight = torch.randn(settings.vocab, wide, generator=generator)[rank * width : (rank + 1) * width]
        return cls(
            hidden[:, :h].clone().requires_grad_(),
            (weight[:, :h] * (2 / h**0.5)).requires_grad_(),
            hidden,
            weight * (2 / wide**0.5),
            torch.randint(settings.vocab, (settings.tokens,), generator=generator),
            (torch.rand(settings.tokens, generator=generator) < 0.75).float(),
            VocabShard.megatron(width, group),
        )

    def logits(self) -> tuple[Tensor, Tensor]:
        """Both models', [N, V/TP]."""
        return self.student_hidden @ self.student_weight.t(), self.teacher_hidden @ self.teacher_weight.t()

    def gradients(self, head: "Head") -> tuple[Tensor, ...]:
        """Of the student's hidden states and weight, complete on every rank."""
        total = (head(self) * self.mask).sum()
        of_hidden, of_weight = torch.autograd.grad(total, (self.student_hidden, self.student_weight))
        if self.shard.num_ranks > 1:
            dist.all_reduce(of_hidden, group=self.shard.group)
        return of_hidden, of_weight


Head = Callable[[Case], Tensor]
"""The loss of every token, [N]."""


def plain_autograd(case: Case) -> Tensor:
    """As one would write it."""
    student, teacher = case.logits()
    cross_entropy = functional.cross_entropy(student, case.labels, reduction="none")
    return log_space(student, teacher, case.labels) + cross_entropy


def materialized(in_place: bool) -> Head:
    """Products, then the loss."""

    def head(case: Case) -> Tensor:
        terms = vocab_parallel_distillation(
            *case.logits(), DIVERGENCE, case.labels, case.shard, gradient_in_place=in_place
        )
        return terms.divergence + terms.cross_entropy

    return head


def fused(in_forward: bool, chunk: int) -> Head:
    """Both at once."""

    def head(case: Case) -> Tensor:
        return vocab_parallel_distillation_head(
            case.student_hidden,
            case.student_weight,
            case.teacher_hidden,
            case.teacher_weight,
            DIVERGENCE,
            case.labels,
            case.shard,
            token_weights=case.mask if in_forward else None,
            chunk_tokens=chunk,
        )[0]

    return head


def contestants(settings: Settings) -> dict[str, Head | str]:
    """Each head by its name, or why it cannot run."""
    autograd: Head | str = plain_autograd
    if settings.tensor_parallel > 1:
        autograd = "needs the whole vocabulary on one rank"
    elif AUTOGRAD_BYTES * settings.tokens * settings.vocab > MOST_BYTES:
        autograd = "needs more than 8 GiB"
    return {
        AUTOGRAD: autograd,
        MATERIALIZED: materialized(in_place=False),
        IN_PLACE: materialized(in_place=True),
        IN_FORWARD: fused(True, settings.chunk_tokens),
        RECOMPUTED: fused(False, settings.chunk_tokens),
    }


# ---- the measurements, on one rank


def with_peak(action: Callable[[], Any]) -> tuple[Any, int]:
    """What the action returns, and the most bytes that torch's CPU allocator had handed out at a time since."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = action()
    with tempfile.TemporaryDirectory() as directory:
        trace = Path(directory, "trace.json")
        profiler.export_chrome_trace(str(trace))
        events = [event for event in json.loads(trace.read_text())["traceEvents"] if event["name"] == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: float(event["ts"])):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return result, peak


def timer_of(case: Case, head: Head) -> Timer:
    """Of forward and backward."""
    return lambda: seconds(lambda: case.gradients(head))


def measure(settings: Settings, rank: int = 0, group: dist.ProcessGroup | None = None) -> list[Row]:
    """The rows of a table, as this rank of the group sees them."""
    case = Case.random(settings, rank, group)
    expected = case.gradients(materialized(in_place=False))
    rows: list[Row] = []
    timers: list[tuple[Row, Timer]] = []
    for name, head in contestants(settings).items():
        rows.append({"name": name})
        if isinstance(head, str):
            rows[-1]["why"] = head
            continue
        found, rows[-1]["peak"] = with_peak(lambda head=head: case.gradients(head))  # type: ignore[misc]
        pairs = zip(found, expected, strict=True)
        rows[-1]["error"] = max(((x - y).abs().max() / y.abs().max()).item() for x, y in pairs)
        rows[-1]["outputs"] = sum(x.nbytes for x in found)
        timers.append((rows[-1], timer_of(case, head)))
        progress(f"measured {name}")
    if settings.rounds:
        run_rounds(timers, settings.rounds)
    return rows


# ---- the ranks and their results


def rank_main(rank: int, settings: Settings, directory: str) -> None:
    """One rank, a process of its own: leaves its rows in the directory."""
    torch.set_num_threads(1)
    ranks = settings.tensor_parallel
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=ranks)
    rows = measure(settings, rank, dist.group.WORLD if ranks > 1 else None)
    Path(directory, f"rows_{rank}.json").write_text(json.dumps(rows))
    dist.barrier()
    dist.destroy_process_group()


def run(settings: Settings) -> Row:
    """A finished table, from processes of their own."""
    ranks = settings.tensor_parallel
    with tempfile.TemporaryDirectory(prefix="abkd_benchmark_") as directory:
        start_processes(rank_main, (settings, directory), nprocs=ranks, daemon=True, start_method="spawn")
        rows = finish(settings, [json.loads(Path(directory, f"rows_{rank}.json").read_text()) for rank in range(ranks)])
    return {**asdict(settings), "chunk": settings.chunk_tokens, "rows": rows}


def finish(settings: Settings, rows_of_ranks: list[list[Row]]) -> list[Row]:
    """The worst rank's numbers, what was predicted, and the ratios of the times to "materialized"."""
    rows = [dict(row) for row in rows_of_ranks[0]]
    sizes = settings.hidden, settings.teacher_hidden, settings.vocab, settings.tensor_parallel, settings.tokens
    predictions = paper(*sizes, settings.chunk_tokens, bytes_per_element=4)
    for row, *of_ranks in zip(rows, *rows_of_ranks, strict=True):
        for key in row.keys() & {"peak", "error"}:
            row[key] = max(other[key] for other in of_ranks)
        if "peak" in row and row["name"] in predictions:
            predicted = predictions[row["name"]]["peak"]
            row |= {"predicted": predicted, "peak / predicted": row["peak"] / predicted}
        if "seconds" in row:
            taken = [max(times) for times in zip(*(other["seconds"] for other in of_ranks), strict=True)]
            row |= {"seconds": taken, "median": median(taken), "min": min(taken), "max": max(taken)}
    (base,) = (row for row in rows if row["name"] == MATERIALIZED)
    for row in rows:
        if "seconds" in row:
            row["x materialized"] = median(x / y for x, y in zip(row["seconds"], base["seconds"], strict=True))
    return rows


def table(of_run: Row) -> str:
    """A run as text."""
    ranks, cores = of_run["tensor_parallel"], os.cpu_count() or 1
    text = "{tokens} tokens, hidden {hidden} <- {teacher_hidden}, vocabulary {vocab}, tensor parallel ".format(**of_run)
    text += f"{ranks}, chunks of {of_run['chunk']}, fp32"
    text += f"; {ranks} ranks share {cores} cores: times only indicate" if ranks > cores else ""
    heads = ["s: median (min-max)", "x mat'd", "peak MiB", "predicted", "peak/pred.", "error"]
    for name, cells in [("", heads), *((row["name"], cells_of(row)) for row in of_run["rows"])]:
        text += f"\n{name:30}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, WIDTHS, strict=False))
    return text + "\n"


def cells_of(row: Row) -> list[str]:
    """What follows the name of a row; of one that did not run, a single text."""
    if "why" in row:
        return [f"  cannot run: {row['why']}"]
    return [
        "{median:.2f} ({min:.2f}-{max:.2f})".format(**row) if "seconds" in row else "-",
        f"{row['x materialized']:.2f}" if "seconds" in row else "-",
        f"{row['peak'] / MIB:.1f}",
        f"{row['predicted'] / MIB:.1f}" if "predicted" in row else "-",
        f"{row['peak / predicted']:.3f}" if "predicted" in row else "-",
        f"{row['error']:.1e}",
    ]


def picture(panels: dict[str, list[Row]], path: Path) -> None:
    """Peak memory beyond the gradients, of each panel's runs against its key."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(panels), figsize=(12, 4.8), sharey=True)
    other = {"vocab": "tokens", "tokens": "vocab"}
    for axis, (key, runs) in zip(axes, panels.items(), strict=True):
        for index, name in enumerate([row["name"] for row in runs[0]["rows"]]):
            rows = [next(row for row in of_run["rows"] if row["name"] == name) for of_run in runs]
            values = [(row["peak"] - row["outputs"]) / MIB if "peak" in row else math.nan for row in rows]
            sizes = [of_run[key] for of_run in runs]
            axis.plot(sizes, values, f"{'ovxs^'[index]}-", label=name, markersize=9 - index)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        axis.set_xticks([of_run[key] for of_run in runs], [str(of_run[key]) for of_run in runs])
        axis.yaxis.set_major_formatter("{x:g}")
        axis.set_title(f"{other[key]} = {runs[0][other[key]]}", size=10)
        axis.set_xlabel({"vocab": "vocabulary", "tokens": "tokens"}[key])
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("peak MiB, less the two gradients that are returned")
    axes[0].legend(fontsize=8)
    first = next(iter(panels.values()))[0]
    figure.suptitle("LM heads and loss, hidden {hidden} <- {teacher_hidden}, fp32, one rank".format(**first))
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


# ---- on paper


def paper(
    h: int,
    H: int,
    vocab: int,
    tensor_parallel: int,
    tokens: int,
    chunk: int,
    bytes_per_element: int = 2,
    accumulating: bool = False,
) -> dict[str, dict[str, float]]:
    """What each way to the gradients takes on a rank.

    Main memory traffic is of the products alone, as if each read its operands once and wrote its result once: of a
    chunk, or of all tokens where logits exist. Both weights are read for the logits and the student's once more for
    the gradient of the hidden states; the weight's gradient is read and written in fp32.

    Args:
        h: the student's hidden size.
        H: the teacher's.
        vocab: columns over all ranks.
        tensor_parallel: ranks.
        tokens: N.
        chunk: tokens of a chunk of the fused head.
        bytes_per_element: of hidden states, weights and logits.
        accumulating: as if the fused head's products added to the weight's gradient in fp32 themselves. As it is, if
            elements have less than 4 bytes, a chunk's part is written as such elements and read once more.

    Returns:
        By contestant: "flops" a token, the most bytes of "logits" and their gradient, the "peak" of these and of the
        gradients of hidden states and weight, "traffic" in bytes and its "intensity" in FLOP a byte.
    """
    width, chunk, size = vocab // tensor_parallel, min(chunk, tokens), bytes_per_element
    of_chunks = 4 if tensor_parallel > 1 and chunk < tokens else 2  # one chunk is kept while its records travel
    of_hidden, of_weight, of_weight_fp32 = size * h * tokens, size * h * width, 4 * h * width
    rounded = of_weight if size < 4 else 0  # the fp32 gradient, or a chunk's part of it, in the weight's dtype
    part = 0 if accumulating else rounded

    def way(rows: int, logits: int, in_backward: int, is_fused: bool, recomputes: bool = False) -> dict[str, float]:
        times = 1 + recomputes  # both models' logits are formed
        flops = times * 2 * (h + H) * width + 4 * h * width
        traffic = (times * (h + H) + h) * width * size + 2 * of_weight_fp32
        traffic += rows * (times * (2 * width + h + H) + 2 * width + 2 * h) * size
        gradients = of_hidden + (of_weight_fp32 if is_fused else of_weight)
        peaks = [logits * width * size, in_backward * width * size + gradients]
        if is_fused:
            traffic += 2 * part
            peaks = [peaks[0], peaks[1] + part, gradients + rounded]
        named = {"flops": flops, "logits": peaks[0], "peak": max(peaks), "traffic": traffic}
        return {**named, "intensity": rows * flops / traffic}

    return {
        MATERIALIZED: way(tokens, 3 * tokens, tokens, is_fused=False),
        IN_PLACE: way(tokens, 2 * tokens, tokens, is_fused=False),
        IN_FORWARD: way(chunk, of_chunks * chunk, of_chunks * chunk, is_fused=True),
        RECOMPUTED: way(chunk, of_chunks * chunk, 2 * chunk, is_fused=True, recomputes=True),
    }


def smallest_chunk(
    h: int, H: int, vocab: int, tensor_parallel: int, ridge: float = RIDGE, accumulating: bool = False
) -> int | None:
    """The least multiple of 128 that gives the fused head's products, gradient in forward, `ridge` FLOP a byte in bf16.

    None if there is none: the intensity grows with the chunk, but not without limit.
    """

    def intensity(chunk: int) -> float:
        return paper(h, H, vocab, tensor_parallel, chunk, chunk, accumulating=accumulating)[IN_FORWARD]["intensity"]

    return next((chunk for chunk in range(128, 2**17, 128) if intensity(chunk) >= ridge), None)


def on_paper(name: str, h: int, H: int, vocab: int, tensor_parallel: int, tokens: int, chunk: int) -> tuple[Row, str]:
    """The model on paper as a record and as text."""
    vocab = math.ceil(vocab / (128 * tensor_parallel)) * 128 * tensor_parallel  # as Megatron pads it
    sizes = h, H, vocab, tensor_parallel
    ways = paper(*sizes, tokens, chunk)
    text = f"on paper, {name}: h {h}, H {H}, vocabulary {vocab}, tensor parallel {tensor_parallel}, {tokens} tokens, "
    text += f"chunks of {chunk}, bf16; of a rank\n{'':30}"
    text += "".join(f"{head:>13}" for head in ("GFLOP/token", "logits MiB", "peak MiB", "kB/token", "FLOP/byte"))
    for way, of in ways.items():
        text += f"\n{way:30}{of['flops'] / 1e9:>13.3f}{of['logits'] / MIB:>13.1f}{of['peak'] / MIB:>13.1f}"
        text += f"{of['flops'] / of['intensity'] / 1e3:>13.1f}{of['intensity']:>13.0f}"
    record: Row = {"name": name, "h": h, "H": H, "vocab": vocab, "tensor_parallel": tensor_parallel}
    record |= {"tokens": tokens, "chunk": chunk, "ways": ways}
    for accumulating, key in ((False, "as it is"), (True, "accumulating")):
        of_chunk = {
            some: paper(*sizes, tokens, some, accumulating=accumulating)[IN_FORWARD]["intensity"]
            for some in (128, 256, 512, 1024, 2048)
        }
        smallest = smallest_chunk(*sizes, accumulating=accumulating)
        record[key] = {"intensity": {str(some): value for some, value in of_chunk.items()}, "smallest chunk": smallest}
        text += f"\n{IN_FORWARD}, {key}: FLOP/byte " + ", ".join(f"{some}: {x:.0f}" for some, x in of_chunk.items())
        text += f"; an H100's {RIDGE:.0f} from {smallest} on"
    return record, text + "\n"


def main() -> None:
    """Makes every table, the report and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocab", type=int, default=32768, help="columns over all ranks")
    parser.add_argument("--chunk", type=int, help="tokens of a chunk of the fused head; sized by it if left out")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tensor-parallel", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--no-picture", action="store_true", help="nor what is measured for it")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    given = parser.parse_args()
    if any(given.vocab % ranks for ranks in given.tensor_parallel):
        parser.error(f"--vocab {given.vocab} does not divide into {given.tensor_parallel} equal shards")
    if any(os.environ.get(name) != value for name, value in ENVIRONMENT.items()):
        # malloc and OpenMP read theirs only when a process starts.
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ENVIRONMENT})

    given.out.mkdir(parents=True, exist_ok=True)
    kernel = kernels.select(DIVERGENCE, torch.empty(0), torch.empty(0)).name
    report: Row = {"machine": machine(), "kernel": kernel, "runs": [], "paper": [], "memory": {}}
    for ranks in given.tensor_parallel:
        progress(f"-- tensor parallel {ranks}")
        settings = Settings(ranks, given.tokens, given.vocab, chunk=given.chunk, rounds=given.rounds)
        report["runs"].append(run(settings))
        print(table(report["runs"][-1]), flush=True)
    for name, vocab in (("Llama-3 8B <- 70B", 128256), ("the same, a larger vocabulary", 262144)):
        record, text = on_paper(name, 4096, 8192, vocab, tensor_parallel=8, tokens=8192, chunk=1024)
        report["paper"].append(record)
        print(text, flush=True)
    if not given.no_picture:
        small: Row = {"hidden": 64, "teacher_hidden": 128, "chunk": given.chunk, "rounds": 0}
        points = {"vocab": [(512, vocab) for vocab in VOCABULARIES], "tokens": [(tokens, 8192) for tokens in TOKENS]}
        for key, sizes in points.items():
            report["memory"][key] = [run(Settings(1, tokens, vocab, **small)) for tokens, vocab in sizes]
        picture(report["memory"], given.out / "head.png")
    (given.out / "head.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
