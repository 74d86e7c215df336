"""Files of a cache: shards of records, each written by one process and published as a whole.

A shard `WRITER-NUMBER.safetensors` has two tensors: `keys` [n, 16] uint8, and `rows` [n, b] uint8 of key, CRC-32 and
records. A reader needs one range of a file per sample, and checks it. `WRITER.jsonl` has a line per shard of a
writer, by which a shard that is missing later is noticed. Nothing is ever changed, so readers need no locks, and
writers do not know of each other. Files that begin with a dot were left by killed writers; nothing reads them.
"""

import json
import os
import struct
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple
from uuid import uuid4

import numpy as np
import safetensors.numpy

from abkd_megatron.cache.key import KEY_BYTES
from abkd_megatron.cache.manifest import Identity, publish, read_manifest, write_synced
from abkd_megatron.errors import DataError

SHARD_BYTES = 256 * 2**20
"""Default size of a shard, which a writer holds in memory."""

_CHECKSUM = 4
_HEAD = KEY_BYTES + _CHECKSUM
# Largest header of a shard that is read; ours has two tensors.
_MOST_HEADER = 64 * 1024


class Place(NamedTuple):
    """A tensor `rows` in a file."""

    path: Path
    offset: int


class CacheWriter:
    """Writes records into shards of its own. Use it as a context manager, which publishes the last shard.

    Args:
        directory: of the cache; created if it does not exist.
        identity: of the cache.
        shard_bytes: a shard is published when it would become larger. One that was not published is lost when the
            process is killed.

    Raises:
        AbkdError: see `publish`.
    """

    def __init__(self, directory: Path, identity: Identity, shard_bytes: int = SHARD_BYTES) -> None:
        publish(directory, identity)
        self._directory, self._identity = directory, identity
        self._writer, self._number = uuid4().hex[:16], 0
        self._row_bytes = _HEAD + identity.bytes_per_sample
        self._capacity = max(shard_bytes // self._row_bytes, 1)
        self._rows: dict[bytes, np.ndarray] = {}
        self._written: set[bytes] = set()

    def __enter__(self) -> "CacheWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if not isinstance(error, DataError):  # the disk is full
            self.publish()

    def add(self, key: bytes, records: np.ndarray) -> None:
        """Add the records of a sample, unless this writer has them already.

        Args:
            key: from `sample_key`.
            records: [s, bytes per token] uint8.

        Raises:
            DataError: see `publish`.
        """
        if key in self._written:
            return
        payload = np.ascontiguousarray(records, dtype=np.uint8).reshape(-1)
        assert len(payload) == self._identity.bytes_per_sample
        checksum = struct.pack("<I", zlib.crc32(payload, zlib.crc32(key)))
        self._rows[key] = np.concatenate([np.frombuffer(key + checksum, dtype=np.uint8), payload])
        self._written.add(key)
        if len(self._rows) == self._capacity:
            self.publish()

    def publish(self) -> None:
        """Publish the open shard, if it has records: readers see all of it or nothing.

        Raises:
            DataError: the disk is full or cannot be written to. What was published before is whole.
        """
        if not self._rows:
            return
        name = f"{self._writer}-{self._number:06d}.safetensors"
        temporary = self._directory / f".{name}.tmp"
        keys = np.frombuffer(b"".join(self._rows), dtype=np.uint8).reshape(-1, KEY_BYTES)
        tensors = {"keys": keys, "rows": np.stack(list(self._rows.values()))}
        content = safetensors.numpy.save(tensors, {"identity": self._identity.digest})
        line = json.dumps({"shard": name, "bytes": len(content)}) + "\n"
        try:
            write_synced(temporary, content)
            temporary.rename(self._directory / name)
            self._append(line.encode())
        except OSError as error:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise DataError(
                f"expected room for {len(content)} bytes in {self._directory}, got {error.strerror}; make room and run "
                "the job again, which continues after the samples that are there"
            ) from error
        self._rows, self._number = {}, self._number + 1

    def _append(self, line: bytes) -> None:
        file = os.open(self._directory / f"{self._writer}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            os.write(file, line)
            os.fsync(file)
        finally:
            os.close(file)
        folder = os.open(self._directory, os.O_RDONLY)
        try:
            os.fsync(folder)  # of the two names
        finally:
            os.close(folder)


class CacheReader:
    """Reads records by key. It may be used in worker processes, forked or pickled.

    The index takes 16 bytes per sample: 4 MB for 10^9 tokens in samples of 4096, 3.9 GB for 10^12.

    Args:
        directory: of the cache.

    Raises:
        DataError: there is no cache, its manifest is damaged, or a shard is missing, truncated or damaged.

    Attributes:
        identity: of the cache.
    """

    def __init__(self, directory: Path) -> None:
        self.identity = read_manifest(directory)
        self._directory = directory
        self._row_bytes = _HEAD + self.identity.bytes_per_sample
        self._check_all_are_here()
        self._shards: list[Place] = []
        prefixes, rows = [], []
        for path in sorted(directory.glob("[!.]*.safetensors")):
            keys, place = self._open(path)
            prefixes.append(keys.view("<u8")[:, 0])
            rows.append(np.stack([np.full(len(keys), len(self._shards)), np.arange(len(keys))], -1).astype(np.uint32))
            self._shards.append(place)
        prefix = np.concatenate(prefixes) if prefixes else np.empty(0, dtype=np.uint64)
        order = np.argsort(prefix, kind="stable")
        self._prefixes = prefix[order]
        self._rows = np.concatenate(rows)[order] if rows else np.empty((0, 2), dtype=np.uint32)

    def __len__(self) -> int:
        """Return the number of records, of which several may be of one sample."""
        return len(self._prefixes)

    def has(self, key: bytes) -> bool:
        """Return whether the first 8 bytes of a key are in the index, without a read of its record."""
        prefix = np.frombuffer(key, dtype="<u8")[0]
        at = np.searchsorted(self._prefixes, prefix)
        return bool(at < len(self._prefixes) and self._prefixes[at] == prefix)

    def read(self, key: bytes) -> np.ndarray | None:
        """Return the records of a sample, [s, bytes per token] uint8, writable; None if there are none.

        Raises:
            DataError: the record is damaged, or its shard has vanished.
        """
        prefix = np.frombuffer(key, dtype="<u8")[0]
        first, last = (np.searchsorted(self._prefixes, prefix, side) for side in ("left", "right"))
        for shard, row in self._rows[first:last]:
            place = self._shards[shard]
            content = self._range(place.path, place.offset + int(row) * self._row_bytes, self._row_bytes)
            if zlib.crc32(content[_HEAD:], zlib.crc32(content[:KEY_BYTES])) != int.from_bytes(
                content[KEY_BYTES:_HEAD].tobytes(), "little"
            ):
                raise self._damaged(place.path, f"checksum of row {row}")
            if content[:KEY_BYTES].tobytes() == key:  # else another key with the same first 8 bytes
                return content[_HEAD:].reshape(self.identity.seq_length, -1)
        return None

    def _check_all_are_here(self) -> None:
        for journal in self._directory.glob("[!.]*.jsonl"):
            for line in journal.read_bytes().splitlines(keepends=True):
                if not line.endswith(b"\n"):  # the writer was killed; the shard itself is whole
                    continue
                try:
                    noted: Mapping[str, Any] = json.loads(line)
                    path, expected = self._directory / str(noted["shard"]), int(noted["bytes"])
                except (ValueError, KeyError, TypeError) as error:
                    raise self._damaged(journal, str(error)) from error
                size = path.stat().st_size if path.is_file() else None
                if size != expected:
                    found = "is missing" if size is None else f"holds {size}"
                    raise self._damaged(path, f"it should hold {expected} bytes and {found}")

    def _open(self, path: Path) -> tuple[np.ndarray, Place]:
        """Return the keys of a shard, [n, 16] uint8, and the place of its rows."""
        size = path.stat().st_size
        try:
            length = struct.unpack("<Q", self._range(path, 0, 8).tobytes())[0]
            if length > _MOST_HEADER:
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(self._range(path, 8, length).tobytes())
            shapes = [header[name]["shape"] for name in ("keys", "rows")]
            (of_keys, _), (of_rows, end) = (header[name]["data_offsets"] for name in ("keys", "rows"))
            number = shapes[0][0]
            if shapes != [[number, KEY_BYTES], [number, self._row_bytes]] or 8 + length + end != size:
                raise ValueError(f"shapes {shapes} in {size} bytes")
            if header["__metadata__"]["identity"] != self.identity.digest:
                raise ValueError("it belongs to another cache")
            keys = self._range(path, 8 + length + of_keys, number * KEY_BYTES).reshape(number, KEY_BYTES)
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise self._damaged(path, str(error)) from error
        return keys, Place(path, 8 + length + of_rows)

    def _range(self, path: Path, offset: int, length: int) -> np.ndarray:
        """Read a range of a file into a new array of bytes."""
        content = np.empty(length, dtype=np.uint8)
        try:
            file = os.open(path, os.O_RDONLY)
            try:
                done = 0
                while done < length and (count := os.preadv(file, [content[done:]], offset + done)):
                    done += count
            finally:
                os.close(file)
        except OSError as error:
            raise self._damaged(path, str(error.strerror)) from error
        if done < length:
            raise self._damaged(path, f"it ends {length - done} bytes too early")
        return content

    def _damaged(self, path: Path, why: str) -> DataError:
        return DataError(
            f"the cache is damaged: {path} ({why}); copy it again, or remove it with its line in the writer's .jsonl "
            "and run `abkd-megatron cache` again, which writes what is missing"
        )
