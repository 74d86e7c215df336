"""Loading of torch_dist checkpoints without executing code from their pickles.

The index, `.metadata`, is a pickle, and so is every object in the files: the common state (arguments, iteration) and
the extra state of layers. Torch's readers execute them: the index with `pickle.load` (FileSystemReader.read_metadata),
objects with `torch.load(weights_only=False)` (DefaultLoadPlanner.load_bytes).

Torch reads the index again after `read_index`, so whoever can write to the checkpoint while a job starts can still run
code in it.
"""

import io
import os
import pickle
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any, cast

import torch
from megatron.core import dist_checkpointing
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from abkd_megatron.errors import CheckpointError

# Globals of an index, with torch's dtypes. Before torch 2.3, TensorProperties was in another module.
_OF_AN_INDEX = {
    "torch": ("Size",),
    "torch.serialization": ("_get_layout",),
    "torch.distributed.checkpoint.metadata": (
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed._shard.sharded_tensor.metadata": ("TensorProperties", "MEM_FORMAT_ENCODING"),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    # Megatron's index contains the plans of the save.
    "torch.distributed.checkpoint.planner": (
        "SavePlan",
        "WriteItem",
        "WriteItemType",
        "TensorWriteData",
        "BytesIOWriteData",
    ),
    "collections": ("OrderedDict",),
    "pathlib": ("PosixPath",),
    "pathlib._local": ("PosixPath",),
}

_FORCE, _FORCE_NOT = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


def read_index(directory: Path) -> Metadata:
    """Read the index of a torch_dist checkpoint; only the constructors of an index are called.

    Args:
        directory: of one iteration.

    Raises:
        CheckpointError: the index is missing or damaged, or its pickle has another global.
    """
    file = directory / ".metadata"
    try:
        with file.open("rb") as content:
            index = _Index(content).load()
        _check_types(index)
    except _DisallowedError as error:
        raise CheckpointError(_disallowed(file, str(error))) from error
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointError(
            f"the index of the checkpoint in {directory} cannot be read ({error}); copy or save it again, or read it "
            "with the torch that wrote it"
        ) from error
    return cast(Metadata, index)


def read_common(directory: Path, index: Metadata | None = None) -> dict[str, Any]:
    """Read Megatron's common state: arguments as `args`, iteration, and more.

    Args:
        directory: of one iteration.
        index: of this checkpoint; None reads it.

    Raises:
        CheckpointError: its pickle has a global that is not allowed, it cannot be read, or it is damaged.
    """
    index = index or read_index(directory)
    with plain_values(directory):
        _check_sums(directory, index)
        common: dict[str, Any] = dist_checkpointing.load_common_state_dict(str(directory))
    return common


@contextmanager
def plain_values(directory: Path) -> Iterator[None]:
    """Force `weights_only=True` for every `torch.load` in the block, whatever the caller passes.

    Types that Megatron or the user registers with `torch.serialization.add_safe_globals` are allowed. Not thread-safe:
    it sets environment variables.

    Args:
        directory: the checkpoint, for messages.

    Raises:
        CheckpointError: in place of any exception of the block.
    """
    before = {name: os.environ.pop(name, None) for name in (_FORCE, _FORCE_NOT)}
    os.environ[_FORCE] = "1"
    try:
        # Python 3.11 pickles an enum member as a call of getattr.
        with torch.serialization.safe_globals([(_member, "builtins.getattr")]):
            yield
    except CheckpointError:
        raise
    except (Exception, CheckpointException) as error:  # torch's CheckpointException is a BaseException
        causes = [failure for failure, _ in error.failures.values()] if isinstance(error, CheckpointException) else []
        cause = causes[0] if causes else error
        if isinstance(cause, pickle.UnpicklingError) and (named := re.search(r"GLOBAL (\S+)", str(cause))):
            raise CheckpointError(_disallowed(directory, named[1])) from error
        raise CheckpointError(f"{directory} cannot be read ({cause}); copy or save it again") from error
    finally:
        del os.environ[_FORCE]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def _check_types(index: object) -> None:
    """Raise TypeError if a field of the index that we use has another type, as in a damaged pickle."""
    if not isinstance(index, Metadata):
        raise TypeError(f"a {type(index).__name__} in place of torch's Metadata")
    places = (index.storage_data or {}).values()
    found: list[tuple[object, type]] = [(place.relative_path, str) for place in places]
    found += [(number, int) for place in places for number in (place.offset, place.length)]
    tensors = (it for it in index.state_dict_metadata.values() if isinstance(it, TensorStorageMetadata))
    found += [(it.size, torch.Size) for it in tensors]
    for value, kind in found:
        if not isinstance(value, kind):
            raise TypeError(f"{value!r} in place of a {kind.__name__}")


def _check_sums(directory: Path, index: Metadata) -> None:
    """Raise BadZipFile if the common state is damaged; torch.load does not check the checksums."""
    legacy = directory / "common.pt"
    contents = [legacy.read_bytes()] if legacy.is_file() else []
    for key, place in (index.storage_data or {}).items():
        if not contents and key.fqn.startswith("common_state/"):
            with (directory / place.relative_path).open("rb") as file:
                file.seek(place.offset)
                contents = [file.read(place.length)]
    for content in contents:
        if damaged := zipfile.ZipFile(io.BytesIO(content)).testzip():
            raise zipfile.BadZipFile(f"the common state is damaged: the checksum of {damaged} in it is wrong")


def _disallowed(where: Path, name: str) -> str:
    return (
        f"expected tensors and plain values in {where}, got a disallowed pickle global {name} (not executed); use a "
        "trusted checkpoint, or save it again without that; custom types in objects can be allowed with "
        "torch.serialization.add_safe_globals"
    )


class _DisallowedError(pickle.UnpicklingError):
    """A global that is not part of an index."""


class _Index(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _OF_AN_INDEX.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) == ("builtins", "getattr"):
            return _member
        raise _DisallowedError(f"{module}.{name}")


def _member(enumeration: object, name: str) -> Enum:
    if not (isinstance(enumeration, type) and issubclass(enumeration, Enum)):
        raise _DisallowedError("builtins.getattr")
    return enumeration[name]
