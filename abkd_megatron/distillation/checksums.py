"""Whether the tensors of a checkpoint are the bytes that were written: what torch.save put there to tell.

torch_dist files hold one zip archive a tensor, with checksums in it (CRC-32), which torch does not look at when it
reads. They tell of accidents, not of somebody who writes the checksums anew.
"""

import io
import zipfile
from collections import defaultdict
from pathlib import Path

from torch.distributed.checkpoint.metadata import Metadata

from abkd_megatron.errors import CheckpointError


def check_contents(directory: Path, index: Metadata, rank: int = 0, num_ranks: int = 1) -> None:
    """Refuse a torch_dist checkpoint in which a tensor is not what was written.

    All of it is read once; ranks share that.

    Args:
        directory: of one iteration, with all of its files.
        index: its own.
        rank: whose share is read: every `num_ranks`-th tensor.
        num_ranks: readers.

    Raises:
        CheckpointError: naming the file, and where in it. Also for one that was saved without checksums
            (`torch.serialization.set_crc32_options(False)`).
    """
    stored = index.storage_data or {}
    places = sorted({(item.relative_path, item.offset, item.length) for item in stored.values()})
    of_file: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for name, offset, length in places[rank::num_ranks]:
        of_file[name].append((offset, length))
    for name, parts in of_file.items():
        with (directory / name).open("rb") as file:
            for offset, length in parts:
                file.seek(offset)
                if (found := _fault(file.read(length))) is not None:
                    raise CheckpointError(
                        f"the teacher's checkpoint is damaged: {directory / name} holds other bytes than were written, "
                        f"in the {length} from {offset} on ({found}); copy or save it again"
                    )


def _fault(archive: bytes) -> str | None:
    try:
        with zipfile.ZipFile(io.BytesIO(archive)) as opened:
            wrong = opened.testzip()
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        return str(error)
    return None if wrong is None else f"{wrong}: checksum"
