"""Tries every boolean and choice option of the installed Megatron beside a teacher; run by hand.

    python tests/host/option_fuzz.py [--shard I/N] [--only PATTERN] [--out FILE.json] [--workspace DIR] [--jobs N]

Each option takes each value that it does not have already, on top of the tiny configuration of the host tests and of
what it needs to mean anything (`CONTEXTS`). `check` looks at it, for a job on CPUs and for one on GPUs; what it accepts
trains two steps from one checkpoint on one rank and on two, in the layout that the option is about. Each value ends in
one of the classes below. FILE.json is written after each value, and values that it has are not run again.

Of a fault the same jobs run without a teacher: what fails there too is Megatron's, or the CPU stand-in's, not ours.
"""

import argparse
import contextlib
import io
import json
import logging
import math
import os
import re
import shutil
import sys
import sysconfig
import tempfile
import traceback
import warnings
from argparse import Action, Namespace
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from threading import Lock
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/distributed"), str(Path(__file__).parent)]

from megatron.training.argument_utils import ArgumentGroupFactory  # noqa: E402

# Megatron reads its own source for the help of its options each time it makes a parser: half of what a job here takes.
_docstrings = ArgumentGroupFactory._get_field_docstrings
ArgumentGroupFactory._get_field_docstrings = lambda self, kind: _docstrings_of(kind)


@cache
def _docstrings_of(kind: type) -> dict[str, str]:
    return _docstrings(SimpleNamespace(_get_field_docstrings=_docstrings_of), kind)


from launch import Rank, launch, run_job, scalars  # noqa: E402
from matrix import MOE, Settings, of_teacher, overrides  # noqa: E402

SAME = "same"
CHANGES = "changes model, data or numbers; 1 rank equals 2"
REFUSED = "rejected by check"
LATE = "rejected by the job, accepted by check"
CRASHED = "FAULT: check crashed"
TRACEBACK = "FAULT: traceback"
HANG = "FAULT: hang"
DIFFERS = "FAULT: 1 rank differs from 2"
TEACHER = "FAULT: the teacher's loss changed"
NOT_RUN = "not run"
MEGATRONS = "fails without a teacher, too"

TO_THE_BIT = "to the bit"
LOSSES = ("lm loss", "kd loss", "teacher lm loss", "total loss")
TP = {"tensor-model-parallel-size": 2}
PP = {"pipeline-model-parallel-size": 2}
VPP = {**PP, "num-layers-per-virtual-pipeline-stage": 1}
LAYOUTS: dict[str, Settings] = {
    "DP 2": {},
    "TP 2": TP,
    "TP 2, SP": TP | {"sequence-parallel": "true"},
    "PP 2": PP,
    "VPP": VPP,
}
MLA = {
    "multi-latent-attention": "true",
    "q-lora-rank": 16,
    "kv-lora-rank": 16,
    "qk-head-dim": 8,
    "qk-pos-emb-head-dim": 8,
    "v-head-dim": 8,
}


@dataclass(frozen=True)
class Context:
    """What options need beside them."""

    options: str
    """Which: a regular expression for a whole name. The first context that takes one has it."""
    beside: Settings = field(default_factory=dict)
    layout: str = "DP 2"
    student: Settings = field(default_factory=dict)
    """What the student is made with, too."""
    teacher: Settings = field(default_factory=dict)
    """What keeps the teacher as it is."""
    exact: bool = True
    """In fp32."""


OPTIMIZER = {"use-distributed-optimizer": "true", "overlap-grad-reduce": "true"}
BF16 = {"bf16": "true"}
CONTEXTS: dict[str, Context] = {
    "interleaved": Context(
        r"overlap-param-gather-with-optimizer-step|(no-)?overlap-p2p.*|align-param-gather|no-align-.*",
        OPTIMIZER | {"overlap-param-gather": "true"},
        "VPP",
        {"num-layers": 4},
    ),
    "MTP": Context("mtp-.*", layout="PP 2", student={"mtp-num-layers": 1}),
    "MoE": Context(
        "moe-.*|overlap-moe.*|ep-overlap.*|delay-wgrad.*|overlap-dispatch.*|.*a2a.*|use-grouped-gemm-for-shared.*",
        student=MOE,
        teacher={"num-experts": "null"},
    ),
    "sharded experts": Context("never", {"expert-model-parallel-size": 2}, student=MOE),
    "MLA": Context(
        "cache-mla-latents|mla-.*|qk-clip|.*yarn.*",
        layout="TP 2",
        student=MLA,
        teacher={"multi-latent-attention": "false"},
    ),
    "DSA": Context(
        "dsa-.*",
        layout="TP 2",
        student={
            **MLA,
            "experimental-attention-variant": "dsa",
            "dsa-indexer-n-heads": 4,
            "dsa-indexer-head-dim": 16,
            "dsa-indexer-topk": 8,
        },
        teacher={"multi-latent-attention": "false", "experimental-attention-variant": "null"},
    ),
    "bf16": Context(
        "(fp8|fp4|no-fp8)-.*|first-last-layers-bf16|grad-reduce-in-bf16|accumulate-allreduce.*|fp32-residual.*"
        "|disable-bf16-.*|fp16-lm-.*|attention-softmax-.*|main-.*|exp-avg-.*|use-precision-.*|keep-fp8-.*|reuse-grad-.*"
        "|apply-query-key-.*|log-loss-scale.*|use-layer-wise.*|no-use-layer-wise.*",
        OPTIMIZER | BF16,
        exact=False,
    ),
    "precision-aware": Context("never", OPTIMIZER | BF16 | {"use-precision-aware-optimizer": "true"}, exact=False),
    "optimizer": Context(
        "overlap-(grad|param).*|ddp-.*|no-gradient-reduce.*|(no-)?align-.*|use-distributed-optimizer|.*-pin-cpu.*"
        "|optimizer-.*|use-torch-optimizer.*|overlap-cpu.*|use-nccl-ub|disable-symmetric.*|use-sharp|sharp-.*"
        "|create-all-gather.*|data-parallel-sharding.*|outer-dp.*|.*fsdp.*|nccl-.*|log-num-zeros.*|log-params-norm"
        "|check-for-large-grads|enable-full-sharding.*",
        OPTIMIZER,
    ),
    "muon": Context("muon-.*", {"optimizer": "muon"}, "TP 2"),
    "saved": Context(
        ".*ckpt.*|async-.*|.*checkpoint.*|no-save-.*|replication|verify-integrity|distrib-optim-.*|non-persistent.*"
        "|use-persistent.*|load-main-.*",
        OPTIMIZER | {"save": "{folder}", "save-interval": 1},
    ),
    "resumed": Context("no-load-.*|finetune|override-opt.*", {"finetune": "false"}),
    "recomputed": Context(
        "recompute-method|distribute-saved.*",
        {"recompute-granularity": "full", "recompute-method": "uniform", "recompute-num-layers": 1},
        "TP 2",
    ),
    "validated": Context("full-validation|multiple-validation.*|log-validation.*|no-manual-gc.*", {"eval-interval": 1}),
    "profiled": Context(
        "profile|use-pytorch-profiler|pytorch-.*|record-.*|nvtx-.*",
        {"profile-step-start": 0, "profile-step-end": 1},
    ),
    "pipeline": Context(
        "pipeline-.*|account-for.*|defer-embedding.*|use-ring-.*|.*deallocate.*|clone-scatter.*|no-clone-scatter.*"
        "|no-barrier.*|timing-.*|use-tp-pp-.*|variable-.*|check-for-nan.*|no-check-.*|recompute-.*|fine-grained.*"
        "|deterministic-mode|batch-invariant.*|cpu-offload.*|delay-offload.*",
        layout="PP 2",
    ),
    "tensor": Context(
        ".*tp-comm.*|sequence-parallel|cross-entropy.*|.*vocab.*|te-rng.*|inference-rng.*|symmetric-ar.*"
        "|use-cpu-init.*|no-initialization|.*fusion.*|fused-.*|.*fused.*",
        layout="TP 2",
    ),
    "plain": Context(".*"),
}

# Whole groups of Megatron's parser that another program than training reads, or that ask for a service.
_OTHERS = {
    "inference": "read by Megatron's inference",
    "rl": "read by Megatron's RL loop",
    "vision": "read by Megatron's vision models",
    "biencoder": "read by Megatron's retrieval models",
    "one logger": "a logging service",
    "In-process restart": "needs nvidia-resiliency-ext's wrapper around the process",
    "ft_package": "needs nvidia-resiliency-ext's launcher",
    "autoresume": "needs a cluster's scheduler",
    "workload inspector": "a server",
    "msc": "a storage service",
}
_NOT_RUN = {
    r"inference-.*|mamba-inference-.*|rl-.*|.*cuda-graph.*|nccl-all-reduce-for-prefill|flash-decode": _OTHERS[
        "inference"
    ],
    r"fake-process-group": "no ranks run",
    r"lazy-mpu-init": "leaves the ranks to the caller",
    r"ckpt-convert-format": "a converter, no training",
}
# Run all the same: they change what a training loop does.
_RUN_ALL_THE_SAME = ("perform-rl-step", "cuda-graph-impl")


@dataclass(frozen=True)
class Case:
    """One option with one value."""

    option: str
    value: str
    base: str
    """What it is in the configuration without it."""
    dest: str
    group: str
    context: str

    def __str__(self) -> str:
        return f"{self.option}={self.value}"

    @property
    def not_run(self) -> str | None:
        """Why it is not."""
        if self.option in _RUN_ALL_THE_SAME:
            return None
        if self.option == "exit-signal" and self.value != "SIGUSR1":
            return "as SIGUSR1"
        named = (reason for names, reason in _NOT_RUN.items() if re.fullmatch(names, self.option))
        return next(named, _OTHERS.get(self.group))


def cases(options: Mapping[str, Action], given: Mapping[str, Any]) -> list[Case]:
    """Every value of a boolean or choice option that a configuration does not have.

    Args:
        options: as `megatron_options` returns them.
        given: the configuration's Megatron arguments, by spelling.
    """
    spellings: dict[int, list[str]] = {}
    for name, action in options.items():
        spellings.setdefault(id(action), []).append(name)
    found = []
    for names in spellings.values():
        option, action = names[0], options[names[0]]
        now = next((given[name] for name in names if name in given), None)
        for value, base in _values(action, now):
            context = next(name for name, of in CONTEXTS.items() if re.fullmatch(of.options, option))
            found.append(Case(option, value, base, action.dest, str(action.container.title), context))
    return found


def _values(action: Action, now: object) -> Iterator[tuple[str, str]]:
    """Values, and what is in their place otherwise, as words of a configuration."""
    if isinstance(action, argparse.BooleanOptionalAction):
        value = action.default if now is None else now
        yield ("false", "true") if value else ("true", "false")
    elif isinstance(action, argparse._StoreTrueAction | argparse._StoreFalseAction) or action.type is bool:
        yield ("false", "true") if now else ("true", "false")
    elif action.choices is not None:
        value = action.default if now is None else now
        base = "null" if value is None else str(getattr(value, "name", value))
        for choice in action.choices:
            if (word := str(getattr(choice, "name", choice))) != base:
                yield (f"[{word}]", f"[{base}]") if action.nargs == "+" else (word, base)


@dataclass
class Job:
    """How one ended."""

    ended: str
    """"ok", "rejected", "traceback" or "hang"."""
    said: str = ""
    losses: dict[str, list[float]] = field(default_factory=dict)
    config: str = ""


class ContextFails(Exception):
    """The installed Megatron, or the CPU stand-in, cannot train in a context at all."""


class Fuzz:
    """The workspace, and what is run in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = folder / "config.yaml"
        self._lock = Lock()
        self._failed: dict[str, str] = {}

    def prepare(self) -> None:
        """Data, a teacher, and a student of each context."""
        if not self.config.exists():
            from conftest import CONFIG  # here, since every rank imports this module

            self.folder.mkdir(parents=True, exist_ok=True)
            text = Path(sysconfig.get_path("stdlib")) / "email"
            self.config.write_text(CONFIG.format(text=text, data=self.folder / "data"))
            run_job("prepare", self.config)
        if not (self.folder / "teacher").exists():
            of_it = {"num-layers": 4, "hidden-size": 48, "ffn-hidden-size": 96, "seed": 7}
            saved = {"train-iters": 8, "save": self.folder / "teacher", "save-interval": 8}
            run_job("pretrain", self.config, overrides(of_it | saved))

    def student(self, context: str) -> Path:
        """The checkpoint of a student of this context after one step."""
        of = CONTEXTS[context].student
        path = self.folder / f"student {context if of else 'plain'}"
        with self._lock:
            if context in self._failed:
                raise ContextFails(self._failed[context])
            if not path.exists():
                made = self.make_student(overrides(of), path)
                if made.ended != "ok":
                    shutil.rmtree(path, ignore_errors=True)
                    self._failed[context] = made.said
                    raise ContextFails(made.said)
        return path

    def make_student(self, settings: Mapping[str, object], path: Path) -> Job:
        """Train one for one step, and save it."""
        saved = overrides({"train-iters": 1, "save": path, "save-interval": 1})
        return self.run("pretrain", {**settings, **saved}, 1)

    def settings(self, context: str, option: Settings, student: Path | None = None) -> dict[str, object]:
        """What a job has in this context, with a teacher; the later of two spellings of one argument counts."""
        of = CONTEXTS[context]
        base = {"train-iters": 2, "finetune": "true", "override-opt_param-scheduler": "true"}
        base["load"] = student or self.student(context)
        merged = overrides({**base, **of.student, **of.beside, **of_teacher(of.teacher)})
        merged["teacher.load"] = self.folder / "teacher"
        for name, value in overrides(option).items():
            section, _, key = name.partition(".")
            for twin in [it for it in merged if it.startswith(f"{section}.") and _dest(it) == _dest(name)]:
                del merged[twin]
            merged[f"{section}.{key}"] = value
        return merged

    def run(self, job: str, settings: Mapping[str, object], num_ranks: int) -> Job:
        """Run one, and read what it logged."""
        while (found := self._run(job, settings, num_ranks)) is None:
            pass  # the fork server lost sight of a rank, which happens when it is asked from several threads
        return found

    def _run(self, job: str, settings: Mapping[str, object], num_ranks: int) -> Job | None:
        folder = Path(tempfile.mkdtemp(dir=self.folder, prefix="job-"))
        try:
            # "save" has a folder of each job.
            words = [f"{key}={str(value).format(folder=folder / 'saved')}" for key, value in settings.items()]
            words += [f"megatron.tensorboard-dir={folder / 'tensorboard'}"]
            command = ["-m", "abkd_megatron", job, "--config", self.config, *words]
            ranks = launch(command, num_ranks, timeout_seconds=240, seconds_after_failure=50)
            if any(rank.code == 255 for rank in ranks):
                return None
            ended = _ended(ranks, job)
            if ended.ended == "ok":
                read = scalars(folder / "tensorboard") if (folder / "tensorboard").is_dir() else {}
                names = (*LOSSES, "grad-norm", "total loss validation", "lm loss validation")
                ended.losses = {name: read[name] for name in names if name in read}
            return ended
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    @cache  # noqa: B019
    def reference(self, context: str) -> Job:
        """The job of this context without any option, on one rank."""
        found = self.run("distill", self.settings(context, {}), 1)
        if found.ended != "ok":
            self._failed[context] = found.said
            raise ContextFails(found.said)
        return found


def _dest(name: str) -> str:
    return _known().dest(name.partition(".")[2]) if name.partition(".")[2] != "load" else name


@cache
def _known() -> Any:
    from abkd_megatron.config.megatron_args import megatron_options
    from abkd_megatron.config.values import MegatronOptions

    return MegatronOptions(megatron_options())


def _ended(ranks: Sequence[Rank], job: str) -> Job:
    codes = [rank.code for rank in ranks]
    if not any(codes):
        return Job("ok")
    output = "\n".join(rank.output for rank in ranks)
    waits = re.findall(r"^.*(?:StrictError: |[Tt]imed out).*$", output, re.MULTILINE)
    if -9 in codes or waits:
        kind = "hang" if -9 in codes or "imed out" in "".join(waits) else "traceback"
        said = min(waits, key=lambda line: "StrictError: " not in line) if waits else output.strip()[-200:]
        return Job(kind, _short(said))
    errors = re.findall(rf"abkd-megatron {job}: error: (.*)", output)
    if set(codes) == {2} and errors and "Traceback" not in output:
        late = errors[0].startswith("ended before the first step")  # what nobody rejects by name
        return Job("traceback" if late else "rejected", _short(errors[0]))
    lines = [
        line for line in output.splitlines() if re.match(r"(\[rank\d+\]: )?[\w.]*(Error|Exception|Interrupt)\b", line)
    ]
    said = lines[0] if lines else output.strip()[-300:]
    return Job("traceback", _short(f"exit {codes}: {said} @ {_innermost(output)}"))


def _innermost(output: str) -> str:
    """The last frames of the first traceback."""
    block = output.partition("Traceback (most recent call last)")[2]
    frames = re.findall(r'File "([^"]+)", line (\d+), in (\w+)', block.split("\n\n")[0])
    return " < ".join(f"{Path(file).name}:{line} {name}" for file, line, name in reversed(frames[-3:]))


def _short(text: str) -> str:
    return " ".join(text.split())[:400]


@dataclass
class Looked:
    """What `check` says."""

    verdict: str
    """"ok", "rejected" or "crashed"."""
    said: str = ""
    of: str = ""
    """What is refused: student, teacher, teacher's checkpoint..."""


_looking = Lock()


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Megatron parses this process's command line, and changes its environment: one at a time, and back to what was."""
    with _looking, contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings(action="ignore"):
        environment = dict(os.environ)
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(environment)


def look(fuzz: Fuzz, settings: Mapping[str, object], num_ranks: int, *, device: str = "cpu") -> Looked:
    """Run `check` in this process."""
    from abkd_megatron.errors import AbkdError
    from abkd_megatron.preflight.rules import Verdict
    from abkd_megatron.tools.check import check

    words = [f"{key}={str(value).format(folder=fuzz.folder / 'none')}" for key, value in settings.items()]
    try:
        with _alone():
            findings = check(_load(fuzz.config, [*words, f"device={device}"], device), num_ranks)
    except AbkdError as error:
        return Looked("rejected", _short(str(error)), "settings")
    except BaseException as error:  # what leaves `check` by any other way is what is looked for
        if isinstance(error, KeyboardInterrupt):
            raise
        where = traceback.extract_tb(error.__traceback__)[-1]
        return Looked(
            "crashed", _short(f"{type(error).__name__}: {error} @ {Path(where.filename).name}:{where.lineno}")
        )
    wrong = [finding for finding in findings if finding.verdict is Verdict.REJECTED]
    if wrong:
        return Looked("rejected", _short(wrong[0].found), wrong[0].what)
    return Looked("ok")


def _load(path: Path, words: Sequence[str], device: str) -> Any:
    from abkd_megatron import cpu_backend
    from abkd_megatron.config.load import load_config
    from abkd_megatron.config.megatron_args import megatron_options

    return load_config(
        path, words, megatron_options(), lambda device: cpu_backend.MEGATRON_DEFAULTS if device == "cpu" else {}
    )


def built(fuzz: Fuzz, settings: Mapping[str, object]) -> str:
    """The configurations that Megatron makes of the student's arguments, as text."""
    from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args

    from abkd_megatron.tools import dry_run

    words = [f"{key}={str(value).format(folder=fuzz.folder / 'none')}" for key, value in settings.items()]
    with _alone():
        config = _load(fuzz.config, words, "cpu")
        with dry_run.as_in_a_job(config, 2):
            args = dry_run.student_arguments(dry_run.arguments_with_data(config))
            dry_run.set_vocabulary(args)
            model = gpt_config_from_args(args)
            made = pretrain_cfg_container_from_args(args, model)
            return re.sub(" at 0x[0-9a-f]+", "", f"{made} {model} {model.transformer} {args.padded_vocab_size}")


def try_case(fuzz: Fuzz, case: Case) -> dict[str, Any]:
    """What comes of it."""
    from abkd_megatron.teacher.inherited import MODEL, kind_of

    shapes = kind_of(case.dest, case.group) == MODEL
    layout = CONTEXTS[case.context].layout
    if shapes and layout == "DP 2":
        layout = "TP 2, SP" if case.context == "MoE" else "TP 2"  # Megatron wants it of experts
    with tempfile.TemporaryDirectory(dir=fuzz.folder, prefix="student-") as folder:
        found = {"context": case.context, "layout": layout}
        try:
            return found | _try(fuzz, case, layout, Path(folder) / "checkpoint" if shapes else None)
        except ContextFails as error:
            return found | {"class": MEGATRONS, "said": f"without this option, too: {error}"}


def _try(fuzz: Fuzz, case: Case, layout: str, student: Path | None) -> dict[str, Any]:
    """The same, of a student of its own if a path of one is given."""
    found: dict[str, Any] = {}
    option = {case.option: case.value}

    def settings(*more: Settings, own: bool = True) -> dict[str, object]:
        merged: dict[str, object] = {}
        for it in more:
            merged |= it
        return fuzz.settings(case.context, {**merged, **option}, student if own else None)

    def plain(*more: Settings, own: bool = True) -> dict[str, object]:
        return {name: value for name, value in settings(*more, own=own).items() if not name.startswith("teacher.")}

    looked = look(fuzz, settings(own=False), 1)
    kept: Settings = {}
    if looked.verdict == "rejected" and looked.of.startswith("teacher"):
        # As it has to be said of a teacher that differs in it.
        found["with the teacher's inherited"] = looked.said
        kept = of_teacher({case.option: case.base})
        looked = look(fuzz, settings(kept, own=False), 1)
    on_gpus = look(fuzz, settings(kept, own=False), 2, device="cuda")
    if on_gpus.verdict == "crashed":
        return found | {"class": CRASHED, "said": f"device: cuda: {on_gpus.said}"}
    if looked.verdict == "ok":
        looked = look(fuzz, settings(kept, LAYOUTS[layout], own=False), 2)
    if looked.verdict == "crashed":
        return found | {"class": CRASHED, "said": looked.said}
    if looked.verdict == "rejected":
        if look(fuzz, plain(LAYOUTS[layout], own=False), 2).verdict == "ok":
            found["only with a teacher"] = True
        return found | {"class": REFUSED, "said": f"{looked.of}: {looked.said}"}
    if case.not_run is not None:
        return found | {"class": NOT_RUN, "said": case.not_run}

    if student is not None:
        begins = {name: value for name, value in plain().items() if _dest(name) not in ("load", "finetune")}
        made = fuzz.make_student(begins, student)
        if made.ended != "ok":
            return found | {"class": MEGATRONS, "said": made.said}
    one = fuzz.run("distill", settings(kept), 1)
    fused = {"distillation.head": "fused"}  # on two ranks where it can be: one rank has the other one
    if look(fuzz, settings(kept, LAYOUTS[layout], fused), 2).verdict != "ok":
        fused = {}
    two = fuzz.run("distill", settings(kept, LAYOUTS[layout], fused), 2)
    if fused and two.ended == "rejected" and "fused" in two.said:
        found["head"] = two.said
        two = fuzz.run("distill", settings(kept, LAYOUTS[layout]), 2)
    found |= _classified(case, fuzz.reference(case.context), one, two)
    if found["said"] == TO_THE_BIT and built(fuzz, settings()) == built(fuzz, fuzz.settings(case.context, {})):
        found["no effect seen"] = True
    if found["class"].startswith("FAULT"):
        alone = fuzz.run("pretrain", plain(), 1), fuzz.run("pretrain", plain(LAYOUTS[layout]), 2)
        found["without a teacher"] = _classified(case, None, *alone)
    return found


def _classified(case: Case, reference: Job | None, one: Job, two: Job) -> dict[str, str]:
    """The class of these two jobs, beside that of a reference without the option."""
    for number, job in ((1, one), (2, two)):
        if job.ended == "hang":
            return {"class": HANG, "said": f"{number} ranks: {job.said}"}
        if job.ended == "traceback":
            return {"class": TRACEBACK, "said": f"{number} ranks: {job.said}"}
    rejected = [job for job in (one, two) if job.ended == "rejected"]
    if len(rejected) == 2:
        return {"class": LATE, "said": rejected[0].said}
    if rejected:
        number = 1 if one.ended == "rejected" else 2
        return {"class": LATE, "said": f"{number} ranks alone: {rejected[0].said}"}
    rounds = not CONTEXTS[case.context].exact or case.option in ("bf16", "fp16")
    across, within = (2e-2, 2e-2) if rounds else (1e-4, 1e-5)
    if apart := _apart(one, two, across, range(2)):
        return {"class": DIFFERS, "said": apart}
    if reference is None:
        return {"class": "ok"}
    if "lm loss" not in one.losses:
        return {"class": CHANGES, "said": "no step was logged"}
    data = case.group in ("data and dataloader", "tokenizer") or case.option in ("dataloader-type", "finetune")
    if not data and (apart := _apart(reference, one, max(within, 1e-5), range(1), ("teacher lm loss",))):
        return {"class": TEACHER, "said": apart}
    if apart := _apart(reference, one, within, range(1), LOSSES):
        return {"class": CHANGES, "said": apart}
    equal = reference.losses == one.losses
    return {"class": SAME, "said": TO_THE_BIT if equal else "step 1 within 1e-5, later numbers differ"}


def _apart(first: Job, second: Job, tolerance: float, steps: range, names: Sequence[str] = ()) -> str:
    """The first number in which two jobs are further apart than that."""
    names = names or tuple(dict.fromkeys([*first.losses, *second.losses]))
    for name in names:
        a, b = first.losses.get(name), second.losses.get(name)
        if a is None and b is None:
            continue
        if a is None or b is None:
            return f"{name} is logged by one of them"
        for step in steps:
            if step >= len(a) or step >= len(b):
                if len(a) != len(b):
                    return f"{name}: {len(a)} against {len(b)} steps"
                continue
            if not math.isclose(a[step], b[step], rel_tol=tolerance, abs_tol=tolerance):
                return f"{name} of step {step + 1}: {a[step]:.6f} against {b[step]:.6f}"
    return ""


def summary(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Counts and faults, as Markdown."""
    classes = Counter(_class_of(of) for of in found.values())
    lines = ["| class | values |", "|---|---|", *(f"| {name} | {count} |" for name, count in sorted(classes.items()))]
    lines += ["", "| fault | what | without a teacher |", "|---|---|---|"]
    for name, of in found.items():
        if of["class"].startswith("FAULT"):
            plain = of.get("without a teacher", {})
            beside = f"{plain.get('class', '')} {plain.get('said', '')}".strip()
            lines.append(f"| {name} ({of['context']}, {of['layout']}) | {of['class']}: {of['said']} | {beside} |")
    return "\n".join(lines)


def as_json(found: Mapping[str, Mapping[str, Any]]) -> str:
    """A line for each value."""
    lines = [f"{json.dumps(name)}: {json.dumps(found[name], sort_keys=True)}" for name in sorted(found)]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def unseen(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Values without an effect on Megatron's configurations or on any number."""
    return sorted(name for name, of in found.items() if of.get("no effect seen"))


def _class_of(of: Mapping[str, Any]) -> str:
    plain = of.get("without a teacher", {}).get("class", "")
    return MEGATRONS if plain and plain != "ok" else of["class"]


def _arguments() -> Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shard", default="0/1", metavar="I/N", help="every N-th value, from the I-th on")
    parser.add_argument("--only", default="", metavar="PATTERN", help="values whose OPTION=VALUE matches")
    parser.add_argument("--out", type=Path, default=Path("option_fuzz.json"), metavar="FILE")
    parser.add_argument("--workspace", type=Path, metavar="DIR", help="where data and checkpoints are, or are made")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="at a time")
    parser.add_argument("--list", action="store_true", help="name the values and run nothing")
    parser.add_argument("--again", action="store_true", help="also those that FILE has")
    return parser.parse_args()


def main() -> None:
    """Run a shard."""
    os.environ.setdefault("STRICT_TIMEOUT", "40")  # the ranks', which are forked later: none waits longer for another
    arguments = _arguments()
    from abkd_megatron.config.megatron_args import megatron_options

    with tempfile.TemporaryDirectory() as temporary:
        fuzz = Fuzz(arguments.workspace or Path(temporary))
        fuzz.prepare()
        given = _load(fuzz.config, ["device=cpu"], "cpu").megatron
        logging.getLogger("tensorboard").setLevel(logging.WARNING)
        index, of = map(int, arguments.shard.split("/"))
        chosen = [case for case in cases(megatron_options(), given) if re.search(arguments.only, str(case))]
        chosen = sorted(chosen, key=lambda case: case.context == "saved")[index::of]
        if arguments.list:
            for case in chosen:
                print(f"{case}  ({case.group}; {case.context}; {case.not_run or 'run'})")
            return
        found = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
        lock = Lock()

        def run(case: Case) -> None:
            if str(case) in found and not arguments.again:
                return
            try:
                one = try_case(fuzz, case)
            except Exception as error:  # the script's own; the others go on
                traceback.print_exc()
                one = {"class": "script failed", "said": _short(repr(error)), "context": case.context, "layout": ""}
            with lock:
                found[str(case)] = one
                arguments.out.write_text(as_json(found))
                # Another thread may have taken stdout, for Megatron's words.
                print(f"{case}: {one['class']}: {one.get('said', '')[:160]}", file=sys.__stdout__, flush=True)

        with ThreadPoolExecutor(arguments.jobs) as pool:
            list(pool.map(run, chosen))
        print(summary(found))


if __name__ == "__main__":
    main()
