"""Memory of a job as estimated and as measured: python benchmarks/estimate.py.

Each case is a real `distill` job on CPU ranks. On every rank, the storages of all inputs and outputs of torch operators
are tracked from before the model is built, in all threads. Temporaries inside operators are not tracked. Reported are
the peak within a step and the bytes at its start. The estimate is from `abkd_megatron.tools.estimate`, which uses
neither data nor other ranks.

As a cross-check, the resident memory of the process is recorded. It includes Python, libraries and the memory that the
C allocator keeps.

Writes OUT/estimate.json and OUT/estimate.png, and prints a table.
"""

import argparse
import gc
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import weakref
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

ROOT = Path(__file__).resolve().parents[1]
MIB = 2**20
STEPS = 3

COMMON: dict[str, Any] = {
    "position-embedding-type": "rope",
    "normalization": "RMSNorm",
    "swiglu": "true",
    "disable-bias-linear": "true",
    "untie-embeddings-and-output-weights": "true",
    "use-distributed-optimizer": "true",
    "seq-length": 128,
    "max-position-embeddings": 128,
    "lr": 0.001,
    "lr-decay-style": "constant",
    "train-iters": STEPS,
    "log-interval": 1,
    "eval-interval": 1000,
    "eval-iters": 0,
    "ckpt-format": "torch_dist",
    "mock-data": "true",
    "tokenizer-type": "NullTokenizer",
}


def _sizes(layers: int, hidden: int, ffn: int, heads: int) -> dict[str, Any]:
    return {"num-layers": layers, "hidden-size": hidden, "ffn-hidden-size": ffn, "num-attention-heads": heads}


# {name: (ranks, student arguments, teacher arguments that differ, `distillation` settings)}.
CASES: dict[str, tuple[int, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "TP 2 x PP 2, fp32": (
        4,
        _sizes(2, 128, 256, 4)
        | {"vocab-size": 2047, "micro-batch-size": 8, "global-batch-size": 16}
        | {"tensor-model-parallel-size": 2, "pipeline-model-parallel-size": 2},
        _sizes(4, 256, 512, 8),
        {},
    ),
    "1 rank, vocabulary 32768, fused head": (
        1,
        _sizes(2, 256, 512, 4) | {"vocab-size": 32767, "micro-batch-size": 8, "global-batch-size": 16},
        _sizes(4, 384, 768, 8),
        {"head": "fused"},
    ),
    "PP 2 x VPP 2, bf16, 8 micro-batches": (
        2,
        _sizes(4, 256, 512, 8)
        | {"vocab-size": 4095, "micro-batch-size": 4, "global-batch-size": 32, "bf16": "true"}
        | {"pipeline-model-parallel-size": 2, "num-virtual-stages-per-pipeline-rank": 2},
        _sizes(6, 512, 1024, 8),
        {},
    ),
    # Every token takes all experts, so that their memory does not depend on the data.
    "HybridModel, PP 2, experts, multi-token prediction": (
        2,
        {"hybrid-layer-pattern": "*E|*-/*-", "hidden-size": 256, "ffn-hidden-size": 512, "num-attention-heads": 4}
        | {"vocab-size": 4095, "micro-batch-size": 4, "global-batch-size": 16, "pipeline-model-parallel-size": 2}
        | {"num-experts": 4, "moe-ffn-hidden-size": 256, "moe-router-topk": 4},
        _sizes(4, 384, 768, 8) | {"num-experts": "null", "moe-ffn-hidden-size": "null"},
        {},
    ),
}


def settings_of(name: str, teacher: Path) -> list[str]:
    """Return the overrides of a case's `distill` job."""
    _, student, theirs, distillation = CASES[name]
    settings = {"device": "cpu", "teacher.load": teacher}
    settings |= {f"megatron.{key}": value for key, value in {**COMMON, **student}.items()}
    settings |= {f"teacher.{key}": value for key, value in theirs.items()}
    settings |= {f"distillation.{key}": value for key, value in distillation.items()}
    return [f"{key}={value}" for key, value in settings.items()]


def teacher_settings_of(name: str, teacher: Path) -> list[str]:
    """Return the overrides of the single-rank `pretrain` job that writes a case's teacher."""
    _, student, theirs, _ = CASES[name]
    saved = {"save": teacher, "save-interval": 1, "train-iters": 1, "micro-batch-size": 1, "global-batch-size": 1}
    of = {**COMMON, "vocab-size": student["vocab-size"], **theirs, **saved}
    return ["device=cpu", *(f"megatron.{key}={value}" for key, value in of.items())]


class LiveTensors(TorchDispatchMode):
    """Dispatch mode that tracks the storages of all tensors, in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = 0
        self._seen: set[int] = set()
        self._lock = threading.RLock()  # other threads free tensors, too

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter((result, args, kwargs)):
            if isinstance(tensor, torch.Tensor):
                self._follow(tensor.untyped_storage())
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        with self._lock:
            if key in self._seen:
                return
            self._seen.add(key)
            self.held += size
            self.peak = max(self.peak, self.held)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        with self._lock:
            self._seen.remove(key)
            self.held -= size


def run_rank(out: Path, words: list[str]) -> int:
    """Run a job on this rank and write its tensor memory to OUT/RANK.json."""
    from megatron.training import training

    from abkd_megatron.__main__ import main as command_line

    tensors, step, found = LiveTensors(), training.train_step, []

    def followed(*args: Any, **kwargs: Any) -> Any:
        gc.collect()  # garbage could be freed at any time
        tensors.peak = kept = tensors.held
        result = step(*args, **kwargs)
        found.append({"kept": kept, "peak": tensors.peak})
        return result

    with tensors, mock.patch.object(training, "train_step", followed):
        code = command_line(words)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    (out / f"{os.environ['RANK']}.json").write_text(json.dumps({"steps": found, "resident": resident}))
    return code


def read(out: Path, ranks: int) -> list[dict[str, Any]]:
    """Return the last step's numbers of each rank, in bytes."""
    found = [json.loads((out / f"{rank}.json").read_text()) for rank in range(ranks)]
    return [{**of["steps"][-1], "resident": of["resident"]} for of in found]


def estimated(name: str) -> dict[int, dict[str, Any]]:
    """Return the estimate by simulated rank: kind, peak, bytes kept between steps, and peak by part."""
    from abkd_megatron import cpu_backend
    from abkd_megatron.config.load import load_config
    from abkd_megatron.config.megatron_args import megatron_options
    from abkd_megatron.tools.estimate import estimate

    settings = settings_of(name, Path("nowhere"))
    found = estimate(
        load_config(None, settings, megatron_options(), lambda _: cpu_backend.MEGATRON_DEFAULTS), CASES[name][0]
    )
    return {
        kind.rank: {
            "kind": kind.name,
            "peak": kind.account.total,
            "kept": sum(kind.account.kept.values()),
            "parts": kind.account.peak,
            "waiting": kind.account.waiting,
            "parameters": [kind.account.parameters, kind.account.teacher_parameters],
            "of all ranks": [found.parameters, found.teacher_parameters],
        }
        for kind in found.ranks
    }


def compared(name: str, measured: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one row per kind of rank."""
    return [
        {"case": name, "rank": rank, "estimated": estimate, "measured": measured[rank]}
        for rank, estimate in estimated(name).items()
    ]


def launch(words: list[str], ranks: int) -> None:
    """Run `python WORDS` on `ranks` ranks."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    ended = subprocess.run(
        [*launcher, *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if ended.returncode != 0:
        sys.exit(f"{' '.join(words)} failed:\n{ended.stdout[-8000:]}")


def main() -> int:
    """Run the benchmark."""
    if sys.argv[1:2] == ["--rank"]:
        return run_rank(Path(sys.argv[2]), sys.argv[3:])
    parser = argparse.ArgumentParser(description="Compare estimated with measured memory.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for number, (name, (ranks, *_)) in enumerate(CASES.items()):
            print(name, file=sys.stderr, flush=True)
            teacher, out = Path(scratch, f"teacher{number}"), Path(scratch, f"out{number}")
            out.mkdir()
            launch(["-m", "abkd_megatron", "pretrain", *teacher_settings_of(name, teacher)], 1)
            launch([str(Path(__file__)), "--rank", str(out), "distill", *settings_of(name, teacher)], ranks)
            rows += compared(name, read(out, ranks))
    arguments.out.mkdir(parents=True, exist_ok=True)
    keys = ("ranks", "student", "teacher", "distillation")
    report = {
        "bytes": rows,
        "cases": {name: dict(zip(keys, of, strict=True)) for name, of in CASES.items()},
        "common": COMMON,
        "torch": version("torch"),
        "megatron-core": version("megatron-core"),
    }
    (arguments.out / "estimate.json").write_text(json.dumps(report, indent=1) + "\n")
    print_table(rows)
    draw(rows, arguments.out / "estimate.png")
    return 0


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print peaks, kept bytes and their ratios."""
    print(f"{'':40}{'':14}{'peak MiB':>10}{'estimated':>11}{'ratio':>7}{'kept MiB':>11}{'estimated':>11}{'ratio':>7}")
    for row in rows:
        ours, theirs = row["estimated"], row["measured"]
        cells = "".join(
            f"{theirs[key] / MIB:{width}.1f}{ours[key] / MIB:11.1f}{ours[key] / theirs[key]:7.3f}"
            for key, width in (("peak", 10), ("kept", 11))
        )
        print(f"{row['case']:40}{ours['kind']:14}{cells}")


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the parts of each estimate as stacked bars, next to the measured peak."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(10, 1.2 + 0.8 * len(rows)), layout="constrained")
    parts = list(dict.fromkeys(part for row in rows for part in row["estimated"]["parts"]))
    for index, part in enumerate(parts):
        lefts = [sum(row["estimated"]["parts"].get(before, 0) for before in parts[:index]) / MIB for row in rows]
        widths = [row["estimated"]["parts"].get(part, 0) / MIB for row in rows]
        axis.barh(range(len(rows)), widths, left=lefts, height=0.5, label=part, color=pyplot.get_cmap("tab20")(index))
    for index, row in enumerate(rows):
        axis.plot([row["measured"]["peak"] / MIB] * 2, [index - 0.4, index + 0.4], "k-", linewidth=2)
    axis.plot([], [], "k-", linewidth=2, label="measured")
    axis.set_yticks(range(len(rows)), [f"{row['case']}\n{row['estimated']['kind']}" for row in rows], size=8)
    axis.invert_yaxis()
    axis.set_xlabel("MiB per rank at the peak of a step, CPU backend")
    axis.legend(fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
