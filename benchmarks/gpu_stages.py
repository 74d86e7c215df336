"""Stages of ``gpu.py``: ``python benchmarks/gpu_stages.py STAGE --device ... --result FILE``.

A stage writes its numbers, a summary and its problems to FILE, and exits with 1 if there are problems. Under torchrun
all ranks run the stage, and the first one writes FILE with the problems of all ranks.

With ``--device cpu --size tiny`` the same code runs on CPU ranks over gloo, for tests of these scripts. These times are
meaningless.
"""

import argparse
import importlib.util
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import sysconfig
import time
import traceback
import xml.etree.ElementTree
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpu import on_ranks

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Report:
    """What a stage says."""

    numbers: dict[str, Any] = field(default_factory=dict)
    summary: str = ""
    problems: list[str] = field(default_factory=list)
    """Why it has failed, if it has."""
    skipped: str = ""
    """Why it could not run here."""


@dataclass(frozen=True)
class Place:
    """Where a stage runs."""

    device: str
    size: str
    work: Path

    @property
    def is_tiny(self) -> bool:
        """Whether it is only to be seen that the code runs."""
        return self.size == "tiny"

    @property
    def rank(self) -> int:
        """Of this process."""
        return int(os.environ.get("RANK", "0"))

    @property
    def num_ranks(self) -> int:
        """Processes of this stage."""
        return int(os.environ.get("WORLD_SIZE", "1"))


Function = Callable[[Report, Place, argparse.Namespace], None]


# ---- versions


def versions(report: Report, place: Place, given: argparse.Namespace) -> None:
    """What is installed, the GPUs, and how they are connected."""
    import torch

    from abkd_megatron.tools import env

    for part in env.look():
        report.numbers[part.name] = part.found
        print(f"{part.verdict:10} {part.name}: {part.found or '-'}")
        if part.verdict == env.WRONG or (part.required and part.verdict == env.ABSENT):
            report.problems.append(f"{part.name}: {part.found or 'not installed'}; {part.remedy}")
    if place.device == "cuda":
        gpus = []
        for index in range(torch.cuda.device_count()):
            of = torch.cuda.get_device_properties(index)
            gpus.append(
                {"name": of.name, "GiB": round(of.total_memory / 2**30, 1), "capability": f"{of.major}.{of.minor}"}
            )
        report.numbers["GPUs"] = gpus
        for words in (
            ["--query-gpu=driver_version,clocks.max.sm,power.limit,ecc.mode.current", "--format=csv"],
            ["topo", "-m"],
        ):
            said = output_of(["nvidia-smi", *words])
            report.numbers[f"nvidia-smi {words[0]}"] = said.splitlines()
            print(said)
    x = torch.ones(1024, 1024, device=place.device, dtype=torch.bfloat16)
    if (x @ x).float().mean().item() != 1024:
        report.problems.append("a matrix product of ones in bf16 is not what it should be")
    names = ("torch", "CUDA", "NCCL", "triton", "megatron-core", "transformer-engine")
    report.summary = ", ".join(f"{name} {report.numbers.get(name) or 'not here'}".split(", supp")[0] for name in names)


def output_of(command: Sequence[str]) -> str:
    """What a program prints; why not, if it cannot be run."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)


# ---- tests


def tests(report: Report, place: Place, given: argparse.Namespace) -> None:
    """All of tests/gpu."""
    found = place.work / "tests.xml"
    words = ["-m", "pytest", "-q", "-x" if place.is_tiny else "-ra", "--tb=short", f"--junitxml={found}", "tests/gpu"]
    if importlib.util.find_spec("xdist") is not None:  # Triton's compilation, on a CPU, takes most of the time
        words += ["-n", str(min(8, os.cpu_count() or 1))]
    code = subprocess.run([sys.executable, *words], cwd=ROOT).returncode
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    for case in xml.etree.ElementTree.parse(found).iter("testcase"):  # noqa: S314, pytest wrote it just now
        kinds = {child.tag for child in case}
        result = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        counts[result] += 1
        if result == "failed":
            report.numbers.setdefault("failures", []).append(f"{case.get('classname')}::{case.get('name')}")
    report.numbers |= counts
    report.summary = ", ".join(f"{number} {result}" for result, number in counts.items())
    if code != 0:
        report.problems.append(f"pytest ended with {code}")
    if place.device == "cuda" and not counts["passed"]:
        report.problems.append("no test ran")


# ---- kernels

VOCABULARIES = {"full": (128256, 151936), "tiny": (1000,)}  # of Llama 3 and Qwen 2.5
ROWS = {"full": 256, "tiny": 8}
# Of the losses, relative; of the gradient, of the row's largest beyond its rounding to bf16.
LIMIT = 1e-5


def kernel(report: Report, place: Place, given: argparse.Namespace) -> None:
    """A kernel against the dense fp64 definition, on logits in bf16."""
    device = "cpu" if given.kernel == "cpp" else place.device
    if given.kernel == "triton" and device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    import torch

    from abkd_megatron import kernels
    from abkd_megatron.losses import AlphaBeta, ToDi

    if given.kernel == "cpp" and not kernels.cpp.compiler():
        report.skipped = "needs a C++ compiler, found none"
        return
    divergences = [AlphaBeta(0.2, 0.7), ToDi(), AlphaBeta(1, 0), AlphaBeta(0, 1), ToDi(detach=False)]
    if place.is_tiny:
        divergences = divergences[:2]
    group = start_ranks(place)
    kernels.use(given.kernel)
    worst: dict[str, float] = {}
    for vocab in VOCABULARIES[place.size]:
        of_vocab: dict[str, dict[str, float]] = {}
        for divergence in divergences:
            try:
                found = kernel_errors(divergence, vocab, ROWS[place.size], torch.device(device), group)
            except Exception as error:
                if group is not None:  # the other ranks wait for this one
                    raise
                traceback.print_exc()
                report.problems.append(f"V {vocab}, {divergence}: {type(error).__name__}: {first_line(error)}")
                continue
            of_vocab[str(divergence)] = found
            print(f"{given.kernel}, V {vocab}, {divergence}: {found}", flush=True)
            for name, of in found.items():
                worst[name] = larger(worst.get(name, 0.0), of)
                if not of <= LIMIT:
                    report.problems.append(f"V {vocab}, {divergence}: {name} off by {of:.1e}, allowed {LIMIT:.0e}")
        report.numbers[f"V {vocab}"] = of_vocab
    report.numbers |= {"rows": ROWS[place.size], "device": device, "limit": LIMIT}
    report.summary = "largest errors: " + ", ".join(f"{name} {of:.1e}" for name, of in worst.items())


def kernel_errors(divergence: Any, vocab: int, rows: int, device: "torch.device", group: Any) -> dict[str, float]:
    """Largest errors of a loss and its gradient on this rank's columns, in units that `LIMIT` is given in."""
    import torch

    from abkd_megatron.losses import reference_cross_entropy, reference_divergence
    from abkd_megatron.vocab_parallel import VocabShard, vocab_parallel_distillation

    student, teacher, labels = logits(rows, vocab, device)
    rank, num_ranks = (torch.distributed.get_rank(group), group.size()) if group is not None else (0, 1)
    width = vocab // num_ranks
    columns = slice(rank * width, (rank + 1) * width)
    local = student[:, columns].contiguous().requires_grad_()
    shard = VocabShard.megatron(width, group)
    terms = vocab_parallel_distillation(local, teacher[:, columns].contiguous(), divergence, labels, shard)
    (gradient,) = torch.autograd.grad((terms.divergence + 0.5 * terms.cross_entropy).sum(), local)
    worst = {"divergence": 0.0, "cross entropy": 0.0, "gradient": 0.0}
    for first in range(0, rows, 32):  # fp64 and autograd take some 100 bytes a logit
        part = slice(first, first + 32)
        exact = student[part].double().requires_grad_()
        wanted = reference_divergence(divergence, exact, teacher[part]), reference_cross_entropy(exact, labels[part])
        (of_exact,) = torch.autograd.grad((wanted[0] + 0.5 * wanted[1]).sum(), exact)
        for name, got, dense in zip(worst, (terms.divergence, terms.cross_entropy), wanted, strict=False):
            worst[name] = larger(worst[name], (got[part].double() / dense - 1).abs().max().item())
        scale = of_exact.abs().amax(-1, keepdim=True)
        of_exact = of_exact[:, columns]
        # Triton's interpreter cuts off where a GPU rounds.
        cut = 1 if os.environ.get("TRITON_INTERPRET") == "1" else 2
        rounding = torch.finfo(torch.bfloat16).eps / cut * of_exact.abs()
        beyond = ((gradient[part].double() - of_exact).abs() - rounding) / scale
        worst["gradient"] = larger(worst["gradient"], beyond.max().item())
    return worst


def larger(*values: float) -> float:
    """The largest; NaN if one is, which max() may drop."""
    return math.nan if any(map(math.isnan, values)) else max(values)


def logits(rows: int, vocab: int, device: "torch.device") -> "tuple[Tensor, Tensor, Tensor]":
    """Student's and teacher's logits [rows, vocab] in bf16 and labels [rows], the same on every rank."""
    import torch

    generator = torch.Generator(device).manual_seed(0)
    teacher = 2.0 * torch.randn(rows, vocab, generator=generator, device=device)
    student = teacher + torch.randn(rows, vocab, generator=generator, device=device)
    labels = torch.randint(vocab, (rows,), generator=generator, device=device)
    return student.bfloat16(), teacher.bfloat16(), labels


def start_ranks(place: Place) -> Any:
    """The group of this stage's processes; None for one."""
    import torch
    import torch.distributed as dist

    if place.device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if place.num_ranks == 1:
        return None
    dist.init_process_group("nccl" if place.device == "cuda" else "gloo", timeout=timedelta(seconds=60))
    return dist.group.WORLD


def first_line(error: Exception) -> str:
    """Of a message."""
    return (str(error).splitlines() or [""])[0][:300]


# ---- time and memory

TOKENS = {"full": 4096, "tiny": 16}
ROUNDS = {"full": 20, "tiny": 2}
COPY = "copy"


def seconds(action: Callable[[], object], device: str, rounds: int, warm_up: int = 3) -> list[float]:
    """Of every round, on a GPU by its own clock."""
    import torch

    found = []
    for number in range(warm_up + rounds):
        if device == "cuda":
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
            action()
            after.record()
            after.synchronize()
            taken = before.elapsed_time(after) / 1000
        else:
            start = time.perf_counter()
            action()
            taken = time.perf_counter() - start
        if number >= warm_up:
            found.append(taken)
    return found


def peak_bytes(action: Callable[[], object], device: str) -> int | None:
    """The most that was allocated at a time beyond what was before; None on a CPU."""
    import torch

    if device != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    action()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measure(report: Report, name: str, action: Callable[[], object], place: Place) -> dict[str, Any] | None:
    """Median, least and most seconds and the peak of memory, kept in the report; None and why, if it cannot run."""
    import torch

    try:
        action()  # builds kernels
        peak = peak_bytes(action, place.device)
        taken = seconds(action, place.device, ROUNDS[place.size])
    except Exception as error:
        traceback.print_exc()
        report.numbers[name] = {"why": f"{type(error).__name__}: {first_line(error)}"}
        print(f"{name}: cannot run: {error}", flush=True)
        return None
    finally:
        if place.device == "cuda":
            torch.cuda.empty_cache()
    row = {"seconds": statistics.median(taken), "min": min(taken), "max": max(taken), "peak bytes": peak}
    report.numbers[name] = row
    print(f"{name}: {row}", flush=True)
    return row


def loss(report: Report, place: Place, given: argparse.Namespace) -> None:
    """Forward and backward of the losses, of Megatron's cross entropy and ModelOpt's loss, and a plain copy."""
    import torch

    group = start_ranks(place)
    import roofline
    from loss import (
        DTYPES,
        MEGATRON,
        MODELOPT,
        log_space,
        megatron_cross_entropy,
        modelopt_kl,
        ours,
    )

    vocab = VOCABULARIES[place.size][0]
    width, tokens = vocab // place.num_ranks, TOKENS[place.size]
    with torch.device(place.device):
        torch.manual_seed(1 + place.rank)
        teacher = (2 * torch.randn(tokens, 1, width)).to(DTYPES["bf16"])
        student = (teacher + torch.randn(tokens, 1, width)).to(DTYPES["bf16"])
        torch.manual_seed(0)
        labels = torch.randint(vocab, (tokens, 1))
    leaf = student.requires_grad_()

    def of(loss: Callable[..., Any], copied: bool = False) -> Callable[[], object]:
        def action() -> None:
            logits = leaf.detach().clone().requires_grad_() if copied else leaf
            torch.autograd.grad(loss(logits, teacher, labels).sum(), logits)

        return action

    copy = measure_copy(report, student.detach(), place)
    clone = measure(report, "clone", lambda: student.detach().clone(), place)
    contestants: dict[str, Callable[[], Callable[[], object]]] = {}
    names = ("eager",) if place.device == "cpu" else ("triton", "eager")
    for name in names:
        for one in ours(name, group):
            assert one.loss is not None
            if name != names[0] and "alpha-beta + CE" not in one.name:
                continue
            # In place it overwrites the logits, so each round has a copy of them; its time is taken off below.
            in_place = "in place" in one.name
            contestants[one.name] = lambda loss=one.loss, in_place=in_place: of(loss, in_place)  # type: ignore[misc]

    def fused() -> Callable[[], object]:
        from megatron.core import parallel_state
        from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy

        tp = parallel_state.get_tensor_model_parallel_group()
        return of(lambda student, teacher, labels: fused_vocab_parallel_cross_entropy(student, labels, tp))

    def with_megatron() -> Callable[[], object]:
        if not torch.distributed.is_initialized():
            backend, where = "nccl" if place.device == "cuda" else "gloo", f"file://{place.work / 'store of loss'}"
            (place.work / "store of loss").unlink(missing_ok=True)
            torch.distributed.init_process_group(backend, init_method=where, rank=0, world_size=1)
        return of(megatron_cross_entropy(place.num_ranks))

    fused_name = "Megatron fused cross entropy, one tensor"
    contestants |= {
        MEGATRON: with_megatron,
        fused_name: fused,
        MODELOPT: lambda: of(modelopt_kl(place.num_ranks)),
    }
    if place.num_ranks == 1:
        contestants["autograd, log space: alpha-beta"] = lambda: of(log_space)
    for name, build in contestants.items():
        try:
            action = build()
        except Exception as error:  # importing a large package may raise anything
            report.numbers[name] = {"why": f"{type(error).__name__}: {first_line(error)}"}
            print(f"{name}: cannot run: {error}", flush=True)
            continue
        row = measure(report, name, action, place)
        if row is None:
            continue
        if "in place" in name and clone is not None:
            row["seconds"] -= clone["seconds"]
            row["note"] = "less the time of the clone that it is given"
        if (expected := roofline.predicted_of(name, tokens * width)) is not None:
            row["predicted seconds on an H100"] = expected
        # Two reads of both logits and a gradient written: what any such loss has to move.
        row["x copy limit"] = row["seconds"] / (2.5 * copy["seconds"])
    ratios(report, {"x Megatron": MEGATRON, "x Megatron fused": fused_name, "x ModelOpt": MODELOPT})
    ours_first = f"ours, {names[0]}: alpha-beta + CE + metrics"
    report.numbers["sizes"] = {"tokens": tokens, "vocab": vocab, "ranks": place.num_ranks, "dtype": "bf16"}
    if "seconds" not in report.numbers[ours_first]:
        report.problems.append(f"{ours_first}: {report.numbers[ours_first]['why']}")
        return
    found = report.numbers[ours_first]
    shown = {"x copy limit": "copy limit", "x Megatron fused": "Megatron's fused CE", "x ModelOpt": "ModelOpt's KL"}
    parts = [f"{found[key]:.2f} x {name}" for key, name in shown.items() if key in found]
    report.summary = f"{tokens} x {vocab}: {found['seconds'] * 1e3:.2f} ms = " + " = ".join(parts)
    report.summary += f"; copy {report.numbers[COPY]['GB/s']:.0f} GB/s"
    for name, row in report.numbers.items():
        if "predicted seconds on an H100" in row:
            expected = row["predicted seconds on an H100"] * 1e3
            report.summary += f"; {name}: {row['seconds'] * 1e3:.2f} ms, predicted for an H100 {expected:.2f}"
    absent = [f"{name} cannot run ({row['why']})" for name, row in report.numbers.items() if "why" in row]
    report.summary = "; ".join([report.summary, *absent])


def tiles(report: Report, place: Place, given: argparse.Namespace) -> None:
    """Time of each candidate tile of the Triton kernels, and the rows that it gives for kernels/tiles.py."""
    if place.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    import torch

    from abkd_megatron.kernels import tiles as table
    from abkd_megatron.kernels import triton as kernel
    from abkd_megatron.kernels.record import Layout
    from abkd_megatron.losses import AlphaBeta

    architecture = None
    if place.device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        architecture = 10 * major + minor
    divergence, rows = AlphaBeta(0.2, 0.7), TOKENS[place.size]
    layout, scalars = Layout(divergence, True, 1.0), torch.zeros(6, rows, dtype=torch.float64, device=place.device)
    weight, labels = torch.ones(rows, device=place.device), torch.zeros(rows, dtype=torch.int64, device=place.device)
    vocab = VOCABULARIES[place.size][0]
    found: list[str] = []
    for dtype, columns in ((dtype, vocab // ranks) for dtype in (torch.bfloat16, torch.float32) for ranks in (8, 1)):
        student, teacher, out = torch.randn(3, rows, columns, dtype=dtype, device=place.device)

        def record() -> None:
            kernel.local_record(student, teacher, labels, 0, divergence, layout, torch.float32)  # noqa: B023

        def gradient() -> None:
            pair = out, student, teacher  # noqa: B023
            kernel.local_gradient(*pair, labels, 0, divergence, 1.0, torch.float32, scalars, weight, weight)

        for name, action in (("record", record), ("gradient", gradient)):
            key = name, architecture, dtype.itemsize, columns
            before = table.MEASURED.get(key)
            taken: dict[table.Tile, float] = {}
            for candidate in table.CANDIDATES[name][: 2 if place.is_tiny else None]:
                table.MEASURED[key] = candidate
                row = measure(report, f"{name}, {dtype}, {columns} columns, {candidate}", action, place)
                if row is not None:
                    taken[candidate] = row["seconds"]
            del table.MEASURED[key]
            if before is not None:
                table.MEASURED[key] = before
            if not taken:
                report.problems.append(f"{name}, {dtype}, {columns} columns: no tile runs")
                continue
            best = min(taken, key=lambda candidate: taken[candidate])
            found.append(f"{key}: {best},")
            print(found[-1], flush=True)
    report.numbers["rows of MEASURED in kernels/tiles.py"] = found
    report.summary = f"{len(found)} rows for kernels/tiles.py"


def measure_copy(report: Report, source: "Tensor", place: Place) -> dict[str, Any]:
    """The speed that everything else is held against.

    Raises:
        RuntimeError: if not even a copy can be made.
    """
    import torch

    target = torch.empty_like(source)
    row = measure(report, COPY, lambda: target.copy_(source), place)
    if row is None:
        raise RuntimeError(f"a plain copy of {source.nbytes} bytes cannot run: {report.numbers[COPY]['why']}")
    row["GB/s"] = 2 * source.nbytes / row["seconds"] / 1e9
    return row


def ratios(report: Report, to: Mapping[str, str]) -> None:
    """Adds to every row its time over others'."""
    for row in report.numbers.values():
        for key, name in to.items():
            other = report.numbers.get(name, {})
            if "seconds" in row and "seconds" in other:
                row[key] = row["seconds"] / other["seconds"]


HIDDEN = {"full": (2048, 4096), "tiny": (16, 32)}
HEAD_TOLERANCE = 2e-2  # of the gradient's largest element: in bf16 the products of chunks are rounded apart


def head(report: Report, place: Place, given: argparse.Namespace) -> None:
    """From hidden states to gradients: logits that exist, and the fused head."""
    import torch
    from head import IN_FORWARD, IN_PLACE, MATERIALIZED, RECOMPUTED, Case, fused, materialized
    from loss import DTYPES

    from abkd_megatron.vocab_parallel import VocabShard
    from abkd_megatron.vocab_parallel.fused_head import automatic_chunk_tokens, bytes_per_token

    start_ranks(place)
    vocab, tokens, (h, wide) = VOCABULARIES[place.size][0], TOKENS[place.size], HIDDEN[place.size]
    with torch.device(place.device):
        torch.manual_seed(0)
        bf16 = DTYPES["bf16"]
        hidden, weight = torch.randn(tokens, wide), torch.randn(vocab, wide)
        case = Case(
            hidden[:, :h].to(bf16).contiguous().requires_grad_(),
            (weight[:, :h] * (2 / h**0.5)).to(bf16).contiguous().requires_grad_(),
            hidden.to(bf16),
            (weight * (2 / wide**0.5)).to(bf16),
            torch.randint(vocab, (tokens,)),
            (torch.rand(tokens) < 0.75).float(),
            VocabShard.megatron(vocab),
        )
        del hidden, weight
    of_token = bytes_per_token(case.student_weight, case.shard)
    chunk = 4 if place.is_tiny else automatic_chunk_tokens(case.student_weight.device, of_token)
    heads = {
        MATERIALIZED: materialized(in_place=False),
        IN_PLACE: materialized(in_place=True),
        IN_FORWARD: fused(True, chunk),
        RECOMPUTED: fused(False, chunk),
    }
    expected = case.gradients(heads[MATERIALIZED])
    for name, one in heads.items():
        row = measure(report, name, lambda one=one: case.gradients(one), place)  # type: ignore[misc]
        if row is None:
            report.problems.append(f"{name}: {report.numbers[name]['why']}")
            continue
        pairs = zip(case.gradients(one), expected, strict=True)
        row["error"] = larger(*(((x - y).abs().max() / y.abs().max()).item() for x, y in pairs))
        # The student's product thrice, the teacher's once; a fourth time where logits are formed again.
        again = (h + wide) if name == RECOMPUTED else 0
        row["TFLOP/s"] = 2 * tokens * vocab * (3 * h + wide + again) / row["seconds"] / 1e12
        if not row["error"] <= HEAD_TOLERANCE:
            report.problems.append(f"{name}: gradients off by {row['error']:.1e}, allowed {HEAD_TOLERANCE:.0e}")
    ratios(report, {"x materialized": MATERIALIZED})
    report.numbers["sizes"] = {"tokens": tokens, "vocab": vocab, "h": h, "H": wide, "chunk": chunk, "dtype": "bf16"}
    row, other = report.numbers[IN_FORWARD], report.numbers[MATERIALIZED]
    if "seconds" in row and "seconds" in other:
        report.summary = f"fused {row['seconds'] * 1e3:.1f} ms = {row['x materialized']:.2f} x materialized"
        if row["peak bytes"] is not None:
            report.summary += f", {row['peak bytes'] / 2**20:.0f} MiB against {other['peak bytes'] / 2**20:.0f}"


# ---- training, through the package's own command line

SHAPE = {
    "position-embedding-type": "rope",
    "normalization": "RMSNorm",
    "swiglu": True,
    "disable-bias-linear": True,
    "untie-embeddings-and-output-weights": True,
    "lr-decay-style": "constant",
    "log-interval": 1,
    "eval-interval": 1000,
    "eval-iters": 0,
    "ckpt-format": "torch_dist",
    "bf16": True,
    "attention-dropout": 0.0,
    "hidden-dropout": 0.0,
    "no-create-attention-mask-in-dataloader": True,
    "num-workers": 0,
    "distributed-timeout-minutes": 1,
}
# (layers, hidden size, feed-forward size, heads)
STUDENT = {"full": (4, 256, 512, 4), "tiny": (4, 32, 64, 4)}
TEACHER = {"full": (4, 384, 768, 6), "tiny": (4, 48, 96, 4)}
TRAINING = {
    "full": {"seq-length": 256, "max-position-embeddings": 256, "micro-batch-size": 2, "global-batch-size": 16},
    "tiny": {"seq-length": 32, "max-position-embeddings": 32, "micro-batch-size": 2, "global-batch-size": 8},
}
RATE = {"full": 1e-3, "tiny": 1e-2}
VOCABULARY = {"full": 2000, "tiny": 400}  # both are padded alike at TP 1 and 2
STEPS = {"full": 10, "tiny": 3}  # as in tests/host/matrix.py; after more of them rounding shows
TEACHER_STEPS = {"full": 60, "tiny": 6}
COMPARED = ("lm loss", "kd loss", "total loss", "grad norm")
TOLERANCE = 2e-2  # as tests/host/matrix.py allows bf16


def model(of: tuple[int, int, int, int]) -> dict[str, int]:
    """A model's arguments."""
    return dict(zip(("num-layers", "hidden-size", "ffn-hidden-size", "num-attention-heads"), of, strict=True))


def spec_settings(spec: str, device: str) -> dict[str, object]:
    """Megatron's arguments for a layer spec, with no more than what is installed; packed: TransformerEngine's."""
    from abkd_megatron import cpu_backend
    from abkd_megatron.tools import env

    if device == "cpu":
        return {}  # the stand-in brings its own
    if spec == "local":
        # Nothing fused: with neither TransformerEngine nor apex.
        ranks_and_data = ("distributed-backend", "use-cpu-initialization", "num-workers")
        return {name: value for name, value in cpu_backend.MEGATRON_DEFAULTS.items() if name not in ranks_and_data}
    found = {part.name: part.verdict for part in env.look()}
    apex = found["NVIDIA apex"] == env.OK
    settings = {"transformer-impl": "transformer_engine"} | ({} if apex else {"no-gradient-accumulation-fusion": True})
    return settings | ({"dataloader-inter-document-masking": True, "micro-batch-size": 1} if spec == "packed" else {})


class JobFailed(Exception):
    """A job of the command line has ended badly; its last lines have been printed."""


def run_job(job: str, settings: Mapping[str, object], place: Place, ranks: int = 1) -> str:
    """One job of the command line; the output of its ranks, one after the other."""
    command, logs = [sys.executable], place.work / "ranks"
    if job != "prepare":
        shutil.rmtree(logs, ignore_errors=True)
        # A file for each rank, since their lines run into each other on one pipe; and all of it to the stage's own
        # output as it comes, which is kept if the stage is killed.
        command = on_ranks(ranks, sys.executable, "--log-dir", str(logs), "--tee", "3")
    command += ["-m", "abkd_megatron", job, *(f"{key}={text(value)}" for key, value in settings.items())]
    print(f"\n$ {' '.join(command[1:])}", flush=True)
    code = subprocess.run(command, cwd=ROOT, stderr=subprocess.STDOUT).returncode
    files = sorted(logs.glob("*/attempt_0/*/*.log"))
    output = "\n".join(file.read_text(errors="replace") for file in files)
    if code != 0:
        raise JobFailed(f"{job} over {ranks} rank{'s' if ranks > 1 else ''}: {cause(output)}")
    return output


def cause(output: str) -> str:
    """Why a job ended: this package's own last line about it, else an exception's, else the last one."""
    for pattern in (r"^.*\babkd-megatron \w+: .+$", r"^[\w.]*(?:Error|Exception)\b.*$", r"^.*\S.*$"):
        if said := re.findall(pattern, output, re.MULTILINE):
            return str(said[-1]).strip()[:500]
    return "it said nothing"


def text(value: object) -> str:
    """A value as YAML has it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def of_megatron(*settings: Mapping[str, object]) -> dict[str, object]:
    """All of them as keys of the section."""
    return {f"megatron.{key}": value for some in settings for key, value in some.items()}


def data(report: Report, place: Place, given: argparse.Namespace) -> None:
    """Part of the Python standard library as a tokenizer and Megatron's datasets."""
    library = Path(sysconfig.get_path("stdlib"))
    folders = [library / name for name in (("email",) if place.is_tiny else ("email", "asyncio", "unittest", "http"))]
    prepared = place.work / "data"
    shutil.rmtree(prepared, ignore_errors=True)
    settings = {
        "device": place.device,
        "data.source": f"[{','.join(map(str, folders))}]",
        "data.dir": prepared,
        "data.vocab_size": VOCABULARY[place.size],
        "data.held_out": 0.2,
    }
    run_job("prepare", settings, place)
    report.numbers["bytes"] = sum(file.stat().st_size for file in prepared.rglob("*") if file.is_file())
    report.summary = f"{report.numbers['bytes'] / 1e6:.1f} MB"


def train(report: Report, place: Place, given: argparse.Namespace) -> None:
    """A distill job: on one rank what losses do, on several that they are one rank's."""
    base = {"device": place.device, "data.dir": place.work / "data"}
    base |= of_megatron(SHAPE, TRAINING[place.size], spec_settings(given.spec, place.device), {"lr": RATE[place.size]})
    teacher, student = (place.work / f"{given.spec} {name}" for name in ("teacher", "student"))
    if given.ranks == 1:
        for name, folder, sizes, steps in (
            ("teacher", teacher, TEACHER, TEACHER_STEPS[place.size]),
            ("student", student, STUDENT, 1),
        ):
            shutil.rmtree(folder, ignore_errors=True)
            saved = {"train-iters": steps, "save": folder, "save-interval": steps, "seed": 7}
            losses = of_steps(run_job("pretrain", base | of_megatron(model(sizes[place.size]), saved), place))
            report.numbers[f"{name}'s lm loss"] = losses["lm loss"]
    settings = {
        **base,
        **of_megatron(
            model(STUDENT[place.size]), {"train-iters": STEPS[place.size], "load": student, "finetune": True}
        ),
        "teacher.load": teacher,
        **{f"teacher.{key}": value for key, value in model(TEACHER[place.size]).items()},
        "distillation.head": "fused",
        "distillation.chunk_tokens": 24,  # does not divide a micro-batch
        **dict(word.split("=", 1) for word in given.settings),
    }
    output = run_job("distill", settings, place, given.ranks)
    found = of_steps(output)
    report.numbers |= {"steps": found, "ranks": given.ranks}
    report.problems += problems_of_steps(found, STEPS[place.size])
    report.problems += problems_of_head(output)
    reference = place.work / f"{given.spec}.json"
    if given.ranks == 1:
        reference.write_text(json.dumps(found))
        if found["kd loss"] and not found["kd loss"][-1] < found["kd loss"][0]:
            report.problems.append(f"kd loss does not fall: {found['kd loss']}")
    elif reference.exists():
        report.numbers["largest differences"], problems = compared(found, json.loads(reference.read_text()))
        report.problems += problems
    else:
        report.problems.append("the same on one GPU, to compare with, is not there")
    if found["kd loss"]:
        report.summary = (
            f"kd loss {found['kd loss'][0]:.4f} -> {found['kd loss'][-1]:.4f} in {len(found['kd loss'])} steps"
        )
    if differences := report.numbers.get("largest differences"):
        report.summary += f"; off one GPU's by at most {max(differences.values()):.1e}"


def of_steps(output: str) -> dict[str, list[float]]:
    """What Megatron logs of every training step, by name; its second line has the mean of the first two losses."""
    found: dict[str, list[float]] = {name: [] for name in COMPARED}
    for line in re.findall(r"^ \[[^]\n]+\] iteration +\d+/ *\d+ \|.*$", output, re.MULTILINE):
        for entry in line.split("|"):
            name, _, value = entry.rpartition(":")
            if name.strip() in found:
                with suppress(ValueError):
                    found[name.strip()].append(float(value))
    return found


def problems_of_steps(found: Mapping[str, Sequence[float]], steps: int) -> list[str]:
    """What is missing or not finite."""
    problems = []
    for name, values in found.items():
        if len(values) != steps:
            problems.append(f"expected {name} of {steps} steps in the log, found {len(values)}")
        if not all(map(math.isfinite, values)):
            problems.append(f"{name} is not finite: {list(values)}")
    return problems


def problems_of_head(output: str) -> list[str]:
    """Whether the head was other than fused in any step."""
    said = set(re.findall(r"LM head (\w+)", output))
    if said != {"fused"}:
        return [f"expected the head to be fused in every step, the log says: {', '.join(sorted(said)) or 'nothing'}"]
    return []


def compared(
    found: Mapping[str, Sequence[float]], reference: Mapping[str, Sequence[float]]
) -> tuple[dict[str, float], list[str]]:
    """Largest relative differences from one rank's numbers, and which are too large."""
    differences = {}
    for name, values in found.items():
        pairs = zip(values, reference[name], strict=False)
        off = [abs(got - wanted) / abs(wanted) for got, wanted in pairs]
        differences[name] = larger(*off) if off else math.inf
    wrong = [
        f"{name} differs from one GPU's by {of:.1e}, allowed {TOLERANCE:.0e}: {list(found[name])} against "
        f"{list(reference[name])}"
        for name, of in differences.items()
        if not of <= TOLERANCE
    ]
    return differences, wrong


# ---- a whole step

# Attention with 64 numbers a head; in the student's 1.3e8 parameters of its embeddings, as many in its head.
STEP_STUDENT = {"full": (8, 1024, 2816, 16), "tiny": (2, 32, 64, 4)}
STEP_TEACHER = {"full": (12, 1536, 4096, 24), "tiny": (4, 48, 96, 4)}
STEP = {
    "full": {"seq-length": 2048, "max-position-embeddings": 2048, "micro-batch-size": 2, "global-batch-size": 8},
    "tiny": TRAINING["tiny"],
}
STEP_VOCABULARY = {"full": 128255, "tiny": 999}
TIMED = {"full": 10, "tiny": 2}
STEP_WARM_UP = 3


def step(report: Report, place: Place, given: argparse.Namespace) -> None:
    """Seconds a step of the student alone, of the teacher's forward pass, and of both: on one GPU."""
    from abkd_megatron.tools.env import OK, look

    has_te = any(part.name == "transformer-engine" and part.verdict == OK for part in look())
    spec = "te" if has_te else "local"
    steps = STEP_WARM_UP + TIMED[place.size]
    base = {"device": place.device} | of_megatron(
        SHAPE,
        STEP[place.size],
        spec_settings(spec, place.device),
        {"lr": 1e-5, "mock-data": True, "tokenizer-type": "NullTokenizer", "vocab-size": STEP_VOCABULARY[place.size]},
    )
    student, teacher = model(STEP_STUDENT[place.size]), model(STEP_TEACHER[place.size])
    saved = place.work / "step teacher"
    shutil.rmtree(saved, ignore_errors=True)
    making = {"train-iters": 1, "save": saved, "save-interval": 1, "no-save-optim": True, "no-save-rng": True}
    run_job("pretrain", base | of_megatron(teacher, making), place)
    alone = run_job("pretrain", base | of_megatron(student, {"train-iters": steps}), place)
    evaluation = {"load": saved, "skip-train": True, "train-iters": 1, "eval-iters": steps, "no-load-optim": True}
    evaluation |= {"no-load-rng": True, "finetune": True}
    forward = run_job("pretrain", base | of_megatron(teacher, evaluation), place)
    both = run_job(
        "distill",
        {
            **base,
            **of_megatron(student, {"train-iters": steps}),
            "teacher.load": saved,
            **{f"teacher.{key}": value for key, value in teacher.items()},
        },
        place,
    )
    report.numbers = {
        "student alone": step_seconds(alone),
        "teacher forward": evaluation_seconds(forward, steps),
        "distilled": step_seconds(both),
        "spec": spec,
        "head": re.findall(r"LM head .*", both),
        "memory": {name: memory(output) for name, output in (("student alone", alone), ("distilled", both))},
        "sizes": {"student": student, "teacher": teacher, **STEP[place.size], "vocab": STEP_VOCABULARY[place.size]},
    }
    times = {name: report.numbers[name] for name in ("student alone", "teacher forward", "distilled")}
    if absent := [name for name, of in times.items() if of is None]:
        report.problems.append(f"no times in the log of: {', '.join(absent)}")
        return
    own = times["distilled"] - times["student alone"] - times["teacher forward"]
    report.numbers["the plugin's own"] = own
    report.summary = ", ".join(f"{name} {of * 1e3:.0f} ms" for name, of in times.items())
    report.summary += f"; the plugin's own {own / times['distilled']:.0%} of the step ({spec} spec)"


def step_seconds(output: str) -> float | None:
    """Median of Megatron's own time of a step, past the warm-up."""
    times = [float(found) for found in re.findall(r"elapsed time per iteration \(ms\): ([\d.]+)", output)]
    return statistics.median(times[STEP_WARM_UP:]) / 1000 if len(times) > STEP_WARM_UP else None


def evaluation_seconds(output: str, steps: int) -> float | None:
    """Megatron's own time of an evaluation, a step; the shortest of the splits, for the first one warms up."""
    times = re.findall(r"evaluate \.+: \([\d.]+, ([\d.]+)\)", output)
    return min(map(float, times)) / 1000 / steps if times else None


def memory(output: str) -> dict[str, float]:
    """MB that Megatron reports of the first rank, by name; on a GPU alone."""
    line = re.search(r"\(after \d+ iterations\) memory \(MB\) \|(.*)", output)
    found = {}
    for name, value in re.findall(r"([\w ]+): ([\d.]+)", line[1] if line else ""):
        found[name.strip()] = float(value)
    return found


# ---- the command line

FUNCTIONS: dict[str, Function] = {
    one.__name__: one for one in (versions, tests, kernel, loss, tiles, head, data, train, step)
}


def main() -> int:
    """Run one stage; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--device", choices=("cuda", "cpu"), required=True)
    shared.add_argument("--size", choices=("full", "tiny"), required=True)
    shared.add_argument("--work", type=Path, required=True)
    shared.add_argument("--result", type=Path, required=True)
    of_stage = parser.add_subparsers(dest="stage", required=True)
    parsers = {name: of_stage.add_parser(name, parents=[shared]) for name in FUNCTIONS}
    parsers["kernel"].add_argument("kernel")
    parsers["train"].add_argument("--spec", choices=("local", "te", "packed"), default="local")
    parsers["train"].add_argument("--ranks", type=int, default=1)
    parsers["train"].add_argument("settings", nargs="*")
    given = parser.parse_args()
    place = Place(given.device, given.size, given.work.resolve())
    report = Report()
    try:
        FUNCTIONS[given.stage](report, place, given)
        report.problems = of_all_ranks(report.problems, place)
    except JobFailed as error:
        report.problems.append(str(error))
    except Exception as error:
        traceback.print_exc()
        report.problems.append(f"rank {place.rank}: {type(error).__name__}: {first_line(error)}")
    # The others will not end well either, and may be killed before they can say so.
    if place.rank == 0 or report.problems:
        partial = given.result.with_suffix(f".{place.rank}")
        partial.write_text(json.dumps(asdict(report), default=str))
        partial.replace(given.result)
    for problem in report.problems:
        print(f"problem: {problem}", flush=True)
    return 1 if report.problems else 0


def of_all_ranks(problems: list[str], place: Place) -> list[str]:
    """The problems of every rank, on every rank."""
    import torch.distributed as dist

    if place.num_ranks == 1:
        return problems
    found: list[list[str] | None] = [None] * place.num_ranks
    dist.all_gather_object(found, problems)
    dist.destroy_process_group()
    return list(dict.fromkeys(problem for some in found if some for problem in some))


if __name__ == "__main__":
    sys.exit(main())
