"""Reading a torch_dist checkpoint without running what is in it.

Its index, `.metadata`, is a pickle, and so is every object in its files: the common state (arguments, iteration), the
extra state of layers. Torch's own readers run what these pickles say: of the index by `pickle.load`
(FileSystemReader.read_metadata), of objects by `torch.load(weights_only=False)` (DefaultLoadPlanner.load_bytes).

Torch reads the index once more after `read_index` has: who can write to a checkpoint's folder while a job starts can
still have it run code.
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

# What an index consists of; torch's types of numbers beside it. Before torch 2.3 a tensor's properties were elsewhere.
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
    # Megatron's index has the plans by which it was saved.
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
    """The index of a torch_dist checkpoint, of which nothing is called but the constructors that an index consists of.

    Raises:
        CheckpointError: it is missing or damaged, or names something else.
    """
    file = directory / ".metadata"
    try:
        with file.open("rb") as content:
            index = _Index(content).load()
        _check_types(index)
    except _ForeignError as error:
        raise CheckpointError(_foreign(file, str(error))) from error
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointError(
            f"the index of the checkpoint in {directory} cannot be read ({error}); copy or save it again, or read it "
            "with the torch that wrote it"
        ) from error
    return cast(Metadata, index)


def read_common(directory: Path, index: Metadata | None = None) -> dict[str, Any]:
    """What Megatron saved beside the tensors; `args` among it.

    Args:
        directory: of one iteration.
        index: its own, if it was read already.

    Raises:
        CheckpointError: it would call something, it cannot be read, or its content is not what its checksum is of.
    """
    index = index or read_index(directory)
    with plain_values(directory):
        _check_sums(directory, index)
        common: dict[str, Any] = dist_checkpointing.load_common_state_dict(str(directory))
    return common


@contextmanager
def plain_values(directory: Path) -> Iterator[None]:
    """Have every `torch.load` in the block make tensors and plain values alone, also those that torch tells otherwise.

    Beside what torch takes for plain, that is what Megatron registers as such, and what somebody gave to
    `torch.serialization.add_safe_globals`. Not for blocks that run beside other threads that load.

    Raises:
        CheckpointError: for whatever the block raises; `directory` is what was read.
    """
    before = {name: os.environ.pop(name, None) for name in (_FORCE, _FORCE_NOT)}
    os.environ[_FORCE] = "1"
    try:
        # Python 3.11 pickles a member of an enumeration as a call of getattr.
        with torch.serialization.safe_globals([(_member, "builtins.getattr")]):
            yield
    except CheckpointError:
        raise
    except (Exception, CheckpointException) as error:  # torch's own is a BaseException
        causes = [failure for failure, _ in error.failures.values()] if isinstance(error, CheckpointException) else []
        cause = causes[0] if causes else error
        if isinstance(cause, pickle.UnpicklingError) and (named := re.search(r"GLOBAL (\S+)", str(cause))):
            raise CheckpointError(_foreign(directory, named[1])) from error
        raise CheckpointError(f"{directory} cannot be read ({cause}); copy or save it again") from error
    finally:
        del os.environ[_FORCE]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def _check_types(index: object) -> None:
    """Raise for what is used of an index if it is not of its type: a damaged pickle may lack it."""
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
    """Raise if the common state is not as it was written: torch.save writes checksums, and torch.load skips them."""
    legacy = directory / "common.pt"
    contents = [legacy.read_bytes()] if legacy.is_file() else []
    for key, place in (index.storage_data or {}).items():
        if not contents and key.fqn.startswith("common_state/"):
            with (directory / place.relative_path).open("rb") as file:
                file.seek(place.offset)
                contents = [file.read(place.length)]
    for content in contents:
        if spoilt := zipfile.ZipFile(io.BytesIO(content)).testzip():
            raise zipfile.BadZipFile(f"the common state is damaged: the checksum of {spoilt} in it is of other content")


def _foreign(where: Path, name: str) -> str:
    return (
        f"expected tensors and plain values in {where}, got a pickle that names {name}, which was not called; take "
        "the checkpoint from whom you trust, or save it again without that; a type of your own, in objects, has to be "
        "named to torch.serialization.add_safe_globals by your script"
    )


class _ForeignError(pickle.UnpicklingError):
    """A name that an index does not consist of."""


class _Index(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _OF_AN_INDEX.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) == ("builtins", "getattr"):
            return _member
        raise _ForeignError(f"{module}.{name}")


def _member(enumeration: object, name: str) -> Enum:
    if not (isinstance(enumeration, type) and issubclass(enumeration, Enum)):
        raise _ForeignError("builtins.getattr")
    return enumeration[name]
