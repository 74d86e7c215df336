"""Whether Megatron's indexed datasets are whole, and of tokens that the model knows, before a job reads them.

Megatron takes an index at its word: that files are cut short, mixed up or of another tokenizer shows in the middle of a
run, as an error of numpy's or of the embedding's kernel, or not at all.
"""

import struct
from argparse import Namespace
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import DType
from megatron.core.datasets.object_storage_utils import is_object_storage_path
from megatron.training.utils import get_blend_and_blend_per_split

from abkd_megatron.errors import DataError

_REMEDY = "copy both files whole from where they were made, or prepare the data again"
# The beginning of an index: magic, version, code of the dtype, number of sequences, of ends of documents.
_HEADER = struct.Struct("<9sQBQQ")
_MAGIC, _VERSION = b"MMIDIDX\x00\x00", 1
# Of each file the sample is so many parts, from its first entry to its last. Many datasets share the budget: a job's
# other ranks wait meanwhile.
_PARTS, _FEWEST_PARTS, _PARTS_OF_ALL = 64, 4, 4096
_PART_ENTRIES, _PART_BYTES = 4096, 1 << 16  # of an index and of tokens


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
    """Check indexed datasets: files and sizes, and samples of the entries of each index and of the tokens.

    Header, file sizes, first and last entry are always checked. Of the entries between (lengths and places of
    sequences, ends of documents) 64 parts of 4096 each are read, spread evenly, and of the tokens 64 parts of 64 KiB;
    what is no larger than that is read whole. With more than 64 datasets there are fewer parts of each, but at least 4.
    So a wrong entry between the parts of a large index is not found. Datasets in object storage are passed over.

    Args:
        prefixes: as `prefixes_of` gives them.
        vocab_size: tokens of the tokenizer; None if that is not known.

    Returns:
        What was found, by prefix.

    Raises:
        DataError: an index that is none or contradicts itself or its tokens' file; a token id that is below 0, or not
            below `vocab_size`.

    Collectives: none; let one rank do it. At most 10 MiB of a dataset are read, whatever its size.
    """
    here = [prefix for prefix in prefixes if not is_object_storage_path(prefix)]
    parts = min(_PARTS, max(_FEWEST_PARTS, _PARTS_OF_ALL // max(len(here), 1)))
    return {prefix: _check(prefix, vocab_size, parts) for prefix in here}


def _check(prefix: str, vocab_size: int | None, parts: int) -> Tokens:
    index, tokens = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    try:
        dtype, sequences, documents = _check_header(index, tokens)
        count = _check_sequences(index, tokens, dtype.itemsize, sequences, parts)
        _check_documents(index, sequences, documents, parts)
        return Tokens(count, _check_tokens(tokens, count, dtype, vocab_size, parts))
    except OSError as error:
        remedy = "let the user of the job read both files" if isinstance(error, PermissionError) else _REMEDY
        raise DataError(f"{prefix}: expected an indexed dataset that can be read, got: {error}; {remedy}") from error


def _parts_of(count: int, size: int, parts: int) -> list[tuple[int, int]]:
    """First and one past the last of so many parts of a file's entries, spread from begin to end; or of all at once."""
    if count <= size * parts:
        return [(0, count)]
    starts = ((count - size) * number // (parts - 1) for number in range(parts))
    return [(start, start + size) for start in starts]


def _check_header(index: Path, tokens: Path) -> tuple[np.dtype, int, int]:
    """The dtype of the tokens, and how many sequences and ends of documents there are."""
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
    return np.dtype(DType.dtype_from_code(code)), sequences, documents


def _check_sequences(index: Path, tokens: Path, item: int, sequences: int, parts: int) -> int:
    """How many tokens there are."""
    held, pointers = tokens.stat().st_size, _HEADER.size + 4 * sequences
    end = read = 0  # the byte at which the part before ended, and its last sequence
    for first, last in _parts_of(sequences, _PART_ENTRIES, parts):
        sizes = _read(index, np.int32, _HEADER.size, first, last).astype(np.int64) * item
        places = _read(index, np.int64, pointers, first, last)
        ends = places[0] + np.cumsum(sizes)
        wrong = (sizes < 0) | (places != ends - sizes)
        wrong[0] |= places[0] != end if first == read else places[0] < end
        if wrong.any():
            raise DataError(
                f"{index}: expected each sequence behind the one before, got one elsewhere or of a negative length: "
                f"sequence {first + int(wrong.argmax())} of {sequences}; {_REMEDY}"
            )
        end, read = int(ends[-1]), last
    if end != held:
        raise DataError(f"{tokens}: expected {end} bytes, as its index says, got {held}; {_REMEDY}")
    if not end:
        raise DataError(f"{tokens}: expected tokens, got none; {_REMEDY}")
    return end // item


def _check_documents(index: Path, sequences: int, documents: int, parts: int) -> None:
    begin, before = _HEADER.size + 12 * sequences, 0
    for first, last in _parts_of(documents, _PART_ENTRIES, parts):
        ends = _read(index, np.int64, begin, first, last)
        if ends[0] < before or (ends[1:] < ends[:-1]).any():
            raise DataError(f"{index}: expected ends of documents in ascending order, got others; {_REMEDY}")
        if not first and ends[0]:
            raise DataError(f"{index}: expected documents from sequence 0 on, got {ends[0]}; {_REMEDY}")
        before = int(ends[-1])
    if before != sequences:
        raise DataError(f"{index}: expected its documents to end with its last sequence; {_REMEDY}")


def _read(index: Path, dtype: type, begin: int, first: int, last: int) -> np.ndarray:
    """These entries of the array that begins at this byte of the index."""
    kind = np.dtype(dtype).newbyteorder("<")
    return np.fromfile(index, kind, last - first, offset=begin + first * kind.itemsize)


def _check_tokens(tokens: Path, count: int, dtype: np.dtype, vocab_size: int | None, parts: int) -> int:
    """The largest id of a sample."""
    item, largest = dtype.itemsize, 0
    for start, stop in _parts_of(count, _PART_BYTES // item, parts):
        ids = np.fromfile(tokens, dtype=dtype, count=stop - start, offset=start * item)
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
