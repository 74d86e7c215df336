"""A teacher's checkpoint that was changed: what is noticed, and that nothing in it is run.

Each payload writes a file when it is called. torch's own readers call those of the index and of the objects, which is
shown first: otherwise these tests could not fail.
"""

import io
import os
import pickle
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from launch import launch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.validation import save_integrity_manifest
from megatron.core.transformer.enums import AttnBackend
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata

from abkd_megatron.errors import CheckpointError
from abkd_megatron.teacher.checkpoint import TeacherCheckpoint, tensor_shapes
from abkd_megatron.teacher.safe_load import plain_values, read_common, read_index


class Payload:
    """What a pickle of it does on being read: touch a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.mark}",)


@pytest.fixture
def copied(teacher: Path, tmp_path: Path) -> Path:
    """The one iteration of the teacher, to be spoilt."""
    return Path(shutil.copytree(teacher / "iter_0000008", tmp_path / "teacher" / "iter_0000008"))


def rewrite_index(checkpoint: Path, change: Callable[[Metadata], object]) -> None:
    index = read_index(checkpoint)
    change(index)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(index))


def put_object(checkpoint: Path, name: str, value: object) -> None:
    """Write another object in place of that of the checkpoint: behind the rest of its file, and into the index."""
    blob = io.BytesIO()
    torch.save(value, blob)

    def place(index: Metadata) -> None:
        (there,) = [there for key, there in index.storage_data.items() if key.fqn == name]
        with (checkpoint / there.relative_path).open("ab") as file:
            there.offset, there.length = file.tell(), file.write(blob.getvalue())

    rewrite_index(checkpoint, place)


def objects(checkpoint: Path, of: str) -> list[str]:
    return sorted(key.fqn for key in read_index(checkpoint).storage_data if of in key.fqn)


def put_into_index(checkpoint: Path, mark: Path) -> None:
    rewrite_index(checkpoint, lambda index: setattr(index, "planner_data", Payload(mark)))


def put_into_common_state(checkpoint: Path, mark: Path) -> None:
    (name,) = objects(checkpoint, "common_state")
    put_object(checkpoint, name, [{"args": Payload(mark)}])


def put_into_legacy_common_state(checkpoint: Path, mark: Path) -> None:
    torch.save({"args": Payload(mark)}, checkpoint / "common.pt")


PLACES = [put_into_index, put_into_common_state, put_into_legacy_common_state]


@pytest.mark.parametrize("put", PLACES)
def test_nothing_in_a_checkpoint_is_run(copied: Path, tmp_path: Path, put: Callable[[Path, Path], None]) -> None:
    put(copied, tmp_path / "ran")
    for read in (TeacherCheckpoint.open, read_common):  # of a teacher; of the student that a run goes on from
        with pytest.raises(CheckpointError, match=r"posix\.system.*use"):
            read(copied)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("put", PLACES[:2])
def test_torch_itself_would_run_it(copied: Path, tmp_path: Path, put: Callable[[Path, Path], None]) -> None:
    put(copied, tmp_path / "ran")
    dist_checkpointing.load_common_state_dict(str(copied))
    assert (tmp_path / "ran").exists()


def test_nor_by_a_job(config: Path, teacher: Path, tmp_path: Path) -> None:
    """The extra state of a layer is read with the weights, by Megatron's loader, on every rank that has the layer."""
    whole = Path(shutil.copytree(teacher, tmp_path / "teacher"))
    checkpoint = whole / "iter_0000008"
    for name in objects(checkpoint, "_extra_state"):
        put_object(checkpoint, name, Payload(tmp_path / "ran"))
    ranks = launch(["-m", "abkd_megatron", "distill", "--config", config, f"teacher.load={whole}"], 2)
    for rank in ranks:
        assert rank.code == 2, rank.output[-3000:]
        assert "got a disallowed pickle global posix.system (not executed)" in rank.output
        assert "Traceback" not in rank.output
    assert not (tmp_path / "ran").exists()


class Calls:
    """A pickle of it is a call."""

    def __init__(self, function: Callable, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (Calls(eval, "1"), r"builtins\.eval"),
        (Calls(getattr, Metadata, "__init__"), r"builtins\.getattr"),
        (torch.load, r"torch\.serialization\.load"),
        (torch.Tensor, r"torch\.Tensor"),
    ],
)
def test_an_index_consists_of_little(tmp_path: Path, value: object, named: str) -> None:
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Metadata({}, value)))
    with pytest.raises(CheckpointError, match=rf"pickle.* {named} "):
        read_index(tmp_path)


def test_a_member_of_an_enumeration_as_python_3_11_pickles_it(tmp_path: Path) -> None:
    member = next(iter(AttnBackend))
    call = Calls(getattr, AttnBackend, member.name)
    torch.save(call, tmp_path / "object")
    with plain_values(tmp_path):
        assert torch.load(tmp_path / "object", weights_only=False) is member
    torch.save(Calls(getattr, AttnBackend, "mro"), tmp_path / "object")
    with pytest.raises(CheckpointError), plain_values(tmp_path):
        torch.load(tmp_path / "object", weights_only=False)


def test_the_index_is_that_of_torch(teacher: Path) -> None:
    directory = teacher / "iter_0000008"
    theirs, ours = FileSystemReader(directory).read_metadata(), read_index(directory)
    assert (ours.state_dict_metadata, ours.storage_data) == (theirs.state_dict_metadata, theirs.storage_data)
    assert read_common(directory).keys() == dist_checkpointing.load_common_state_dict(str(directory)).keys()


def test_what_was_set_for_torch_is_so_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with plain_values(tmp_path):
        assert "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD" not in os.environ
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def read(checkpoint: Path) -> bool:
    """Whether it is taken; anything but a message of ours is an error here."""
    try:
        TeacherCheckpoint.open(checkpoint)
        tensor_shapes(checkpoint)
    except CheckpointError:
        return False
    return True


def test_flipped_bits_of_the_common_state_are_noticed(copied: Path) -> None:
    (name,) = objects(copied, "common_state")
    index = read_index(copied)
    (place,) = [there for key, there in index.storage_data.items() if key.fqn == name]
    file = copied / place.relative_path
    whole = file.read_bytes()
    draw = random.Random(0)
    for _ in range(40):
        changed = bytearray(whole)
        changed[place.offset + draw.randrange(1000, place.length * 9 // 10)] ^= 1 << draw.randrange(8)
        file.write_bytes(changed)
        assert not read(copied)


def test_of_a_spoilt_index_there_is_a_message_or_nothing_to_say(copied: Path) -> None:
    """Nothing in it tells a flipped bit from a number that was meant, unless a type or a file's size does."""
    whole = (copied / ".metadata").read_bytes()
    draw = random.Random(0)
    taken = 0
    for _ in range(150):
        changed = bytearray(whole)
        changed[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        (copied / ".metadata").write_bytes(changed)
        taken += read(copied)
    assert 0 < taken < 150
    for _ in range(20):
        (copied / ".metadata").write_bytes(whole[: draw.randrange(len(whole))])
        assert not read(copied)


def test_a_flipped_weight_is_noticed_where_hashes_were_saved(config: Path, copied: Path) -> None:
    """Opening it, which reads no weight, does not tell."""
    verify = ["teacher.verify-integrity=true", f"teacher.load={copied}"]
    job = ["-m", "abkd_megatron", "distill", "--config", config, *verify, "megatron.train-iters=1"]
    save_integrity_manifest(str(copied))
    (rank,) = launch(job, 1)
    assert rank.code == 0, rank.output[-3000:]
    file = max(copied.glob("*.distcp"), key=lambda file: file.stat().st_size)
    changed = bytearray(file.read_bytes())
    changed[len(changed) // 2] ^= 1
    file.write_bytes(changed)
    assert read(copied)
    (rank,) = launch(job, 1)
    assert rank.code == 2 and "Traceback" not in rank.output, rank.output[-3000:]
    assert re.search(rf"(?s)is not known to be whole: .*{file.name}: hash mismatch.*copy it again", rank.output)
    (copied / "integrity.json").unlink()
    with pytest.raises(CheckpointError, match=r"(?s)manifest.*teacher\.verify-integrity=false"):
        TeacherCheckpoint.open(copied).verify()
