"""The command line: prepare data, pretrain a teacher, distill a student, compare losses, and look before one runs."""

import argparse
import logging
import math
import os
import signal
import sys
import textwrap
import traceback
import warnings
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from abkd_megatron.errors import AbkdError, ConfigError, HostError, check_name

if TYPE_CHECKING:
    from abkd_megatron.config.schema import Config

PROG = "abkd-megatron"
_DESCRIPTION = "Distill a large teacher into a smaller student inside Megatron-Core's own training loop."
_SETTINGS = """\
A job that takes CONFIG takes settings behind it that beat the file's: section.key=value, the value as in YAML. Sections
are device, megatron (any argument of Megatron's, without its dashes), teacher, distillation, data, compare.
`abkd-megatron JOB --help` has more examples."""
_CODES = "0; 2 and one message on stderr if something cannot be run, before the first step"
_CODES_OF_TRAINING = f"{_CODES}, on every rank; 1 and a message below the traceback if it ends by an error after that"


@dataclass(frozen=True)
class Job:
    """One thing that the command line does."""

    run: Callable[[Namespace], int | None]
    """Does it; returns the exit code, None for 0."""
    summary: str
    """What for, in a few words."""
    examples: tuple[str, ...]
    """Command lines that are true; the first stands in the overview."""
    reads: str = ""
    writes: str = ""
    codes: str = _CODES
    """Exit codes."""
    takes_config: bool = True
    """Whether CONFIG and settings may follow."""
    options: Callable[[argparse.ArgumentParser], object] = lambda parser: None
    """Adds what it takes beside that."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one job; returns the exit code.

    That is 0; 2, with one message on stderr, when something cannot be run; 1, with a message below the traceback, when
    training ends by an error that was not foreseen; 130 for an interrupted comparison. Some jobs have more, see their
    help.
    """
    job = None
    try:
        try:
            arguments = parse(argv)
            job = JOBS[arguments.job]
            return job.run(arguments) or 0
        except AbkdError as error:
            _say(arguments.job, f"error: {error}")
            return 2
        finally:
            sys.stdout.flush()  # here, where it can be told that nobody reads any more
    except BrokenPipeError:
        if job is not None and job.run is _train:  # cut short, and it may have been another pipe
            raise
        # Who read our output has seen enough, as `head` has; what is left of it has to go somewhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _say(job: str, message: str) -> None:
    several = os.environ.get("WORLD_SIZE", "1") != "1" and "RANK" in os.environ
    rank = f"[rank {os.environ['RANK']}] " if several else ""
    print(f"{rank}{PROG} {job}: {message}", file=sys.stderr, flush=True)


def parse(argv: Sequence[str] | None = None) -> Namespace:
    """The arguments of a command line; ends the process as argparse does.

    Returns:
        `job`; for jobs that take a configuration `config` (a path or None) and `overrides`; and what the job adds.
    """
    parser = make_parser()
    given = sys.argv[1:] if argv is None else argv
    if given and not given[0].startswith("-"):
        try:
            check_name(given[0], JOBS, "command line", "job")
        except ConfigError as error:
            parser.error(str(error))
    arguments, behind = parser.parse_known_args(given)
    # Settings may stand on both sides of an option, which argparse has no word for.
    unknown = [word for word in behind if word.startswith("-") or not JOBS[arguments.job].takes_config]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}; see {PROG} {arguments.job} --help")
    if JOBS[arguments.job].takes_config:
        words = [*arguments.words, *behind]
        del arguments.words
        arguments.overrides = words
        if words and "=" not in words[0]:
            if arguments.config is not None:
                parser.error(
                    f"expected one configuration, got --config {arguments.config} and {words[0]!r} (a setting is "
                    "section.key=value); remove one"
                )
            arguments.config, arguments.overrides = Path(words[0]), words[1:]
    return arguments


def make_parser() -> argparse.ArgumentParser:
    """The parser of all jobs, without what `parse` does behind it."""
    width = max(map(len, JOBS)) + 2
    listed = "\n".join(
        f"  {name:<{width}}{job.summary}\n  {'':<{width}}  {job.examples[0]}" for name, job in JOBS.items()
    )
    parser = argparse.ArgumentParser(
        prog=PROG,
        usage=f"{PROG} JOB [CONFIG] [section.key=value ...]",
        description=f"{_DESCRIPTION}\n\njobs, in the order of use:\n{listed}",
        epilog=_SETTINGS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    jobs = parser.add_subparsers(dest="job", required=True, metavar="JOB", prog=PROG, help=argparse.SUPPRESS)
    for name, job in JOBS.items():
        what = {"reads": job.reads, "writes": job.writes, "exit code": job.codes}
        rows = [
            textwrap.fill(text, 100, initial_indent=f"{title:<11}", subsequent_indent=" " * 11)
            for title, text in what.items()
            if text
        ]
        described = jobs.add_parser(
            name,
            description="\n".join([f"{job.summary[0].upper()}{job.summary[1:]}.", "", *rows]),
            epilog="\n".join(["examples:", *(f"  {line}" for line in job.examples)]),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if job.takes_config:
            described.add_argument(
                "words", nargs="*", metavar="CONFIG section.key=value", help="a YAML file, and settings that beat its"
            )
            described.add_argument(
                "--config", type=Path, metavar="FILE", help="the YAML file, if it is not named first"
            )
        job.options(described)
    return parser


def load(arguments: Namespace, more: Sequence[str] = ()) -> "Config":
    """The configuration of a command line, with more settings behind it; not checked.

    Raises:
        AbkdError: as `load_config`, and beside an unrelated `apex`.
    """
    _refuse_unrelated_apex()
    _quieten_fallback_warnings()
    # Only here: importing Megatron takes seconds, and --help should not.
    from abkd_megatron import cpu_backend
    from abkd_megatron.config.load import load_config
    from abkd_megatron.config.megatron_args import megatron_options

    return load_config(
        arguments.config,
        [*arguments.overrides, *more],
        megatron_options(),
        lambda device: cpu_backend.MEGATRON_DEFAULTS if device == "cpu" else {},
    )


def _env(arguments: Namespace) -> int:
    from abkd_megatron.tools import env

    return env.main()


def _show_config(arguments: Namespace) -> None:
    config = load(arguments)
    from abkd_megatron.config.load import render

    print(render(config), end="")


def _check(arguments: Namespace) -> int:
    os.environ["HF_HUB_OFFLINE"] = "1"  # a tokenizer of Hugging Face is looked for on this machine alone
    config = load(arguments)
    from abkd_megatron.tools import check

    return check.main(config, arguments.world_size)


def _estimate(arguments: Namespace) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"  # as `check`
    picture = arguments.out / "estimate.png" if arguments.out else None
    if picture is not None and picture.exists():
        raise ConfigError(f"--out: expected a folder without {picture.name}, and {picture} is there; remove it first")
    config = load(arguments)
    from abkd_megatron.tools.estimate import estimate
    from abkd_megatron.tools.estimate_view import show

    found = estimate(
        config,
        arguments.world_size,
        gpu_memory=arguments.gpu_memory,
        alternatives=arguments.alternatives,
        progress=lambda text: print(text, file=sys.stderr),
    )
    show(found, arguments.out)


def _prepare(arguments: Namespace) -> None:
    config = load(arguments)
    config.check("prepare")
    from abkd_megatron.data.prepare import prepare

    prepare(config.data)


def _train(arguments: Namespace) -> int:
    _check_launch()
    config = load(arguments)
    config.check(arguments.job)
    from abkd_megatron import cpu_backend
    from abkd_megatron.hosts import megatron_lm
    from abkd_megatron.hosts.crash_report import UNFORESEEN, has_begun, last_words
    from abkd_megatron.hosts.startup_errors import OneVoice

    if config.device == "cuda":
        _require_gpu()
    _show_log()
    voice = OneVoice(partial(_say, arguments.job), debug=arguments.debug)
    try:
        with voice:
            if config.device == "cpu":
                cpu_backend.install()
                minutes = config.megatron.get("distributed-timeout-minutes", 10)
                cpu_backend.init_process_group(timedelta(minutes=float(str(minutes))))
            megatron_lm.run(config, arguments.job)
    except UNFORESEEN as error:
        if not has_begun(error):
            voice.speak(error)
            return 2
        if isinstance(error, AbkdError):
            raise
        traceback.print_exception(error)
        _say(arguments.job, last_words(error))
        return 1
    return 0


def _compare(arguments: Namespace) -> int:
    try:
        config = load(arguments)
        config.check("compare")
        from abkd_megatron.tools.compare import compare

        signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the runs end with us
        compare(config, lambda settings: load(arguments, settings))
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def _report(arguments: Namespace) -> None:
    from abkd_megatron.tools.report import write_report

    print(write_report(arguments.runs, arguments.out))


def _runs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="a run's directory, up to 8, or a folder of runs"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="the page; of one RUN by default RUN/report.html")


def _debug(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--debug", action="store_true", help="print the traceback of an error before the first step, too"
    )


def _world_size(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--world-size",
        type=_positive,
        metavar="N",
        help="ranks of the job (default: $WORLD_SIZE, or the fewest that the layouts of both models allow)",
    )


def _of_estimate(parser: argparse.ArgumentParser) -> None:
    _world_size(parser)
    parser.add_argument("--gpu-memory", type=_gib, default=80.0, metavar="GIB", help="of a GPU (default: 80)")
    parser.add_argument("--alternatives", action="store_true", help="other TP, PP and micro-batches, too: minutes")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to draw estimate.png")


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)


def _gib(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return number


_TORCHRUN = "torchrun --nproc-per-node {} -m abkd_megatron"

JOBS = {
    "env": Job(
        _env,
        "say what is installed here, what each part is for and how to get it",
        (f"{PROG} env",),
        codes="0; 2 if something that every job needs is missing or wrong",
        takes_config=False,
    ),
    "prepare": Job(
        _prepare,
        "turn text into a SentencePiece model and Megatron's indexed datasets",
        (
            f"{PROG} prepare configs/tiny_cpu_teacher.yaml",
            f"{PROG} prepare configs/tiny_cpu_teacher.yaml data.source=[README.md,docs] data.dir=runs/docs",
        ),
        reads="data.source: text files, folders, globs, or `python` for the text that ships with Python",
        writes="data.dir, whole or not at all; one that is there is never written to",
    ),
    "check": Job(
        _check,
        "look at a configuration without a GPU, without its ranks, without training",
        (
            f"{PROG} check configs/tiny_cpu.yaml",
            f"{PROG} check configs/tiny_cpu.yaml --world-size 8 megatron.global-batch-size=32",
            f"{PROG} check configs/tiny_cpu.yaml device=cuda megatron.bf16=true megatron.tensor-model-parallel-size=4",
        ),
        reads="CONFIG, and of data.dir, tokenizer and checkpoints what is on this machine; no network",
        writes="nothing; what it looked at to stdout: ok, not here (so not looked at), or refused, with a job's words",
        codes="0; 2 if anything is refused",
        options=_world_size,
    ),
    "estimate": Job(
        _estimate,
        "count what a rank will hold in memory and what a token takes, without a GPU",
        (
            f"{PROG} estimate configs/tiny_cpu.yaml",
            f"{PROG} estimate configs/tiny_cpu.yaml --world-size 4 megatron.micro-batch-size=4",
        ),
        reads="CONFIG, and data.dir or a tokenizer if they are on this machine; no checkpoint, no network",
        writes="a table to stdout; --out DIR: estimate.png",
        codes="0; 2 and one message on stderr for what a job would refuse, and for what cannot be counted",
        options=_of_estimate,
    ),
    "show-config": Job(
        _show_config,
        "print the merged configuration and where each value came from",
        (
            f"{PROG} show-config configs/tiny_cpu.yaml",
            f"{PROG} show-config configs/tiny_cpu.yaml distillation.divergence=todi",
        ),
        reads="CONFIG",
        writes="YAML to stdout that loads again as the same configuration",
        codes="0; 2 and one message on stderr for what is unknown, given twice or of the wrong type",
    ),
    "pretrain": Job(
        _train,
        "train without a teacher: the teacher itself, or a student to compare with",
        (
            f"{_TORCHRUN.format(2)} pretrain configs/tiny_cpu_teacher.yaml",
            f"{PROG} pretrain configs/tiny_cpu_teacher.yaml megatron.train-iters=100 megatron.save=runs/short",
        ),
        reads="data.dir (or Megatron's own data arguments), megatron.load if it is given",
        writes="megatron.save, megatron.tensorboard-dir; Megatron's log to stdout",
        codes=_CODES_OF_TRAINING,
        options=_debug,
    ),
    "distill": Job(
        _train,
        "train a student beside its teacher",
        (
            f"{_TORCHRUN.format(4)} distill configs/tiny_cpu.yaml",
            f"{_TORCHRUN.format(4)} distill configs/tiny_cpu.yaml distillation.alpha=0.3 megatron.train-iters=100",
            f"{_TORCHRUN.format(4)} distill configs/tiny_cpu.yaml distillation.divergence=todi megatron.save=runs/todi",
        ),
        reads="teacher.load, data.dir (or Megatron's own data arguments), megatron.load if it is given",
        writes="megatron.save, megatron.tensorboard-dir; Megatron's log to stdout",
        codes=_CODES_OF_TRAINING,
        options=_debug,
    ),
    "compare": Job(
        _compare,
        "train students with several losses and seeds beside one teacher, and tell them apart",
        (
            f"{PROG} compare configs/tiny_cpu_compare.yaml",
            f"{PROG} compare configs/tiny_cpu_compare.yaml compare.seeds=[1,2] compare.out=runs/two-seeds",
        ),
        reads="what `distill` reads; compare.out, where an interrupted comparison goes on",
        writes="compare.out: each run's configuration, log and result; table.md, results.json, comparison.png",
        codes=f"{_CODES}; 130 if it was interrupted",
    ),
    "report": Job(
        _report,
        "make one HTML page with the curves of a run, or of several over each other",
        (
            f"{PROG} report runs/demo/student",
            f"{PROG} report runs/demo/student runs/demo/student-alone --out runs/both.html",
        ),
        reads="the TensorBoard event files that Megatron wrote in RUN",
        writes="the page; a file that is there is only replaced if it is such a page",
        codes="0; 2 and one message on stderr if there is nothing to show or no place to write to",
        takes_config=False,
        options=_runs,
    ),
}


def _show_log() -> None:
    """What this package logs once goes to stdout, from the rank that prints Megatron's own log: the last.

    Megatron gives the root logger a handler on every rank, through which the others still warn.
    """
    logger = logging.getLogger("abkd_megatron")
    last = int(os.environ.get("RANK", "0")) == int(os.environ.get("WORLD_SIZE", "1")) - 1
    if last:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("abkd_megatron: %(message)s"))
        logger.handlers = [handler]
    logger.setLevel(logging.INFO if last else logging.WARNING)
    logger.propagate = not last


def _check_launch() -> None:
    """The variables by which torchrun and its like tell a rank which one it is.

    Raises:
        HostError: one of them is no number, is missing, or is not of the job.
    """
    given = {name: os.environ[name] for name in ("RANK", "WORLD_SIZE") if name in os.environ}
    shown = ", ".join(f"{name}={value}" for name, value in given.items())
    remedy = "start ranks by torchrun, or unset both for a job of one process"
    if not all(value.isdecimal() for value in given.values()):
        raise HostError(f"expected whole numbers in RANK and WORLD_SIZE, got {shown}; {remedy}")
    world_size = int(given.get("WORLD_SIZE", 1))
    if world_size > 1 and "RANK" not in given:
        raise HostError(f"expected RANK beside WORLD_SIZE={world_size}, got none; {remedy}")
    if not int(given.get("RANK", 0)) < world_size:
        raise HostError(f"expected RANK below WORLD_SIZE, got {shown or 'neither'}; {remedy}")
    if world_size > 1 and "MASTER_PORT" not in os.environ:
        raise HostError(f"expected MASTER_ADDR and MASTER_PORT beside {shown}, got none; {remedy}")


def _require_gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        raise HostError(
            "expected an NVIDIA GPU, found none; set `device: cpu` to train a small model on the CPU, or install a "
            "CUDA build of torch"
        )


def _quieten_fallback_warnings() -> None:
    """Without a GPU, what Megatron says at import about TransformerEngine and apex is no news."""
    import torch

    if not torch.cuda.is_available():
        warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.")


def _refuse_unrelated_apex() -> None:
    from abkd_megatron.tools.env import unrelated_apex

    if unrelated_apex():
        raise HostError(
            "the installed `apex` is not NVIDIA's but an unrelated package from PyPI, which Megatron would import by "
            "mistake; remove it with `pip uninstall apex`"
        )


if __name__ == "__main__":
    sys.exit(main())
