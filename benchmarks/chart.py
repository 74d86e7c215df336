"""Charts of the documentation: `python benchmarks/chart.py`.

README's bars are of the results of head.py and loss.py, those of docs/comparison.md of its numbers.
"""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
CHART = ROOT / "docs" / "benchmark.png"
REGIMES = ROOT / "docs" / "comparison-regimes.json"
LONGER = ROOT / "docs" / "comparison-longer.json"
Bars = dict[str, float]


def run_of(file: str, **settings: Any) -> dict[str, dict[str, Any]]:
    """Return the rows of the run with these settings, by name."""
    runs = json.loads((RESULTS / file).read_text())["runs"]
    (run,) = [run for run in runs if all(run[key] == value for key, value in settings.items())]
    return {row["name"]: row for row in run["rows"]}


def memory() -> Bars:
    """Return peak MiB of both LM heads and the loss, gradients included: 2048 tokens, V 32768, fp32, one rank."""
    rows = run_of("head.json", tensor_parallel=1, tokens=2048, vocab=32768)
    names = {
        "plain autograd": "plain autograd",
        "this plugin,\nmaterialized": "materialized",
        "this plugin,\nfused head": "fused, gradient in forward",
    }
    return {label: rows[name]["peak"] / 2**20 for label, name in names.items()}


def time() -> Bars:
    """Return milliseconds of the loss, forward and backward: 1024 tokens, V 32768, bf16, TP 2 on CPU."""
    rows = run_of("loss.json", tensor_parallel=2, dtype="bf16")
    names = {
        "ModelOpt\nforward KL": "ModelOpt LogitsKLLoss (forward KL)",
        "Megatron\ncross entropy": "Megatron cross entropy, one tensor",
        "this plugin, alpha-beta,\nCE and metrics": "ours, cpp: alpha-beta + CE + metrics",
    }
    return {label: 1000 * rows[name]["median"] for label, name in names.items()}


def draw(path: Path) -> None:
    """Draw both panels."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 2.3))
    for axis, bars, title in (
        (axes[0], memory(), "peak memory of LM heads and loss, MiB"),
        (axes[1], time(), "time of the loss at TP 2, ms (CPU)"),
    ):
        colors = ["#4c8c5b" if label.startswith("this") else "#9aa4b0" for label in bars]
        drawn = axis.barh(list(bars), list(bars.values()), color=colors)
        axis.bar_label(drawn, [f"{value:,.0f}" for value in bars.values()], padding=3, size=9)
        axis.set_title(title, size=10)
        axis.invert_yaxis()
        axis.margins(x=0.15)
        axis.set_xticks([])
        axis.tick_params(labelsize=9, length=0)
        axis.spines[["top", "right", "bottom"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def gains() -> dict[str, dict[str, dict[str, float]]]:
    """Return {student: {loss: mean, low and high of its cross entropy below that of the text only, in nats}}."""
    regimes = json.loads(REGIMES.read_text())
    return {student: of["differences"]["CE only"] for student, of in regimes.items()}


def draw_regimes(path: Path) -> None:
    """Draw a panel per student: the gain of each loss in cross entropy over the text only, with its interval."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = gains()
    figure, axes = pyplot.subplots(1, len(found), figsize=(9, 2.3), sharey=True)
    for axis, (student, losses) in zip(axes, found.items(), strict=True):
        axis.axvline(0, color="#9aa4b0", linewidth=1)
        for row, (loss, gain) in enumerate(losses.items()):
            color = "#4c8c5b" if "rising" in loss else "#5b6770"
            axis.plot([gain["low"], gain["high"]], [row, row], color=color, linewidth=2)
            axis.plot(gain["mean"], row, "o", color=color)
            axis.annotate(f"{gain['mean']:+.3f}", (gain["mean"], row), (0, 6), textcoords="offset points", ha="center")
        axis.set_yticks(range(len(losses)), list(losses))
        axis.set_ylim(len(losses) - 0.4, -0.8)
        axis.set_title(student, size=10)
        axis.tick_params(labelsize=8, length=2)
        axis.margins(x=0.15)
        axis.spines[["top", "right", "left"]].set_visible(False)
    figure.supxlabel("cross entropy below that of training on the text only, nats per token, 95 % interval", size=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def longer() -> list[dict[str, Any]]:
    """Return the comparisons of other lengths, teachers and learning rates; see the keys of `LONGER`."""
    found: list[dict[str, Any]] = json.loads(LONGER.read_text())
    return found


def draw_longer(path: Path) -> None:
    """Draw cross entropy by length with each teacher, and by learning rate, of students from scratch."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    scratch = [of for of in longer() if of["student"] == "from scratch"]
    usual = [of for of in scratch if of["learning rate"] == 0.004]
    by_rate = [of for of in scratch if of["steps"] == 200 and of["teacher"] == "weak"]
    panels = [
        *((f"{name} teacher", "steps", [of for of in usual if of["teacher"] == name]) for name in ("good", "weak")),
        ("weak teacher, 200 steps", "learning rate", by_rate),
    ]
    colors = {"CE only": "#9aa4b0", "forward KL": "#5b6770", "forward KL + rising CE": "#4c8c5b"}
    figure, axes = pyplot.subplots(1, len(panels), figsize=(9, 2.8))
    for axis, (title, places, shown) in zip(axes, panels, strict=True):
        for loss, color in colors.items():
            means = [of["summary"][loss]["cross entropy"]["mean"] for of in shown]
            axis.plot(range(len(shown)), means, "o-", color=color, label=loss)
        of_teacher = shown[-1]["summary"]["teacher"]["cross entropy"]["mean"]
        axis.axhline(of_teacher, color="#9aa4b0", linewidth=1, linestyle="--")
        axis.set_xticks(range(len(shown)), [f"{of[places]:g}" for of in shown])
        axis.set_title(title, size=10)
        axis.set_xlabel(places, size=9)
        axis.tick_params(labelsize=8, length=2)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("cross entropy, nats per token", size=9)
    axes[0].legend(fontsize=7, frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    draw(CHART)
    draw_longer(LONGER.with_suffix(".png"))
    draw_regimes(REGIMES.with_suffix(".png"))
