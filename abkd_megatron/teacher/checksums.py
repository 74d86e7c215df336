"""Verification of a checkpoint's tensors by the CRC-32 checksums that torch.save writes.

torch_dist files hold one zip archive per tensor, with checksums that torch ignores when it reads. They detect damage,
not an attacker, who can write new checksums.
"""

import io
import zipfile
from collections import defaultdict
from pathlib import Path
from typing import IO, Any, cast

from torch.distributed.checkpoint.metadata import Metadata

from abkd_megatron.errors import CheckpointError


def check_contents(directory: Path, index: Metadata, rank: int = 0, num_ranks: int = 1) -> None:
    """Reject a torch_dist checkpoint with a damaged tensor.

    Reads every `num_ranks`-th tensor. Takes a few MiB of memory, whatever the size of a tensor.

    Args:
        directory: of one iteration, with all of its files.
        index: of this checkpoint.
        rank: the reader, 0 to `num_ranks` - 1.
        num_ranks: number of readers.

    Raises:
        CheckpointError: with the file and the position in it. Also if the checkpoint was saved without checksums
            (`torch.serialization.set_crc32_options(False)`).

    Collectives: none.
    """
    stored = index.storage_data or {}
    places = sorted({(item.relative_path, item.offset, item.length) for item in stored.values()})
    of_file: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for name, offset, length in places[rank::num_ranks]:
        of_file[name].append((offset, length))
    for name, parts in of_file.items():
        with (directory / name).open("rb") as file:
            for offset, length in parts:
                if (found := _fault(_Part(file, offset, length))) is not None:
                    raise CheckpointError(
                        f"the teacher's checkpoint is damaged: {directory / name} holds other bytes than were written, "
                        f"in the {length} from {offset} on ({found}); copy or save it again"
                    )


class _Part(io.RawIOBase):
    """A part of an open file, as a file."""

    def __init__(self, file: io.BufferedReader, offset: int, length: int) -> None:
        self._file, self._offset, self._length, self._at = file, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        if start + offset < 0:
            raise ValueError(f"negative seek position {start + offset}")  # as io.BytesIO raises
        self._at = start + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        wanted = max(min(len(buffer), self._length - self._at), 0)
        self._file.seek(self._offset + self._at)
        count: int = self._file.readinto(memoryview(buffer)[:wanted])
        self._at += count
        return count


def _fault(archive: _Part) -> str | None:
    try:
        with zipfile.ZipFile(cast(IO[bytes], archive)) as opened:
            wrong = opened.testzip()  # in blocks of 1 MiB
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError) as error:
        return str(error) or type(error).__name__
    return None if wrong is None else f"{wrong}: checksum"
