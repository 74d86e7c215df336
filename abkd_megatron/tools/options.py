"""Options of jobs, in addition to CONFIG and settings."""

import argparse
import math
from pathlib import Path


def runs(parser: argparse.ArgumentParser) -> None:
    """Add the runs and the page of `report`."""
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="a run's directory, up to 8, or a folder of runs"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="the page; of one RUN by default RUN/report.html")


def debug(parser: argparse.ArgumentParser) -> None:
    """Add --debug."""
    parser.add_argument(
        "--debug", action="store_true", help="print the traceback of an error before the first step, too"
    )


def world_size(parser: argparse.ArgumentParser) -> None:
    """Add --world-size."""
    parser.add_argument(
        "--world-size",
        type=_positive,
        metavar="N",
        help="ranks of the job (default: $WORLD_SIZE, or the fewest that the layouts of both models allow)",
    )


def of_estimate(parser: argparse.ArgumentParser) -> None:
    """Add the options of `estimate`."""
    world_size(parser)
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
