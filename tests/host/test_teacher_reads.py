"""How often a job reads its teacher's checkpoint, on four data-parallel ranks; what comes of a read that fails on one.

What is read is the same as before to the bit: rows of `matrix.py` compare these layouts with one rank.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

from launch import ROOT, launch
from torch.distributed.checkpoint.filesystem import FileSystemReader

# Without the pass over the checksums, which reads all of it once more.
STEPS = ["megatron.train-iters=1", "megatron.eval-iters=0", "distillation.skip_preflight=[teacher_checksums]"]


def weights(directory: Path) -> list:
    """The places of the model's tensors in the files, largest last."""
    stored = FileSystemReader(directory).read_metadata().storage_data
    found = [place for index, place in stored.items() if not index.fqn.startswith(("optimizer", "rng", "common"))]
    return sorted(found, key=lambda place: place.length)


def seen(found: dict, place: Any) -> set[int]:
    """The bytes of a tensor that a rank has read, by their offsets: how often is up to the unpickler."""
    end = place.offset + place.length
    reads = found.get(place.relative_path, [0, []])[1]
    return {at for start, number in reads for at in range(max(start, place.offset), min(start + number, end))}


def test_replicas_read_the_weights_once_between_them(config: Path, teacher: Path, tmp_path: Path) -> None:
    words = [ROOT / "tests/host/reads.py", teacher, tmp_path, "distill", "--config", config, f"teacher.load={teacher}"]
    ended = launch([*words, *STEPS], 4)
    assert all(rank.code == 0 for rank in ended), ended[-1].output[-6000:]
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(4)]
    wanted = weights(teacher / "iter_0000008")
    whole = sum(place.length for place in wanted)
    read = [sum(len(seen(of, place)) for place in wanted) for of in found]
    # A reader's buffer reaches into the tensors beside. Were each rank to read all of them, it would be 4 times this.
    assert whole <= sum(read) < 1.5 * whole, (whole, read)
    assert max(read) < 0.6 * whole
    # By us, by Megatron's reader of tensors, and twice for the common state; the identity is rank 0's to find.
    assert all(of[".metadata"][0] <= 4 + (rank == 0) for rank, of in enumerate(found))


def test_a_read_that_fails_on_one_rank_ends_all(config: Path, teacher: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(teacher, broken)
    place = weights(broken / "iter_0000008")[-1]
    with (broken / "iter_0000008" / place.relative_path).open("r+b") as file:
        file.seek(place.offset)
        file.write(b"\0" * place.length)
    ended = launch(["-m", "abkd_megatron", "distill", "--config", config, f"teacher.load={broken}", *STEPS], 4)
    assert [rank.code for rank in ended] == [2] * 4, ended[-1].output[-6000:]
    for rank in ended:
        assert re.search(r"\S*broken\S* cannot be read", rank.output), rank.output[-3000:]
    assert sum("(found on rank" in rank.output for rank in ended) == 3, "one reads it"
