"""The command line: prepare data, pretrain a teacher, distil a student, compare losses, show the configuration."""

import argparse
import importlib.util
import logging
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from abkd_megatron.errors import AbkdError, HostError

_DESCRIPTION = "Distil a student from a teacher inside Megatron's own training loop."
_EPILOG = """\
several processes:  torchrun --nproc-per-node 4 -m abkd_megatron distill --config configs/tiny_cpu.yaml
change a setting:   ... distillation.alpha=0.3 megatron.train-iters=100 teacher.load=runs/teacher
"""
_JOBS = {
    "prepare": "turn text into a SentencePiece model and Megatron's indexed datasets",
    "pretrain": "train without a teacher: the teacher itself, or a student to compare with",
    "distill": "train a student beside its teacher",
    "compare": "train students with several losses and seeds beside one teacher, and tell them apart",
    "show-config": "print the merged configuration and where each value came from",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one job; returns the exit code.

    That is 0; 2, with one message on stderr, when something cannot be run; 130 for an interrupted comparison.
    """
    arguments = _parser().parse_args(argv)
    try:
        _run(arguments.job, arguments.config, arguments.overrides)
    except KeyboardInterrupt:
        if arguments.job != "compare":
            raise
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        return 130
    except AbkdError as error:
        rank = f"[rank {os.environ['RANK']}] " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
        print(f"{rank}abkd-megatron {arguments.job}: error: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="abkd-megatron",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    jobs = parser.add_subparsers(dest="job", required=True, metavar="JOB")
    for name, text in _JOBS.items():
        job = jobs.add_parser(name, help=text, description=text)
        job.add_argument(
            "--config", type=Path, metavar="FILE", help="YAML: device, megatron, teacher, distillation, data, compare"
        )
        job.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that beat the file's")
    return parser


def _run(job: str, path: Path | None, overrides: Sequence[str]) -> None:
    _refuse_unrelated_apex()
    _quieten_fallback_warnings()
    # Only here: importing Megatron takes seconds, and --help should not.
    from abkd_megatron import cpu
    from abkd_megatron.config import Config
    from abkd_megatron.config_file import load_config, render
    from abkd_megatron.integrations import megatron_lm
    from abkd_megatron.integrations.add_teacher import megatron_options

    options = megatron_options()

    def load(overrides: Sequence[str]) -> Config:
        return load_config(path, overrides, options, lambda device: cpu.MEGATRON_DEFAULTS if device == "cpu" else {})

    config = load(overrides)
    if job == "show-config":
        print(render(config), end="")
        return
    config.check(job)
    if job == "compare":
        from abkd_megatron.compare import compare

        signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the runs end with us
        compare(config, lambda settings: load([*overrides, *settings]))
        return
    if job == "prepare":
        from abkd_megatron.data import prepare

        prepare(config.data)
        return
    if config.device == "cpu":
        cpu.install()
        minutes = config.megatron.get("distributed-timeout-minutes", 10)
        cpu.init_process_group(timedelta(minutes=float(str(minutes))))
    else:
        _require_gpu()
    _show_log()
    megatron_lm.run(config, job)


def _show_log() -> None:
    """What this package logs once goes to stdout, from the rank that prints Megatron's own log: the last."""
    if int(os.environ.get("RANK", "0")) == int(os.environ.get("WORLD_SIZE", "1")) - 1:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("abkd_megatron: %(message)s"))
        logger = logging.getLogger("abkd_megatron")
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False


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
    """Megatron takes any package called apex for NVIDIA's; PyPI's is another one."""
    try:
        foreign = importlib.util.find_spec("apex") and not importlib.util.find_spec("apex.multi_tensor_apply")
    except Exception:  # an apex that cannot even be imported
        foreign = True
    if foreign:
        raise HostError(
            "the installed `apex` is not NVIDIA's but an unrelated package from PyPI, which Megatron would import by "
            "mistake; remove it with `pip uninstall apex`"
        )


if __name__ == "__main__":
    sys.exit(main())
