"""Checks of Megatron's indexed datasets: files, indices and token ids.

Megatron does not check an index. Truncated files, mismatched files or another tokenizer would show in the middle of a
run, as an error of numpy or of the embedding kernel, or not at all.
"""

import os
import struct
from argparse import Namespace
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets.indexed_dataset import DType
from megatron.core.datasets.object_storage_utils import is_object_storage_path
from megatron.training.utils import get_blend_and_blend_per_split

from abkd_megatron.errors import ConfigError, DataError, check_name
from abkd_megatron.losses.sources import SourceWeights, reject_duplicate_sources

_REMEDY = "copy both files again, or prepare the data again"
# Header of an index: magic, version, dtype code, number of sequences, number of document ends.
_HEADER = struct.Struct("<9sQBQQ")
_MAGIC, _VERSION = b"MMIDIDX\x00\x00", 1
# Parts sampled per file, from the first entry to the last. Many datasets share a budget, because other ranks wait.
_PARTS, _FEWEST_PARTS, _PARTS_OF_ALL = 64, 4, 4096
_PART_ENTRIES, _PART_BYTES = 4096, 1 << 16  # of an index, of tokens


@dataclass(frozen=True, slots=True)
class Tokens:
    """Tokens of a dataset."""

    count: int
    """Number of tokens."""
    largest: int
    """Largest token id in the sample."""


def prefixes_of(args: Namespace) -> list[str]:
    """Return the path prefixes of the datasets that a job reads, without duplicates.

    Args:
        args: Megatron's validated arguments.

    Raises:
        DataError: a file with a list of datasets cannot be read or is invalid.
    """
    blends = _blends(args)
    return list(dict.fromkeys(prefix for one in blends if one is not None for prefix in one[0]))


def with_positions(sources: Sequence[SourceWeights], args: Namespace) -> tuple[SourceWeights, ...]:
    """Return weights by source with the positions of all datasets.

    Args:
        sources: the entries, by position or by path.
        args: Megatron's validated arguments.

    Raises:
        ConfigError, DataError: as `positions_of`.
    """
    positions = positions_of([of.name for of in sources], args, "distillation.sources")
    found = [replace(of, source=position, path=None) for of, position in zip(sources, positions, strict=True)]
    reject_duplicate_sources(found)
    return tuple(found)


def positions_of(names: Sequence[int | str], args: Namespace, key: str) -> list[int]:
    """Return the positions of datasets in the blend of training.

    Args:
        names: their positions or path prefixes.
        args: Megatron's validated arguments.
        key: the setting that names them, for messages.

    Raises:
        DataError: a file with a list of datasets cannot be read or is invalid.
        ConfigError: there is no blend for training, or it does not have a dataset; it has a path twice; or the blend of
            another split has another dataset at the position of a path.
    """
    if not names:
        return []
    what = key.rpartition(".")[-1]
    blend, *splits = _blends(args) or [None]
    lists = [one[0] for one in ([blend] if blend is not None else splits) if one is not None]
    of_training = blend if blend is not None else splits[0] if splits else None
    count = len(of_training[0]) if of_training is not None else 0
    if count < 2:
        raise ConfigError(
            f"{what}: expected a blend of several datasets for training, got {count}; give megatron.data-path (or "
            f"train-data-path) with weights and prefixes in place of data.dir, or remove {key}"
        )
    for name in names:
        if isinstance(name, int) and name >= count:
            raise ConfigError(
                f"{what}: expected a source from 0 to {count - 1}, a position in the list of the {count} datasets, "
                f"got {name}; correct it"
            )
    return [name if isinstance(name, int) else _position(name, lists, what) for name in names]


def _position(path: str, lists: Sequence[Sequence[str]], what: str) -> int:
    """Return the position of a path prefix in the list of training; in other blends it must be the same.

    Args:
        path: absolute or relative to the working directory, as the prefixes of the lists.
        lists: prefixes of each split's datasets, those of training first.
        what: the setting, for messages.

    Raises:
        ConfigError: see `with_positions`.
    """
    wanted, (of_training, *others) = _absolute(path), [[_absolute(prefix) for prefix in one] for one in lists]
    places = [place for place, prefix in enumerate(of_training) if prefix == wanted]
    if not places:
        check_name(path, lists[0], what, "path of a dataset")
    if len(places) != 1:
        raise ConfigError(
            f"{what}: expected {path} once in the list of the datasets, got it at {places}; give their positions"
        )
    (place,) = places
    for other in others:
        there = [at for at, prefix in enumerate(other) if prefix == wanted]
        if len(other) > 1 and there != [place] and (there or place < len(other)):
            raise ConfigError(
                f"{what}: expected {path} at position {place} of every split's list, as in that of training, got "
                f"{there or other[place]} in another; list the datasets in one order"
            )
    return place


def _absolute(prefix: str) -> str:
    return prefix if is_object_storage_path(prefix) else os.path.abspath(prefix)


def _blends(args: Namespace) -> list[Any]:
    """Return Megatron's blend of all splits, None if there is none, and those of each split if they are given."""
    if args.mock_data:
        return []
    try:
        blend, per_split = get_blend_and_blend_per_split(args)
    except (OSError, ValueError, LookupError, TypeError, AssertionError) as error:
        named = args.data_args_path or args.per_split_data_args_path or "megatron.data-path"
        raise DataError(
            f"{named}: expected dataset prefixes, or alternating weights and prefixes, got {error!r}; correct the list"
        ) from error
    return [blend, *(per_split or [])]


def check_datasets(prefixes: Iterable[str], vocab_size: int | None) -> dict[str, Tokens]:
    """Check indexed datasets: files, sizes, and samples of the index entries and tokens.

    Header, file sizes, first and last entry are always checked. The other entries (lengths and offsets of sequences,
    document ends) are sampled in 64 evenly spaced parts of 4096 entries, the tokens in 64 parts of 64 KiB. Smaller
    files are read completely. Above 64 datasets, each has fewer parts, at least 4. A wrong entry between the parts of a
    large index is not found. Datasets in object storage are skipped.

    Args:
        prefixes: from `prefixes_of`.
        vocab_size: tokens of the tokenizer; None if unknown.

    Returns:
        {prefix: tokens}.

    Raises:
        DataError: an index is invalid or does not match its token file, or a token id is not in
            [0, `vocab_size`).

    Collectives: none. Call it on one rank. Reads at most 10 MiB per dataset.
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
        remedy = "grant the job's user read access" if isinstance(error, PermissionError) else _REMEDY
        raise DataError(f"{prefix}: expected a readable indexed dataset, got: {error}; {remedy}") from error


def _parts_of(count: int, size: int, parts: int) -> list[tuple[int, int]]:
    """Return (first, end) of evenly spaced parts of `count` entries; one part if they cover all entries."""
    if count <= size * parts:
        return [(0, count)]
    starts = ((count - size) * number // (parts - 1) for number in range(parts))
    return [(start, start + size) for start in starts]


def _check_header(index: Path, tokens: Path) -> tuple[np.dtype, int, int]:
    """Check the header. Return the token dtype and the numbers of sequences and document ends."""
    for file in (index, tokens):
        if not file.is_file():
            raise DataError(f"{file}: expected a file of an indexed dataset, found none; check the path, or {_REMEDY}")
    with open(index, "rb") as stream:
        header = stream.read(_HEADER.size)
    if len(header) < _HEADER.size:
        raise DataError(f"{index}: expected an index, got {len(header)} bytes; {_REMEDY}")
    magic, version, code, sequences, documents = _HEADER.unpack(header)
    if magic != _MAGIC or version != _VERSION:
        raise DataError(
            f"{index}: expected a Megatron index, version {_VERSION}, got {magic!r} and {version}; {_REMEDY}"
        )
    codes = {int(kind.value): kind.name for kind in DType if "int" in kind.name}
    if code not in codes:
        known = ", ".join(codes.values())
        raise DataError(f"{index}: expected a token dtype of {known}, got dtype code {code}; {_REMEDY}")
    size = _HEADER.size + sequences * (4 + 8) + documents * 8
    got = index.stat().st_size
    if got not in (size, size + sequences):  # multimodal indices have one more byte per sequence
        raise DataError(
            f"{index}: expected {size} bytes for {sequences} sequences and {documents} document ends, got {got}; "
            f"{_REMEDY}"
        )
    if not sequences or not documents:
        raise DataError(
            f"{index}: expected documents, got {sequences} sequences and {documents} document ends; {_REMEDY}"
        )
    return np.dtype(DType.dtype_from_code(code)), sequences, documents


def _check_sequences(index: Path, tokens: Path, item: int, sequences: int, parts: int) -> int:
    """Check lengths and offsets of the sequences. Return the number of tokens."""
    held, pointers = tokens.stat().st_size, _HEADER.size + 4 * sequences
    end = read = 0  # byte and sequence at which the previous part ended
    for first, last in _parts_of(sequences, _PART_ENTRIES, parts):
        sizes = _read(index, np.int32, _HEADER.size, first, last).astype(np.int64) * item
        places = _read(index, np.int64, pointers, first, last)
        ends = places[0] + np.cumsum(sizes)
        wrong = (sizes < 0) | (places != ends - sizes)
        wrong[0] |= places[0] != end if first == read else places[0] < end
        if wrong.any():
            raise DataError(
                f"{index}: expected contiguous sequences, got a wrong offset or a negative length: sequence "
                f"{first + int(wrong.argmax())} of {sequences}; {_REMEDY}"
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
            raise DataError(f"{index}: expected document ends in ascending order, got another order; {_REMEDY}")
        if not first and ends[0]:
            raise DataError(f"{index}: expected the first document to start at sequence 0, got {ends[0]}; {_REMEDY}")
        before = int(ends[-1])
    if before != sequences:
        raise DataError(f"{index}: expected the last document to end with the last sequence; {_REMEDY}")


def _read(index: Path, dtype: type, begin: int, first: int, last: int) -> np.ndarray:
    """Read entries [first, last) of the array at byte `begin` of the index."""
    kind = np.dtype(dtype).newbyteorder("<")
    return np.fromfile(index, kind, last - first, offset=begin + first * kind.itemsize)


def _check_tokens(tokens: Path, count: int, dtype: np.dtype, vocab_size: int | None, parts: int) -> int:
    """Check the token ids of a sample. Return the largest."""
    item, largest = dtype.itemsize, 0
    for start, stop in _parts_of(count, _PART_BYTES // item, parts):
        ids = np.fromfile(tokens, dtype=dtype, count=stop - start, offset=start * item)
        smallest, largest = int(ids.min()), max(largest, int(ids.max()))
        if smallest < 0 or (vocab_size is not None and largest >= vocab_size):
            at = start + int(ids.argmin() if smallest < 0 else ids.argmax())
            known = f"0 to {vocab_size - 1}" if vocab_size is not None else "0 or more"
            got = smallest if smallest < 0 else largest
            raise DataError(
                f"{tokens}: expected token ids of {known}, got {got} at token {at} of {count}; use the tokenizer "
                f"of the data, or {_REMEDY}"
            )
    return largest
