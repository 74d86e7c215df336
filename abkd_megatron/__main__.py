"""The command line: one function per job."""

import argparse
import os
import signal
import sys
import textwrap
import traceback
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from abkd_megatron.errors import AbkdError, ConfigError, check_name
from abkd_megatron.tools import options

if TYPE_CHECKING:
    from abkd_megatron.config.schema import Config

PROG = "abkd-megatron"
_DESCRIPTION = "Knowledge distillation inside Megatron-Core's training loop."
_SETTINGS = """\
Settings after CONFIG override the file: section.key=value, with the value in YAML. Sections are device, megatron (any
Megatron argument, without its dashes), teacher, teachers (a list, as one value), distillation, data, validation, cache,
generate, compare. `abkd-megatron JOB --help` lists inputs, outputs, exit codes and examples."""
_CODES = "0; 2 and one message on stderr for a job that cannot run, before the first step"
_CODES_OF_TRAINING = f"{_CODES}, on every rank; 1 and a message below the traceback for an error after that"


@dataclass(frozen=True)
class Job:
    """A job of the command line."""

    run: Callable[[Namespace], int | None]
    """Run the job; return the exit code, None for 0."""
    summary: str
    """Purpose in a few words."""
    examples: tuple[str, ...]
    """Tested command lines; the overview shows the first."""
    reads: str = ""
    writes: str = ""
    codes: str = _CODES
    """Exit codes."""
    takes_config: bool = True
    """Whether the job takes CONFIG and settings."""
    options: Callable[[argparse.ArgumentParser], object] = lambda parser: None
    """Adds the job's own options."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one job and return the exit code.

    The code is 0 on success; 2, with one message on stderr, for a job that cannot run; 1, with a message below the
    traceback, for an unexpected error in training; 130 for an interrupted comparison.
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
            sys.stdout.flush()  # here, where a closed pipe is handled
    except BrokenPipeError:
        if job is not None and job.run is _train:  # cut short, perhaps by another pipe
            raise
        # The reader closed the pipe, as `head` does; the interpreter still flushes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _say(job: str, message: str) -> None:
    several = os.environ.get("WORLD_SIZE", "1") != "1" and "RANK" in os.environ
    rank = f"[rank {os.environ['RANK']}] " if several else ""
    print(f"{rank}{PROG} {job}: {message}", file=sys.stderr, flush=True)


def parse(argv: Sequence[str] | None = None) -> Namespace:
    """Parse a command line; exit as argparse does on an error.

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
    # Settings may come before and after an option, which argparse cannot express.
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
    """Build the parser of all jobs."""
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
    """Load the configuration of a command line, unchecked, with `more` settings after its own.

    Raises:
        AbkdError: as `load_config`, or an unrelated `apex` is installed.
    """
    from abkd_megatron.hosts import launch

    launch.reject_unrelated_apex()
    launch.silence_fallback_warnings()
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
    os.environ["HF_HUB_OFFLINE"] = "1"  # only local tokenizers
    config = load(arguments)
    from abkd_megatron.tools import check

    return check.main(config, arguments.world_size)


def _estimate(arguments: Namespace) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"  # as `check`
    picture = arguments.out / "estimate.png" if arguments.out else None
    if picture is not None and picture.exists():
        raise ConfigError(f"--out: expected a folder without {picture.name}, found {picture}; remove it first")
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
    from abkd_megatron.hosts import launch

    launch.check_launcher()
    config = load(arguments)
    config.check(arguments.job)
    from abkd_megatron import cpu_backend
    from abkd_megatron.hosts import cache_job, generate_job, megatron_lm, rouge_job
    from abkd_megatron.hosts.crash_report import UNEXPECTED, describe_crash, training_started
    from abkd_megatron.hosts.startup_errors import StartupErrors

    if config.device == "cuda":
        launch.require_gpu()
    launch.log_to_stdout()
    startup_errors = StartupErrors(partial(_say, arguments.job), debug=arguments.debug)
    try:
        with startup_errors:
            if config.device == "cpu":
                cpu_backend.install()
                minutes = config.megatron.get("distributed-timeout-minutes", 10)
                cpu_backend.init_process_group(timedelta(minutes=float(str(minutes))))
            else:
                cpu_backend.use_compiled_helpers()
            if arguments.job == "cache":
                cache_job.run(config)
            elif arguments.job == "rouge":
                rouge_job.run(config)
            elif arguments.job == "generate":
                generate_job.run(config)
            else:
                megatron_lm.run(config, arguments.job)
    except UNEXPECTED as error:
        if not training_started(error):
            startup_errors.report(error)
            return 2
        if isinstance(error, AbkdError):
            raise
        traceback.print_exception(error)
        _say(arguments.job, describe_crash(error))
        return 1
    return 0


def _compare(arguments: Namespace) -> int:
    try:
        config = load(arguments)
        config.check("compare")
        from abkd_megatron.tools.compare import compare

        signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the runs too
        compare(config, lambda settings: load(arguments, settings))
    except KeyboardInterrupt:
        print("\ninterrupted; run the same command to continue", file=sys.stderr)
        return 130
    return 0


def _report(arguments: Namespace) -> None:
    from abkd_megatron.tools.report import write_report

    print(write_report(arguments.runs, arguments.out))


_TORCHRUN = "torchrun --nproc-per-node {} -m abkd_megatron"

JOBS = {
    "env": Job(
        _env,
        "show installed dependencies",
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
        writes="data.dir, complete or not at all; never an existing one",
    ),
    "check": Job(
        _check,
        "validate a config; needs no GPU and starts no ranks",
        (
            f"{PROG} check configs/tiny_cpu.yaml",
            f"{PROG} check configs/tiny_cpu.yaml --world-size 8 megatron.global-batch-size=32",
            f"{PROG} check configs/tiny_cpu.yaml device=cuda megatron.bf16=true megatron.tensor-model-parallel-size=4",
        ),
        reads="CONFIG, and data.dir, tokenizer and checkpoints that are on this machine; no network",
        writes="a table to stdout: ok, warning, not here (so not checked), or rejected with the job's message",
        codes="0; 2 if anything is rejected",
        options=options.world_size,
    ),
    "estimate": Job(
        _estimate,
        "estimate memory per rank and FLOPs per token, without a GPU",
        (
            f"{PROG} estimate configs/tiny_cpu.yaml",
            f"{PROG} estimate configs/tiny_cpu.yaml --world-size 4 megatron.micro-batch-size=4",
        ),
        reads="CONFIG, and data.dir or a tokenizer if they are on this machine; no checkpoint, no network",
        writes="a table to stdout; --out DIR: estimate.png",
        codes="0; 2 and one message on stderr for a configuration that a job rejects or that cannot be estimated",
        options=options.of_estimate,
    ),
    "show-config": Job(
        _show_config,
        "print the merged configuration and the origin of each value",
        (
            f"{PROG} show-config configs/tiny_cpu.yaml",
            f"{PROG} show-config configs/tiny_cpu.yaml distillation.divergence=todi",
        ),
        reads="CONFIG",
        writes="YAML to stdout that loads again as the same configuration",
        codes="0; 2 and one message on stderr for an unknown key, one given twice, or a wrong type",
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
        options=options.debug,
    ),
    "cache": Job(
        _train,
        "run the teacher once over a student's samples, and keep what it predicts",
        (
            f"{_TORCHRUN.format(4)} cache configs/tiny_cpu.yaml cache.dir=runs/demo/cache",
            f"{_TORCHRUN.format(4)} cache configs/tiny_cpu.yaml cache.dir=runs/small cache.bytes_per_token=76",
        ),
        reads="teacher.load, data.dir (or Megatron's own data arguments)",
        writes="cache.dir: shards, and what is missing in an existing cache; the log to stdout",
        codes=_CODES,
        options=options.debug,
    ),
    "distill": Job(
        _train,
        "train a student with a teacher",
        (
            f"{_TORCHRUN.format(4)} distill configs/tiny_cpu.yaml",
            f"{_TORCHRUN.format(4)} distill configs/tiny_cpu.yaml distillation.lm_weight=0.1 megatron.train-iters=100",
            f"{_TORCHRUN.format(4)} distill configs/tiny_cpu.yaml distillation.divergence=todi megatron.save=runs/todi",
        ),
        reads="teacher.load, data.dir (or Megatron's own data arguments), megatron.load if it is given",
        writes="megatron.save, megatron.tensorboard-dir; Megatron's log to stdout",
        codes=_CODES_OF_TRAINING,
        options=options.debug,
    ),
    "generate": Job(
        _train,
        "continue prompts with a checkpoint",
        (
            f"{PROG} generate configs/tiny_cpu_teacher.yaml megatron.load=runs/demo/teacher generate.prompts=import",
            f"{_TORCHRUN.format(4)} generate configs/tiny_cpu.yaml megatron.load=runs/demo/student "
            "generate.file=prompts.txt generate.out=texts.jsonl generate.temperature=0",
        ),
        reads="megatron.load, generate.file, and the tokenizer of data.dir or of Megatron's own arguments",
        writes="one JSON line per prompt to generate.out, never an existing file, or to stdout; the log to stdout",
        options=options.debug,
    ),
    "compare": Job(
        _compare,
        "train one student per loss and seed, and compare them",
        (
            f"{PROG} compare configs/tiny_cpu_compare.yaml",
            f"{PROG} compare configs/tiny_cpu_compare.yaml compare.seeds=[1,2] compare.out=runs/two-seeds",
        ),
        reads="as `distill`; compare.out, from which an interrupted comparison continues",
        writes="compare.out: each run's configuration, log and result; table.md, results.json, comparison.png",
        codes=f"{_CODES}; 130 if it was interrupted",
    ),
    "rouge": Job(
        _train,
        "continue held-out text with a student, and score it by ROUGE-L",
        (f"{PROG} rouge configs/tiny_cpu_compare.yaml megatron.load=runs/demo/student compare.rouge_prompts=64",),
        reads="megatron.load, data.dir (or Megatron's own data arguments)",
        writes="compare.out: rouge.json; the log to stdout",
        codes=_CODES,
        options=options.debug,
    ),
    "report": Job(
        _report,
        "make an HTML page of the curves of one or several runs",
        (
            f"{PROG} report runs/demo/student",
            f"{PROG} report runs/demo/student runs/demo/student-alone --out runs/both.html",
        ),
        reads="the TensorBoard event files that Megatron wrote in RUN",
        writes="the page; replaces an existing file only if it is such a page",
        codes="0; 2 and one message on stderr if there is nothing to show or the page cannot be written",
        takes_config=False,
        options=options.runs,
    ),
}


if __name__ == "__main__":
    sys.exit(main())
