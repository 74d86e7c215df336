"""Whether Megatron's indexed datasets are whole, and of tokens that the model knows, before a job reads them.

Megatron takes an index at its word: that files are cut short, mixed up or of another tokenizer shows in the middle of a
run, as an error of numpy's or of the embedding's kernel, or not at all.
"""

import struct
from argparse import Namespace
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset
from megatron.core.datasets.object_storage_utils import is_object_storage_path
from megatron.training.utils import get_blend_and_blend_per_split

from abkd_megatron.errors import DataError

_REMEDY = "copy both files whole from where they were made, or prepare the data again"
# The beginning of an index: magic, version, code of the dtype, number of sequences, of ends of documents.
_HEADER = struct.Struct("<9sQBQQ")
_MAGIC, _VERSION = b"MMIDIDX\x00\x00", 1
_BLOCK = 1 << 20  # sequences looked at together: an index may be larger than what memory is left
_SAMPLE_BYTES, _PARTS = 4 << 20, 64


@dataclass(frozen=True, slots=True)
class Tokens:
    """What was found of a dataset."""

    count: int
    """All of its tokens."""
    largest: int
    """The largest id of those that were looked at."""


def prefixes_of(args: Namespace) -> list[str]:
    """The datasets that a job of these arguments reads, each once: paths to which ``.bin`` and ``.idx`` are added.

    Args:
        args: Megatron's, validated.

    Raises:
        DataError: a file that is to list datasets cannot be read, or is no such list.
    """
    if args.mock_data:
        return []
    try:
        blend, per_split = get_blend_and_blend_per_split(args)
    except (OSError, ValueError, LookupError, TypeError, AssertionError) as error:
        named = args.data_args_path or args.per_split_data_args_path or "megatron.data-path and its like"
        raise DataError(
            f"{named}: expected prefixes of datasets, or weights and prefixes in turns, got {error!r}; mend the list"
        ) from error
    blends = [blend, *(per_split or [])]
    return list(dict.fromkeys(prefix for one in blends if one is not None for prefix in one[0]))


def check_datasets(prefixes: Iterable[str], vocab_size: int | None) -> dict[str, Tokens]:
    """Look at indexed datasets: at all of each index, and at a sample of the tokens.

    Datasets in object storage are passed over.

    Args:
        prefixes: as `prefixes_of` gives them.
        vocab_size: tokens of the tokenizer; None if that is not known.

    Returns:
        What was found, by prefix.

    Raises:
        DataError: an index that is none or contradicts itself or its tokens' file; a token id that is below 0, or not
            below `vocab_size`.

    Collectives: none. It takes time and reads bytes in proportion to the indices; let one rank do it.
    """
    return {prefix: _check(prefix, vocab_size) for prefix in prefixes if not is_object_storage_path(prefix)}


def _check(prefix: str, vocab_size: int | None) -> Tokens:
    index, tokens = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    try:
        _check_header(index, tokens)
        # No memory is mapped for the tokens: numpy cannot map a file of 0 bytes.
        dataset = IndexedDataset(prefix, mmap=False)
    except AssertionError as error:  # the one that is left to Megatron
        raise DataError(f"{index}: expected its documents to end with its last sequence; {_REMEDY}") from error
    except OSError as error:
        raise DataError(f"{prefix}: expected an indexed dataset that can be read, got: {error}; {_REMEDY}") from error
    count, dtype = _check_index(dataset, index, tokens)
    return Tokens(count, _check_tokens(tokens, count, dtype, vocab_size))


def _check_header(index: Path, tokens: Path) -> None:
    """What has to hold before Megatron's reader can be asked."""
    for file in (index, tokens):
        if not file.is_file():
            raise DataError(f"{file}: expected a file of an indexed dataset, got none; check the path, or {_REMEDY}")
    with open(index, "rb") as stream:
        header = stream.read(_HEADER.size)
    if len(header) < _HEADER.size:
        raise DataError(f"{index}: expected an index, got {len(header)} bytes; {_REMEDY}")
    magic, version, code, sequences, documents = _HEADER.unpack(header)
    if magic != _MAGIC or version != _VERSION:
        raise DataError(
            f"{index}: expected an index of Megatron's, version {_VERSION}, got {magic!r} and {version}; {_REMEDY}"
        )
    codes = {int(kind.value): kind.name for kind in DType if "int" in kind.name}
    if code not in codes:
        known = ", ".join(codes.values())
        raise DataError(f"{index}: expected token ids of one of {known}, got dtype code {code}; {_REMEDY}")
    size = _HEADER.size + sequences * (4 + 8) + documents * 8
    got = index.stat().st_size
    if got not in (size, size + sequences):  # one byte a sequence more where there are several modalities
        raise DataError(
            f"{index}: expected {size} bytes, for {sequences} sequences and {documents} ends of documents, got {got}; "
            f"{_REMEDY}"
        )
    if not sequences or not documents:
        raise DataError(
            f"{index}: expected sequences and documents, got {sequences} sequences and {documents} ends; {_REMEDY}"
        )


def _check_index(dataset: IndexedDataset, index: Path, tokens: Path) -> tuple[int, Any]:
    """How many tokens there are, and their dtype."""
    item, end, held = int(DType.size(dataset.index.dtype)), 0, tokens.stat().st_size
    for first in range(0, len(dataset), _BLOCK):
        lengths = dataset.sequence_lengths[first : first + _BLOCK].astype(np.int64)
        ends = end + np.cumsum(lengths * item)
        wrong = (lengths < 0) | (dataset.index.sequence_pointers[first : first + _BLOCK] != ends - lengths * item)
        if wrong.any():
            raise DataError(
                f"{index}: expected each sequence behind the one before, got one elsewhere or of a negative length: "
                f"sequence {first + int(wrong.argmax())} of {len(dataset)}; {_REMEDY}"
            )
        end = int(ends[-1])
    if end != held:
        raise DataError(f"{tokens}: expected {end} bytes, as its index says, got {held}; {_REMEDY}")
    if not end:
        raise DataError(f"{tokens}: expected tokens, got none; {_REMEDY}")
    last = 0
    for first in range(0, len(dataset.document_indices), _BLOCK):
        documents = dataset.document_indices[first : first + _BLOCK]
        if documents[0] < last or (documents[1:] < documents[:-1]).any():
            raise DataError(f"{index}: expected ends of documents in ascending order, got others; {_REMEDY}")
        last = int(documents[-1])
    if dataset.document_indices[0] != 0:
        raise DataError(f"{index}: expected documents from sequence 0 on, got {dataset.document_indices[0]}; {_REMEDY}")
    return end // item, dataset.index.dtype


def _check_tokens(tokens: Path, count: int, dtype: Any, vocab_size: int | None) -> int:
    """The largest id of a sample: of parts of equal length from begin to end, or of everything if that is less."""
    item = int(DType.size(dtype))
    part = _SAMPLE_BYTES // _PARTS // item
    starts = [0] if count <= part * _PARTS else [(count - part) * number // (_PARTS - 1) for number in range(_PARTS)]
    largest = 0
    for start in starts:
        length = count if len(starts) == 1 else part
        ids = np.fromfile(tokens, dtype=dtype, count=length, offset=start * item)
        smallest, largest = int(ids.min()), max(largest, int(ids.max()))
        if smallest < 0 or (vocab_size is not None and largest >= vocab_size):
            at = start + int(ids.argmin() if smallest < 0 else ids.argmax())
            known = f"0 to {vocab_size - 1}, the tokenizer's" if vocab_size is not None else "0 or more"
            got = smallest if smallest < 0 else largest
            raise DataError(
                f"{tokens}: expected token ids of {known}, got {got} at token {at} of {count}; give the tokenizer that "
                f"the data were made with, or {_REMEDY}"
            )
    return largest
