"""Tiles of the Triton kernels: one table, so that a run and its restart sum in the same order.

`python benchmarks/gpu.py --only tiles` measures the candidates on a GPU and prints the rows of its architecture.
"""

from typing import NamedTuple


class Tile(NamedTuple):
    """Launch options of a kernel."""

    columns: int
    """Columns per tile, a power of 2."""
    warps: int


CANDIDATES: dict[str, tuple[Tile, ...]] = {
    "record": (Tile(1024, 4), Tile(512, 4), Tile(512, 2), Tile(2048, 8), Tile(1024, 8)),
    "gradient": (Tile(2048, 4), Tile(1024, 4), Tile(2048, 8), Tile(4096, 8)),
}
"""Tiles worth measuring, per kernel. The second record takes the record's."""

# Where none was measured, from the instructions that they compile to. By bytes of the wider of both logits' dtypes.
PREDICTED: dict[str, dict[int, Tile]] = {
    "record": {2: Tile(1024, 4), 4: Tile(512, 4)},
    "gradient": {2: Tile(2048, 4), 4: Tile(2048, 4)},
}

MEASURED: dict[tuple[str, int | None, int, int], Tile] = {
    # NVIDIA H100 80GB HBM3, torch 2.11, Triton 3.6, 2026-11-26.
    ("record", 90, 2, 16032): Tile(512, 2),
    ("gradient", 90, 2, 16032): Tile(1024, 4),
    ("record", 90, 2, 128256): Tile(512, 2),
    ("gradient", 90, 2, 128256): Tile(2048, 4),
    ("record", 90, 4, 16032): Tile(512, 2),
    ("gradient", 90, 4, 16032): Tile(2048, 4),
    ("record", 90, 4, 128256): Tile(512, 2),
    ("gradient", 90, 4, 128256): Tile(4096, 8),
}
"""By kernel, architecture, bytes and columns, up to which the tile applies; the last also beyond."""


def tile(kernel: str, columns: int, itemsize: int, architecture: int | None) -> Tile:
    """Return the tile of a kernel.

    Args:
        kernel: record or gradient.
        columns: of the logits on this rank.
        itemsize: bytes per logit of the wider dtype.
        architecture: compute capability as 90; None without a GPU.
    """
    itemsize = max(itemsize, 2)
    rows = {
        up_to: found
        for (name, of, size, up_to), found in MEASURED.items()
        if (name, of, size) == (kernel, architecture, itemsize)
    }
    if not rows:
        return PREDICTED[kernel][itemsize]
    return rows[min((up_to for up_to in rows if columns <= up_to), default=max(rows))]
