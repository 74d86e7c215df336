"""Text for a teacher with another tokenizer: its tokenizer, and the data sets whose samples it is added to."""

import logging
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from abkd_megatron.data.aligned_text import Aligner, TokenBytes, WithAlignedText
from abkd_megatron.teacher.args import build_tokenizer_of

logger = logging.getLogger(__name__)


def aligner_of(tokenizer: Any, teacher: Namespace) -> Aligner:
    """Return what cuts a job's text into its teacher's tokens.

    Args:
        tokenizer: Megatron's, of the student.
        teacher: Megatron's arguments of the teacher. A row of it has `seq_length` tokens.

    Raises:
        AbkdError: a tokenizer that cannot be loaded, or whose tokens are not known to be bytes.
    """
    theirs = TokenBytes(build_tokenizer_of(teacher), "teacher")
    return Aligner(TokenBytes(tokenizer, "student"), theirs, teacher.seq_length)


def with_aligned_text(datasets: Sequence[Any], aligner: Aligner) -> tuple:
    """Add the teacher's tokens to the samples of Megatron's data sets, and try a few of them.

    Args:
        datasets: train, validation and test: each a data set, a list of them, or None.
        aligner: of the job.

    Raises:
        DataError: the tokenizers have next to no common boundaries in the samples tried.
    """

    def wrapped(dataset: Any) -> Any:
        if dataset is None:
            return None
        if isinstance(dataset, list):
            return [wrapped(it) for it in dataset]
        found = WithAlignedText(dataset, aligner)
        share = found.check()
        logger.info("%.1f %% of the bytes of a few samples are in chunks that both tokenizers cut alike", 100 * share)
        return found

    return tuple(wrapped(of) for of in datasets)
