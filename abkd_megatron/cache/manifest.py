"""Identity of a cache: the teacher, the vocabulary and the form of its records, in `manifest.json`."""

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any
from uuid import uuid4

from abkd_megatron.cache.record import PRECISIONS, RecordLayout
from abkd_megatron.errors import ConfigError, DataError

FORMAT = 1
"""Version of the files; others are rejected."""
MANIFEST = "manifest.json"


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What all records of a cache have in common."""

    teacher: str
    """SHA-256 of the teacher's checkpoint, see `TeacherCheckpoint.identity`."""
    teacher_path: str
    """Where it was; for messages, not compared."""
    teacher_iteration: int | str | None
    """Not compared."""
    tokenizer: str
    """SHA-256 of the tokenizer's file, or its name."""
    vocab_size: int
    seq_length: int
    """Tokens per sample."""
    reset_attention_mask: bool
    """Megatron's setting by which attention ends with a document, which no key has."""
    temperature: float
    """Of `log_probs` and `log_rest`."""
    top_k: int
    precision: str
    draws: int = 0
    """Absent in the file if 0."""
    format: int = FORMAT

    @property
    def layout(self) -> RecordLayout:
        """Layout of a token's record."""
        return RecordLayout(self.vocab_size, self.top_k, self.precision, self.draws)

    @property
    def bytes_per_sample(self) -> int:
        """Bytes of a sample's records."""
        return self.seq_length * self.layout.bytes_per_token

    @property
    def compared(self) -> dict[str, Any]:
        """What two caches must have in common to be one."""
        return {
            name: value for name, value in asdict(self).items() if name not in ("teacher_path", "teacher_iteration")
        }

    @property
    def digest(self) -> str:
        """A hash of `compared`, which every shard has."""
        return hashlib.sha256(json.dumps(_written(self.compared), sort_keys=True).encode()).hexdigest()

    def check(self, directory: Path, expected: Mapping[str, Any]) -> None:
        """Reject a cache that is not the expected one.

        Args:
            directory: of the cache, for the message.
            expected: some of the fields.

        Raises:
            ConfigError: with all fields that differ.
        """
        wrong = [
            f"{name}: {getattr(self, name)} in the cache, {value} in this job"
            for name, value in expected.items()
            if getattr(self, name) != value
        ]
        if wrong:
            raise ConfigError(
                f"expected a cache of this job's teacher and data in {directory} (made from {self.teacher_path}), got "
                "another one; give its own settings, or another folder:\n  " + "\n  ".join(wrong)
            )


def publish(directory: Path, identity: Identity) -> None:
    """Write the manifest of a new cache, or compare with the one that is there. Several jobs may do so at once.

    Raises:
        ConfigError: there is a cache with another identity.
        DataError: the folder cannot be written to.
    """
    temporary = directory / f".{MANIFEST}.{uuid4().hex}.tmp"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_synced(temporary, json.dumps(_written(asdict(identity)), indent=1).encode())
        with contextlib.suppress(FileExistsError):
            os.link(temporary, directory / MANIFEST)  # unlike a rename it does not replace another job's
        temporary.unlink()
    except OSError as error:
        raise DataError(
            f"expected a folder for the cache that can be written to and has room, got {directory} "
            f"({error.strerror}); give another cache.dir, or make room there"
        ) from error
    read_manifest(directory).check(directory, identity.compared)


def read_manifest(directory: Path) -> Identity:
    """Return the identity of a cache.

    Raises:
        DataError: there is no cache, or its manifest is damaged or of another format.
    """
    path = directory / MANIFEST
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise DataError(
            f"expected a teacher cache in {directory}, found no {MANIFEST}; write one with `abkd-megatron cache`, or "
            "correct distillation.cache"
        ) from error
    except (OSError, ValueError) as error:
        raise _damaged(path, str(error)) from error
    found = values.get("format") if isinstance(values, dict) else None
    if found != FORMAT:
        raise DataError(
            f"expected a cache of format {FORMAT} in {directory}, got {found}; write it again with this version"
        )
    if set(values) | {"draws"} != {item.name for item in fields(Identity)} or values["precision"] not in PRECISIONS:
        raise _damaged(path, "other keys than were written")
    return Identity(**values)


def _written(values: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out `draws` if there are none, as caches did before there were any."""
    return {name: value for name, value in values.items() if name != "draws" or value}


def _damaged(path: Path, why: str) -> DataError:
    return DataError(f"the cache's {path} is damaged ({why}); copy it again")


def write_synced(path: Path, content: bytes | memoryview) -> None:
    """Write a new file that survives a crash of the machine once this returns."""
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
