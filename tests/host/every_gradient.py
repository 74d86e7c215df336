"""Runs the command line and writes the gradients of every step: python every_gradient.py FOLDER ARGUMENTS.

One rank, one file a step, as `gradients.whole` reads it.
"""

import itertools
import sys
from pathlib import Path

import torch
from gradients import pieces


def main() -> int:
    from megatron.training import training

    from abkd_megatron.__main__ import main as command_line

    finalize, steps, folder = training.finalize_model_grads, itertools.count(), Path(sys.argv[1])
    folder.mkdir(parents=True)

    def finalize_and_write(model: list[torch.nn.Module], *args: object, **kwargs: object) -> None:
        finalize(model, *args, **kwargs)
        torch.save([piece for chunk in model for piece in pieces(chunk)], folder / f"step-{next(steps)}.pt")

    training.finalize_model_grads = finalize_and_write
    return command_line(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
