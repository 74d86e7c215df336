"""Communication for the teacher, from four to ten thousand ranks: python benchmarks/scale.py.

One rank of each kind of a `distill` job is simulated for two steps without data and without other ranks
(`abkd_megatron.tools.meta_run`). Every collective and message is recorded with the file of this package that starts it,
the size of its group and the bytes that this rank sends. Communication of the student counts as Megatron's.
`tests/host/test_scale.py` compares the cases of four ranks with a real job on CPU ranks.

Writes OUT/scale.json and prints a table. Times depend on this machine.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import pickle
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

sys.path.insert(0, str(Path(__file__).parent))
import estimate as memory  # common settings and launcher

MIB = 2**20
MICRO_BATCHES = 4
TP, PP, CP = "tensor-model-parallel-size", "pipeline-model-parallel-size", "context-parallel-size"

# Purpose of the collectives that a file starts. Other files belong to Megatron and the student.
KINDS = {
    "teacher/channel.py": "teacher's messages",
    "teacher/runner.py": "teacher's pass",
    "student/head.py": "LM heads",
    "vocab_parallel/": "loss",
    "teacher/": "start-up",
    "student/": "start-up",
    "preflight/": "start-up",
    "errors.py": "start-up",
    "tools/meta_run.py": None,
    "cpu_backend.py": None,
    "hosts/": None,
    "": None,
}


def _gpus(student: tuple[int, ...], teacher: tuple[int, ...], layout: dict[str, Any], ranks: int) -> dict[str, Any]:
    """Return a case on GPUs from (layers, hidden, ffn, heads) of both models."""
    return {
        "ranks": ranks,
        "device": "cuda",
        "student": memory._sizes(*student)
        | {"vocab-size": 128256, "micro-batch-size": 1, "seq-length": 8192, "max-position-embeddings": 8192}
        | {"bf16": "true", "sequence-parallel": "true", "use-distributed-optimizer": "true"}
        | {"accumulate-allreduce-grads-in-fp32": "true", "no-create-attention-mask-in-dataloader": "true", **layout},
        "teacher": memory._sizes(*teacher),
    }


_8B, _405B = (32, 4096, 14336, 32), (128, 16384, 53248, 128)

CASES: dict[str, dict[str, Any]] = {
    "4 ranks: TP 2 x PP 2": {
        "ranks": 4,
        "device": "cpu",
        "student": memory._sizes(2, 128, 256, 4) | {"vocab-size": 2047, "micro-batch-size": 2, TP: 2, PP: 2},
        "teacher": memory._sizes(4, 256, 512, 8),
    },
    "4 ranks: PP 2 x DP 2, teacher TP 2": {
        "ranks": 4,
        "device": "cpu",
        "student": memory._sizes(2, 128, 256, 4)
        | {"vocab-size": 2047, "micro-batch-size": 2, PP: 2}
        | {"no-create-attention-mask-in-dataloader": "true"},
        "teacher": memory._sizes(4, 256, 512, 8) | {TP: 2},
    },
    "TP 8 x PP 32 x DP 40": _gpus((64, 5120, 25600, 64), _405B, {TP: 8, PP: 32}, 10240),
    "TP 8 x PP 8 x DP 160, teacher TP 16": _gpus(_8B, _405B, {TP: 8, PP: 8}, 10240)
    | {"teacher": memory._sizes(*_405B) | {TP: 16}},
    "TP 72 x PP 4 x DP 35": _gpus(
        (64, 9216, 36864, 72),
        (128, 18432, 73728, 144),
        {TP: 72, PP: 4, "seq-length": 9216, "max-position-embeddings": 9216},  # TP has to divide a sequence
        10080,
    ),
}
SMALL = [name for name, case in CASES.items() if case["device"] == "cpu"]


def settings_of(name: str, teacher: Path) -> list[str]:
    """Return the overrides of a case's `distill` job."""
    case = CASES[name]
    student = {**memory.COMMON, **case["student"]}
    model_parallel = student.get(TP, 1) * student.get(PP, 1) * student.get(CP, 1)
    student["global-batch-size"] = student["micro-batch-size"] * MICRO_BATCHES * (case["ranks"] // model_parallel)
    settings: dict[str, Any] = {"device": case["device"], "teacher.load": teacher}
    settings |= {f"megatron.{key}": value for key, value in student.items()}
    settings |= {f"teacher.{key}": value for key, value in case["teacher"].items()}
    settings["distillation.skip_preflight"] = "[teacher_weights, gradient, batch, teacher_loss]"
    return [f"{key}={value}" for key, value in settings.items()]


def config_of(name: str) -> Any:
    """Return a case's configuration, with a nonexistent teacher checkpoint."""
    from abkd_megatron import cpu_backend
    from abkd_megatron.config.load import load_config
    from abkd_megatron.config.megatron_args import megatron_options

    defaults = cpu_backend.MEGATRON_DEFAULTS if CASES[name]["device"] == "cpu" else {}
    return load_config(None, settings_of(name, Path("nowhere")), megatron_options(), lambda _: defaults)


def teacher_settings_of(name: str, teacher: Path) -> list[str]:
    """Return the overrides of the single-rank `pretrain` job that writes a case's teacher."""
    case = CASES[name]
    saved = {"save": teacher, "save-interval": 1, "train-iters": 1, "micro-batch-size": 1, "global-batch-size": 1}
    sizes = {key: value for key, value in case["teacher"].items() if key != TP}
    of = {**memory.COMMON, "vocab-size": case["student"]["vocab-size"], **sizes, **saved}
    return ["device=cpu", *(f"megatron.{key}={value}" for key, value in of.items())]


class Traffic:
    """Communication of one rank: {part of the run: {(kind, operation, group size): [count, bytes sent]}}."""

    def __init__(self) -> None:
        self.part = "start-up"
        self.found: dict[str, Counter[tuple[str, str, int]]] = {}
        self.bytes: dict[str, Counter[tuple[str, str, int]]] = {}
        self.groups = [0, 0]
        """Process groups created for the teacher: all, and those that include this rank."""
        self.seconds_of_groups = 0.0
        self._within = False

    def note(self, operation: str, group: Any, size: int) -> None:
        """Record one operation."""
        kind = _kind()
        if self._within or (kind is None and self.part == "start-up"):
            return
        ranks = dist.get_world_size(group)
        key = (kind or "Megatron's", operation, ranks)
        self.found.setdefault(self.part, Counter())[key] += 1
        self.bytes.setdefault(self.part, Counter())[key] += size

    def note_op(self, func: Any, args: tuple) -> None:
        """Record an operator of torch's c10d."""
        names = [argument.name for argument in func._schema.arguments]
        given = next((number for number, name in enumerate(names) if name.startswith("input")), 0)
        size = sum(it.nbytes for it in tree_iter(args[given]) if isinstance(it, torch.Tensor))
        boxed = next(it for it in args if isinstance(it, torch.ScriptObject) and "ProcessGroup" in str(it._type()))
        self.note(func._schema.name.split("::")[1].strip("_"), dist.ProcessGroup.unbox(boxed), size)

    def of_objects(self, function: Any, operation: str, place: int) -> Any:
        """Wrap a collective of Python objects and record it with the size of this rank's pickle."""

        def call(*args: Any, **kwargs: Any) -> Any:
            group = kwargs.get("group") or next((it for it in args[1:] if isinstance(it, dist.ProcessGroup)), None)
            self.note(operation, group, len(pickle.dumps(args[place])))
            before, self._within = self._within, True
            try:
                return function(*args, **kwargs)
            finally:
                self._within = before

        return call

    def new_group(self, function: Any) -> Any:
        """Wrap `dist.new_group` and count its calls."""

        def call(*args: Any, **kwargs: Any) -> Any:
            if _kind() is None:
                return function(*args, **kwargs)
            begun = time.perf_counter()
            group = function(*args, **kwargs)
            self.seconds_of_groups += time.perf_counter() - begun
            self.groups[0] += 1
            self.groups[1] += isinstance(group, dist.ProcessGroup)
            return group

        return call

    def step(self, function: Any) -> Any:
        """Wrap Megatron's `train_step`."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self.part = "step"
            self.found.pop("step", None)  # the last one counts
            self.bytes.pop("step", None)
            try:
                return function(*args, **kwargs)
            finally:
                self.part = "after"

        return call

    def report(self) -> dict[str, Any]:
        """Return the records as plain values."""
        rows = {
            part: [[*key, times, self.bytes[part][key]] for key, times in sorted(found.items())]
            for part, found in self.found.items()
            if part != "after"
        }
        return {**rows, "groups": self.groups, "seconds of groups": round(self.seconds_of_groups, 3)}


class _Watched(TorchDispatchMode):
    """Dispatch mode that records the operators of a real job in `Traffic`."""

    def __init__(self, traffic: Traffic) -> None:
        super().__init__()
        self._traffic = traffic

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.namespace == "c10d":
            self._traffic.note_op(func, args)
        return func(*args, **(kwargs or {}))


def _kind() -> str | None:
    """Return the current purpose, from the innermost frame of this package."""
    frame = sys._getframe(1)
    while frame is not None:
        _, found, file = frame.f_code.co_filename.rpartition("/abkd_megatron/")
        if found and file not in ("tools/meta_run.py", "cpu_backend.py"):
            return next(kind for start, kind in KINDS.items() if file.startswith(start))
        frame = frame.f_back  # type: ignore[assignment]
    return None


def run_rank(out: Path, words: list[str]) -> int:
    """Run a job on this rank and write its communication to OUT/RANK.json."""
    from megatron.training import training

    from abkd_megatron.__main__ import main as command_line

    traffic = Traffic()
    with (
        mock.patch.object(training, "train_step", traffic.step(training.train_step)),
        mock.patch.object(dist, "all_gather_object", traffic.of_objects(dist.all_gather_object, "gather objects", 1)),
        mock.patch.object(
            dist, "broadcast_object_list", traffic.of_objects(dist.broadcast_object_list, "broadcast objects", 0)
        ),
        mock.patch.object(dist, "new_group", traffic.new_group(dist.new_group)),
        _Watched(traffic),
    ):
        code = command_line(words)
    (out / f"{os.environ['RANK']}.json").write_text(json.dumps(traffic.report()))
    return code


def count_rank(name: str, rank: int) -> dict[str, Any]:
    """Return the same for a simulated rank. Call in a separate process."""
    from megatron.training import training

    from abkd_megatron.tools import memory_tracker, meta_run

    traffic = Traffic()

    class MemoryTracker(memory_tracker.MemoryTracker):
        def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
            if func.namespace == "c10d":
                traffic.note_op(func, args)
            return super().__torch_dispatch__(func, types, args, kwargs)

    config = config_of(name)
    gathered = traffic.of_objects(meta_run._all_gather_object, "gather objects", 1)
    begun = time.perf_counter()
    with (
        mock.patch.object(training, "train_step", traffic.step(training.train_step)),
        mock.patch.object(meta_run, "_all_gather_object", gathered),
        mock.patch.object(dist, "new_group", traffic.new_group(dist.new_group)),
        mock.patch.object(meta_run, "MemoryTracker", MemoryTracker),
    ):
        account = meta_run.measure(
            config,
            CASES[name]["ranks"],
            rank,
            vocab_size=CASES[name]["student"]["vocab-size"],
            global_batch_size=int(config.megatron["global-batch-size"]),
        )
    return {**traffic.report(), "waiting": account.waiting, "seconds": round(time.perf_counter() - begun, 1)}


def counted(names: Sequence[str]) -> list[dict[str, Any]]:
    """Return one row per case and kind of rank."""
    from abkd_megatron.tools.dry_run import megatron_arguments
    from abkd_megatron.tools.estimate import kinds_of_ranks

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["abkd_megatron.tools.meta_run"])  # import takes longer than a rank
    ranks = []
    for name in names:
        student, teacher = megatron_arguments(config_of(name), CASES[name]["ranks"])
        assert teacher is not None
        ranks += [(name, kind, rank) for kind, rank in kinds_of_ranks(student, teacher).items()]
    with ProcessPoolExecutor(min(3, len(ranks)), mp_context=context, max_tasks_per_child=1) as pool:
        futures = [pool.submit(count_rank, name, rank) for name, _, rank in ranks]
        rows = []
        for (name, kind, rank), future in zip(ranks, futures, strict=True):
            rows.append({"case": name, "kind": kind, "rank": rank, **future.result()})
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def layout_of(name: str) -> dict[str, Any]:
    """Build the teacher layout of the middle rank, and count the process groups for the teacher.

    Returns:
        "groups": of the job; "own": groups that include this rank; "members": size of the largest; "seconds": to build
        the layout; "sharing group": its ranks.
    """
    from abkd_megatron.teacher.layout import RankCoords, TeacherLayout

    student, teacher, world = CASES[name]["student"], CASES[name]["teacher"], CASES[name]["ranks"]
    tensor, stages, context = (student.get(key, 1) for key in (TP, PP, CP))
    ranks = (stages, world // (tensor * stages * context), context, tensor)
    places = [RankCoords(*place) for place in itertools.product(*map(range, ranks))]
    begun = time.perf_counter()
    layout = TeacherLayout(places, world // 2, teacher.get(TP, tensor), teacher.get(PP, stages))
    seconds = time.perf_counter() - begun
    # (ranks per group, number of groups) of each kind.
    sizes = [(len(layout.pipeline), world // len(layout.pipeline))] if layout.pipeline_parallel > 1 else []
    if not layout.matches_student:
        share = layout.tensor_parallel * layout.pipeline_parallel
        pipelines, sharing_groups = world // layout.pipeline_parallel, world // len(layout.sharing_group)
        sizes += [(world // share, share), (layout.tensor_parallel, world // layout.tensor_parallel)]
        sizes += [(layout.pipeline_parallel, pipelines), *[(len(layout.sharing_group), sharing_groups)] * 2]
        sizes += [(len(layout.sharing_group) // layout.student_stages, sharing_groups)]
    return {
        "case": name,
        "seconds": round(seconds, 3),
        "sharing group": len(layout.sharing_group),
        "groups": sum(number for _, number in sizes),
        "own": len(sizes) - (not layout.matches_student and layout.coords.pp > 0),
        "members": max((members for members, _ in sizes), default=0),
    }


def main() -> int:
    """Run the benchmark."""
    if sys.argv[1:2] == ["--rank"]:
        return run_rank(Path(sys.argv[2]), sys.argv[3:])
    parser = argparse.ArgumentParser(description="Count the communication for the teacher.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    rows = counted(list(CASES))
    layouts = [layout_of(name) for name in CASES]
    arguments.out.mkdir(parents=True, exist_ok=True)
    report = {
        "counted": rows,
        "layouts": layouts,
        "cases": CASES,
        "micro-batches": MICRO_BATCHES,
        "torch": version("torch"),
        "megatron-core": version("megatron-core"),
    }
    (arguments.out / "scale.json").write_text(json.dumps(report, indent=1) + "\n")
    print("\n".join(table(rows, layouts)))
    return 0


def of_micro_batch(row: dict[str, Any], kind: str) -> tuple[float, float]:
    """Return the count and bytes of a kind per micro-batch."""
    found = [it for it in row.get("step", ()) if it[0] == kind]
    return sum(it[3] for it in found) / MICRO_BATCHES, sum(it[4] for it in found) / MICRO_BATCHES


def table(rows: list[dict[str, Any]], layouts: list[dict[str, Any]]) -> list[str]:
    """Return the lines of the tables in docs/scale.md: communication per micro-batch, and process groups."""
    kinds = ("teacher's messages", "loss", "LM heads", "teacher's pass", "Megatron's")
    lines = [f"| layout | rank | {' | '.join(kinds)} | waiting |", "|---" * (len(kinds) + 3) + "|"]
    for row in rows:
        found = (of_micro_batch(row, kind) for kind in kinds)
        sharing_groups = [f"{times:g}: {size / MIB:.3g}" if times else "" for times, size in found]
        lines.append(f"| {row['case']} | {row['kind']} | {' | '.join(sharing_groups)} | {row['waiting'] / MIB:.3g} |")
    lines += ["", "| layout | groups of the job | of a rank | ranks of the largest |", "|---|---|---|---|"]
    lines += [f"| {of['case']} | {of['groups']} | {of['own']} | {of['members']} |" for of in layouts]
    return lines


if __name__ == "__main__":
    sys.exit(main())
