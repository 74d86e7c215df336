"""Tables and figure of an estimate."""

from pathlib import Path

from rich.table import Table

from abkd_megatron.tools import tables
from abkd_megatron.tools.cache_estimate import ASSUMED, CacheEstimate
from abkd_megatron.tools.env import need_plots
from abkd_megatron.tools.estimate import GIB, Alternative, Estimate
from abkd_megatron.tools.memory_tracker import PARTS

# NVIDIA's data sheet of the H100 SXM.
H100_BYTES_PER_SECOND = 3.35e12
NOT_COUNTED = (
    "Not counted: allocator fragmentation, NCCL buffers, CUDA context, workspaces of TransformerEngine, cuBLAS and "
    "attention, checkpoint writing, validation."
)


def show(estimate: Estimate, out: Path | None = None) -> None:
    """Print an estimate, and draw it if `out` is given.

    Args:
        estimate: the estimate.
        out: folder for estimate.png; created if needed.

    Raises:
        HostError: `out` is given and matplotlib is missing.
    """
    if out is not None:
        need_plots("estimate --out", "matplotlib")
    console = tables.console()
    unit = _unit(estimate)
    console.print(
        f"{estimate.world_size} ranks, {estimate.layout}\n"
        f"student: {estimate.student}, {_of_many(estimate.parameters)} parameters with vocabulary padding\n"
        + (
            "teacher: a cache"
            if estimate.teacher is None
            else f"teacher: {estimate.teacher}, {_of_many(estimate.teacher_parameters)}"
        ),
        highlight=False,
    )
    console.print(_memory(estimate, *unit))
    fullest = estimate.fullest
    share = fullest.account.peak[fullest.account.largest] / fullest.account.total
    console.print(
        f"Highest peak: {fullest.name}, {_size(fullest.account.total, unit[0])} {unit[1]}; largest part: "
        f"{fullest.account.largest}, {share:.0%}."
        + (f" {_verdict(fullest.account.total, estimate)}" if estimate.device == "cuda" else ""),
        highlight=False,
    )
    console.print(_flops(estimate))
    if estimate.cache is not None:
        console.print(_cache(estimate.cache, estimate.device), highlight=False)
    if estimate.sampling is not None:
        console.print(
            f"Own text: keys and values take {_size(estimate.sampling, unit[0])} {unit[1]} per rank while a step's "
            "texts are sampled, when no activations are kept; not in the table.",
            highlight=False,
        )
    if estimate.decode is not None and estimate.device == "cuda":
        console.print(
            f"Own text: {estimate.decode / 1e9:.2f} GB of weights are read per rank and position: at least "
            f"{estimate.decode / H100_BYTES_PER_SECOND * 1e3:.2f} ms at an H100's 3.35 TB/s; keys, values and launches "
            "come on top.",
            highlight=False,
        )
    if estimate.alternatives:
        console.print(_alternatives(estimate, *unit))
    console.print(NOT_COUNTED, highlight=False)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        draw(estimate, out / "estimate.png")
        console.print(f"{out / 'estimate.png'}", highlight=False)


def _unit(estimate: Estimate) -> tuple[int, str]:
    return (GIB, "GiB") if estimate.fullest.account.total >= GIB else (2**20, "MiB")


def _size(num_bytes: int, unit: int) -> str:
    return f"{num_bytes / unit:.2f}" if unit == GIB else f"{num_bytes / unit:.1f}"


def _of_many(number: int) -> str:
    return f"{number / 1e9:.2f} G" if number >= 1e9 else f"{number / 1e6:.2f} M"


def _verdict(total: int, estimate: Estimate) -> str:
    memory = estimate.gpu_memory
    return f"{'Fits' if total <= memory * GIB else 'Does not fit'} in {memory:g} GiB."


def _memory(estimate: Estimate, unit: int, name: str) -> Table:
    table = Table(title=f"Peak memory per rank, {name}", title_justify="left")
    table.add_column("")
    for rank in estimate.ranks:
        table.add_column(rank.name, justify="right")
    for part in PARTS:
        sizes = [rank.account.peak.get(part, 0) for rank in estimate.ranks]
        if any(size >= unit / 200 for size in sizes):
            largest = [part == rank.account.largest for rank in estimate.ranks]
            cells = [
                f"[bold]{_size(size, unit)}[/bold]" if most else _size(size, unit)
                for size, most in zip(sizes, largest, strict=True)
            ]
            table.add_row(part, *cells)
    table.add_section()
    table.add_row("total", *(f"[bold]{_size(rank.account.total, unit)}[/bold]" for rank in estimate.ranks))
    table.add_row("kept between steps", *(_size(sum(rank.account.kept.values()), unit) for rank in estimate.ranks))
    return table


def _flops(estimate: Estimate) -> Table:
    flops = estimate.flops
    table = Table(title="Floating-point operations per token", title_justify="left")
    unit, name = (1e9, "GFLOP") if flops.total >= 1e9 else (1e6, "MFLOP")
    for column in ("", name, "share"):
        table.add_column(column, justify="right" if column else "left")
    for name, value in vars(flops).items():
        if value:
            table.add_row(name.replace("_", " "), f"{value / unit:.3f}", f"{value / flops.total:.1%}")
    table.add_section()
    table.add_row("total", f"{flops.total / unit:.3f}", "")
    if flops.teacher_share:
        table.add_row("teacher's share", "", f"{flops.teacher_share:.1%}")
    return table


def _cache(cache: CacheEstimate, device: str) -> str:
    draws = f", {cache.layout.draws} draws" if cache.layout.draws else ""
    text = (
        f"Teacher cache: {cache.layout.bytes_per_token} bytes per token (K {cache.layout.top_k}{draws}), "
        f"{cache.num_bytes / GIB:.1f} GiB for the run's {_of_many(cache.tokens)} tokens."
    )
    if cache.flops.teacher_share:
        savings = ", ".join(f"{cache.saving(runs):.1f} for {runs}" for runs in (2, 5, 20))
        text += (
            f" Writing it takes {cache.flops.teacher_share:.0%} of the FLOPs of a run with a live teacher, so it saves "
            f"some from the second run on: live over cached is {savings} runs."
        )
    rate = cache.read_per_gpu() / 1e6
    return text + (f" At {ASSUMED / 1e12:.0f} TFLOP/s a GPU reads {rate:.1f} MB/s." if device == "cuda" else "")


def _alternatives(estimate: Estimate, unit: int, name: str) -> Table:
    table = Table(title=f"Other layouts on {estimate.world_size} ranks, peak {name}", title_justify="left")
    for column in ("TP", "PP", "micro-batch", name):
        table.add_column(column, justify="right")
    table.add_column(f"fits in {estimate.gpu_memory:g} GiB")
    for it in estimate.alternatives:
        shape = str(it.tensor_parallel), str(it.pipeline_parallel), str(it.micro_batch_size)
        if it.total is None:
            table.add_row(*shape, "-", f"[dim]{it.why}[/dim]")
        else:
            table.add_row(*shape, _size(it.total, unit), "yes" if _fits(it, estimate) else "no")
    return table


def _fits(alternative: Alternative, estimate: Estimate) -> bool:
    return alternative.total is not None and alternative.total <= estimate.gpu_memory * GIB


def draw(estimate: Estimate, path: Path) -> None:
    """Draw the parts of each kind of rank as stacked bars, and the totals of other layouts in a second panel.

    Args:
        estimate: the estimate.
        path: of the PNG.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    unit, name = _unit(estimate)
    looked_at = [it for it in estimate.alternatives if it.total is not None]
    rows = max(len(estimate.ranks) + 4, len(looked_at))
    columns = 2 if looked_at else 1
    figure, axes = pyplot.subplots(
        1, columns, figsize=(8 * columns, 1.5 + 0.3 * rows), layout="constrained", squeeze=False
    )
    parts, others = axes[0][0], axes[0][-1]
    colors = pyplot.get_cmap("tab10")
    before = [0.0] * len(estimate.ranks)
    for index, part in enumerate(PARTS):
        sizes = [rank.account.peak.get(part, 0) / unit for rank in estimate.ranks]
        if not any(sizes):
            continue
        parts.barh([rank.name for rank in estimate.ranks], sizes, left=before, label=part, color=colors(index))
        before = [left + size for left, size in zip(before, sizes, strict=True)]
    parts.set_title(f"{estimate.world_size} ranks, {estimate.layout}", size=9)
    parts.set_ylim(max(len(estimate.ranks) + 1.5, rows / 4) - 0.5, -0.5)  # first rank on top, room for the legend
    parts.legend(fontsize=7, loc="lower right", ncols=3)
    if looked_at:
        labels = [f"TP {it.tensor_parallel} x PP {it.pipeline_parallel}, {it.micro_batch_size}" for it in looked_at]
        fitting = ["tab:green" if _fits(it, estimate) else "tab:red" for it in looked_at]
        others.barh(labels, [(it.total or 0) / unit for it in looked_at], color=fitting)
        others.set_title("layout and micro-batch size; green fits", size=9)
        others.invert_yaxis()
        others.tick_params(axis="y", labelsize=7)
    for axis in axes[0]:
        axis.set_xlabel(f"{name} per rank")
        axis.spines[["top", "right"]].set_visible(False)
        if estimate.device == "cuda":
            axis.axvline(estimate.gpu_memory * GIB / unit, color="black", linestyle="--", linewidth=1)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
