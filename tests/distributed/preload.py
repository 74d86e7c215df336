"""Imports of the fork server (`forked.py`): a rank needs them, and none of them starts a thread.

The command line itself is missing, because runpy has to import it.
"""

import functools
import gc
import queue
from argparse import ArgumentParser

import launch  # noqa: F401
import megatron.core.tokenizers.text.libraries.huggingface_tokenizer  # noqa: F401
import torch.utils.tensorboard  # noqa: F401
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.training.argument_utils import ArgumentGroupFactory
from megatron.training.arguments import add_megatron_arguments

import abkd_megatron.data.prepare
import abkd_megatron.hosts.megatron_lm  # noqa: F401

parse = ArgumentGroupFactory._get_field_docstrings


@functools.cache
def docstrings_of(config: type) -> dict[str, str]:
    """Return the help of Megatron's options: parsing its source for every parser takes a quarter of a short job."""
    return parse(ArgumentGroupFactory.__new__(ArgumentGroupFactory), config)


ArgumentGroupFactory._get_field_docstrings = lambda _, config: docstrings_of(config)
add_megatron_arguments(ArgumentParser())
# Megatron's own is in a process that imports torch anew, for asynchronous saves: longer than most jobs here take.
filesystem_async._results_queue = queue.Queue()
# A rank's garbage collections leave all this out, and so do not copy its pages.
gc.collect()
gc.freeze()
