"""Results of a comparison: statistics over seeds, paired differences, table, recommendation and picture."""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from abkd_megatron.errors import HostError
from abkd_megatron.tools.events import Run
from abkd_megatron.vocab_parallel.diagnostics import calibration_error
from abkd_megatron.vocab_parallel.teacher_records import BUCKETED_KL, SAMPLED_KL

# Columns of the table: (title, name in the report, format). Those that a run has no number of are left out, as with a
# teacher cache or a teacher with another tokenizer.
_COLUMNS = (
    ("cross entropy", "lm loss", "{:.3f}"),
    ("KL(teacher, student)", "kl to teacher", "{:.3f}"),
    ("bucketed KL(teacher, student)", BUCKETED_KL, "{:.3f}"),
    ("sampled KL(teacher, student)", SAMPLED_KL, "{:.3f}"),
    ("KL(student, teacher)", "reverse kl to teacher", "{:.3f}"),
    ("top-1 agreement", "top-1 agreement", "{:.3f}"),
    ("calibration error", "calibration error", "{:.4f}"),
    ("entropy", "student entropy", "{:.3f}"),
    ("chunk log-ratio", "chunk log-ratio", "{:.3f}"),
)

_CURVES = (
    ("lm loss", "Cross entropy, nats per token"),
    ("kl to teacher", "KL(teacher, student), nats per token"),
    (BUCKETED_KL, "Bucketed KL(teacher, student), nats per token"),
    (SAMPLED_KL, "Sampled KL(teacher, student), nats per token"),
    ("hardness concentration", "Hardness concentration"),
    ("confidence concentration", "Confidence concentration"),
    ("chunk log-ratio", "Log-ratio of a chunk's likelihoods, nats"),
    ("todi weight", "ToDi weight, mean over the vocabulary"),
    ("todi weight of teacher", "ToDi weight, mean over the teacher"),
)


_CHOSEN_BY = "lm loss"
"""Number by which losses are ranked, on the test split."""

# Upper 97.5 % points of Student's t for 1 to 10 degrees of freedom.
_T = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)
_Z = 1.959964


def result_of(run: Run) -> dict[str, Any]:
    """Return the results of a finished job.

    Args:
        run: read from its event files.

    Returns:
        ``test`` {name: value} and ``validation`` {step: {name: value}}, with the calibration error in place of its
        bins; ``seconds per step``, the median between logged steps, in which validation and checkpoints do not count;
        ``tokens per step``, at the final batch size.

    Raises:
        HostError: there are no numbers of a test split.
    """
    if not run.splits.get("test"):
        raise HostError(
            f"expected numbers of the test split in the event files of {run.name}, found none; set megatron.eval-iters "
            "above 0 and a test split with megatron.split or data.held_out"
        )
    found = {split: _by_step(run.splits.get(split, {})) for split in ("test", "validation")}
    return {
        "seconds": round(run.seconds, 1),
        "seconds per step": round(statistics.median(run.paces), 6) if run.paces else None,
        "tokens per step": run.integer("global_batch_size") * run.integer("seq_length"),
        "test": found["test"][max(found["test"])],
        "validation": {str(step): values for step, values in found["validation"].items()},
    }


def _by_step(curves: Mapping[str, Mapping[int, float]]) -> dict[int, dict[str, float]]:
    """Return {step: {name: value}}, with the calibration error in place of its bins."""
    steps = sorted({step for curve in curves.values() for step in curve})
    reports = {step: {name: curve[step] for name, curve in curves.items() if step in curve} for step in steps}
    return {step: _with_calibration(report) for step, report in reports.items()}


def _with_calibration(report: dict[str, float]) -> dict[str, float]:
    kept = {name: value for name, value in report.items() if not name.startswith("calibration gap")}
    if len(kept) == len(report):
        return kept
    return {**kept, "calibration error": calibration_error(report)}


def difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> dict[str, Any]:
    """Return the mean of ours - theirs over the seeds that both have, with its 95 % interval.

    Args:
        ours: {seed: value}.
        theirs: {seed: value}, with at least one seed of `ours`.

    Returns:
        ``mean``, ``low``, ``high`` and ``seeds``, the number of pairs. The interval is Student's t of the paired
        differences, which excludes what both share at a seed; None for one seed.
    """
    paired = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
    mean, half = statistics.fmean(paired), None
    if len(paired) > 1:
        half = t_quantile(len(paired) - 1) * statistics.stdev(paired) / math.sqrt(len(paired))
    low, high = (None, None) if half is None else (mean - half, mean + half)
    return {"mean": mean, "low": low, "high": high, "seeds": len(paired)}


def t_quantile(freedom: int) -> float:
    """Return the upper 97.5 % point of Student's t, to 1e-3."""
    if freedom <= len(_T):
        return _T[freedom - 1]
    z, n = _Z, freedom  # Cornish-Fisher expansion
    terms = ((z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384)
    return z + sum(term / n ** (power + 1) for power, term in enumerate(terms))


def differences(results: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Return {loss: {other loss: `difference` of their cross entropies on the test split}}."""
    found = _by_loss(results, _CHOSEN_BY)
    return {
        loss: {
            other: difference(ours, theirs) for other, theirs in found.items() if loss != other and ours.keys() & theirs
        }
        for loss, ours in found.items()
    }


def recommend(results: Sequence[Mapping[str, Any]]) -> str:
    """Return one line: the loss of the lowest cross entropy with its margin, or that no loss wins.

    A loss wins if its paired interval to every other one excludes 0.
    """
    found = _by_loss(results, _CHOSEN_BY)
    best = min(found, key=lambda loss: statistics.fmean(found[loss].values()))
    above = {loss: of[best] for loss, of in differences(results).items() if best in of}
    if not above or min(of["seeds"] for of in above.values()) < 2:
        return "Recommendation: none. It takes two losses with two seeds in common to tell a difference."
    close = {loss: of for loss, of in above.items() if of["low"] <= 0}
    nearest = min(close or above, key=lambda loss: above[loss]["mean"])
    of, others = above[nearest], sorted(close.keys() - {nearest})
    margin = f"{of['mean']:.3f} [{of['low']:.3f}, {of['high']:.3f}] nats below {nearest}"
    how = f"paired over {of['seeds']} seeds, 95 % t interval"
    if not close:
        return f"Recommendation: {best}. Its cross entropy is {margin}, the next ({how})."
    too = f"; nor does it differ from {', '.join(others)}" if others else ""
    return f"Recommendation: none. {best} has the lowest cross entropy, but only by {margin} ({how}){too}."


def outgrown(summary: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a line that names the losses whose students are better than their teacher on held-out text, or "".

    Args:
        summary: see `summarize`.
    """
    if "teacher" not in summary:
        return ""
    limit = summary["teacher"]["cross entropy"]["mean"]
    found = [loss for loss, entry in _losses(summary).items() if entry["cross entropy"]["mean"] < limit]
    if not found:
        return ""
    return (
        f"Below the teacher's cross entropy of {limit:.3f}: {', '.join(found)}. A better teacher may change the order."
    )


def _by_loss(results: Sequence[Mapping[str, Any]], name: str) -> dict[str, dict[int, float]]:
    found: dict[str, dict[int, float]] = {}
    for result in results:
        found.setdefault(result["loss"], {})[result["seed"]] = result["test"][name]
    return found


def summarize(results: Sequence[Mapping[str, Any]], losses: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return statistics over the seeds, per loss and for the teacher.

    An entry has the number of ``seeds``, and per column title:

    - ``mean``;
    - ``std``: sample standard deviation over the seeds;
    - ``std within seeds``: the same after subtracting the mean over the losses at each seed, as in a repeated-measures
      design. This removes effects of batches, test sample and initial weights that all losses share. None unless there
      are at least two losses and two seeds, and every loss has every seed.

    ``above the best`` is the `difference` to the loss of the lowest mean cross entropy, absent for it. ``seconds per
    step`` is the mean over the seeds, absent if it was not measured. The teacher is absent where all runs have one with
    another tokenizer, whose numbers are of other tokens.
    """
    by_loss: dict[str, dict[int, Mapping[str, float]]] = {loss: {} for loss in losses}
    for result in results:
        by_loss[result["loss"]][result["seed"]] = result["test"]
    by_loss = {loss: tests for loss, tests in by_loss.items() if tests}
    seeds = {seed for tests in by_loss.values() for seed in tests}
    complete = len(seeds) > 1 < len(by_loss) and all(set(tests) == seeds for tests in by_loss.values())
    # Subtracting the mean over the losses also removes a part of each loss's own spread (Morey, 2008).
    correction = (len(by_loss) / (len(by_loss) - 1)) ** 0.5 if complete else 0.0
    summary: dict[str, dict[str, Any]] = {loss: {"seeds": len(tests)} for loss, tests in by_loss.items()}
    for title, name, _ in _columns(results):
        common = _common(by_loss, name) if complete else {}
        for loss, tests in by_loss.items():
            values = [test[name] for test in tests.values()]
            within = [test[name] - common[seed] for seed, test in tests.items()] if complete else []
            summary[loss][title] = {
                "mean": statistics.fmean(values),
                "std": statistics.stdev(values) if len(values) > 1 else None,
                "std within seeds": correction * statistics.stdev(within) if complete else None,
            }
    best = min(summary, key=lambda loss: summary[loss]["cross entropy"]["mean"])
    for loss, others in differences(results).items():
        if best in others:
            summary[loss]["above the best"] = others[best]
        paces: list[Any] = [it.get("seconds per step") for it in results if it["loss"] == loss]
        if None not in paces:
            summary[loss]["seconds per step"] = statistics.fmean(paces)
    names = {"cross entropy": "teacher lm loss", "entropy": "teacher entropy"}
    of_its_tokens = [of for of in by_loss.values() if all(names["entropy"] in test for test in of.values())]
    if of_its_tokens:
        tests = of_its_tokens[0]
        summary["teacher"] = {
            title: {"mean": statistics.fmean(test[name] for test in tests.values())} for title, name in names.items()
        }
    return summary


def _columns(results: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    return [column for column in _COLUMNS if all(column[1] in result["test"] for result in results)]


def _common(by_loss: Mapping[str, Mapping[int, Mapping[str, float]]], name: str) -> dict[int, float]:
    """Return the mean over the losses, by seed."""
    seeds = next(iter(by_loss.values()))
    return {seed: statistics.fmean(tests[seed][name] for tests in by_loss.values()) for seed in seeds}


def table(summary: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the comparison as Markdown."""
    within = all(entry[_COLUMNS[0][0]]["std within seeds"] is not None for entry in _losses(summary).values())

    def cell(entry: Mapping[str, float | None] | None, form: str) -> str:
        if entry is None:
            return ""
        spread = entry.get("std within seeds" if within else "std")
        return form.format(entry["mean"]) + (f" ± {form.format(spread)}" if spread is not None else "")

    timed = all("seconds per step" in entry for entry in _losses(summary).values())
    columns = [column for column in _COLUMNS if all(column[0] in entry for entry in _losses(summary).values())]
    titles = [title for title, _, _ in columns]
    heads = ["loss", titles[0], "above the best", *titles[1:], *(["seconds per step"] if timed else [])]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for loss, entry in summary.items():
        first, *others = (cell(entry.get(title), form) for title, _, form in columns)
        pace = [f"{entry['seconds per step']:.3f}" if "seconds per step" in entry else ""] if timed else []
        lines.append("| " + " | ".join([loss, first, _shown(entry.get("above the best")), *others, *pace]) + " |")
    counts = sorted({entry["seeds"] for entry in _losses(summary).values()})
    of_seeds = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    spread = "after subtracting each seed's mean over the losses" if within else "over the seeds"
    return "\n".join(
        [
            *lines,
            "",
            f"Test split, temperature 1; cross entropy, KL and entropy in nats per token. Mean over {of_seeds} seeds "
            f"± standard deviation {spread}. Above the best: mean difference in cross entropy, paired by seed, and its "
            "95 % t interval.",
            "",
        ]
    )


def _shown(above: Mapping[str, Any] | None) -> str:
    if above is None:
        return ""
    interval = f" [{above['low']:.3f}, {above['high']:.3f}]" if above["low"] is not None else ""
    return f"{above['mean']:.3f}{interval}"


def _losses(summary: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    return {loss: entry for loss, entry in summary.items() if loss != "teacher"}


def draw(results: Sequence[Mapping[str, Any]], losses: Sequence[str], path: Path) -> None:
    """Draw the test results as dots, and the validation curves as means over seeds, by step, tokens and time.

    Top right are the differences to the best loss with their intervals. A small dot is one seed. If every loss has
    every seed, each seed's mean over the losses is subtracted, as in the table.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    losses = [loss for loss in losses if any(result["loss"] == loss for result in results)]
    palette = pyplot.get_cmap("tab20" if len(losses) > 10 else "tab10")
    colors = {loss: palette(index % palette.N) for index, loss in enumerate(losses)}
    columns = _columns(results)
    validated = [values for result in results for values in result["validation"].values()]
    curves_shown = [curve for curve in _CURVES if all(curve[0] in values for values in validated)]
    shown = [(*curve, "step") for curve in curves_shown]
    shown += [(*_CURVES[0], unit) for unit in ("tokens", "seconds")]
    width = max(len(columns) + 1, len(shown))
    figure, axes = pyplot.subplots(2, width, figsize=(4.2 * width, 9), layout="constrained")
    by_loss = {
        loss: {result["seed"]: result["test"] for result in results if result["loss"] == loss} for loss in losses
    }
    complete = len({frozenset(tests) for tests in by_loss.values()}) == 1
    summary = summarize(results, losses)
    for axis in (*axes[0][len(columns) + 1 :], *axes[1][len(shown) :]):
        axis.axis("off")
    _draw_differences(axes[0][len(columns)], summary, losses, colors)
    for axis, (title, name, _) in zip(axes[0], columns, strict=False):
        common = _common(by_loss, name) if complete else {}
        overall = statistics.fmean(common.values()) if complete else 0.0
        for row, (loss, tests) in enumerate(by_loss.items()):
            values = [test[name] - common.get(seed, 0.0) + overall for seed, test in tests.items()]
            axis.plot(values, [row] * len(values), ".", color=colors[loss], alpha=0.5)
            axis.plot(statistics.fmean(values), row, "o", color=colors[loss], markersize=9)
        axis.set_title(f"{title}, test")
        axis.set_yticks(range(len(losses)), losses if axis is axes[0][0] else [""] * len(losses))
        axis.invert_yaxis()
        axis.grid(axis="x", alpha=0.3)
    for axis, (name, title, unit) in zip(axes[1], shown, strict=False):
        for loss in losses:
            of_loss = [result for result in results if result["loss"] == loss]
            scales: list[Any] = [result.get(f"{unit} per step") if unit != "step" else 1 for result in of_loss]
            if None in scales:
                continue
            curves = [result["validation"] for result in of_loss]
            steps = sorted(set.intersection(*({int(step) for step in curve} for curve in curves)))
            means = [statistics.fmean(curve[str(step)][name] for curve in curves) for step in steps]
            scale = statistics.fmean(scales)
            axis.plot([step * scale for step in steps], means, ".-", color=colors[loss], label=loss)
        axis.set(title=title, xlabel=unit)
        axis.grid(alpha=0.3)
    axes[1][len(shown) - 1].legend(fontsize="small")
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def _draw_differences(axis: Any, summary: Mapping[str, Any], losses: Sequence[str], colors: Mapping[str, Any]) -> None:
    for row, loss in enumerate(losses):
        above = summary[loss].get("above the best", {"mean": 0.0, "low": None, "high": None})
        axis.plot(above["mean"], row, "o", color=colors[loss])
        if above["low"] is not None:
            axis.plot([above["low"], above["high"]], [row, row], color=colors[loss])
    axis.axvline(0.0, color="black", linewidth=0.8)
    axis.set_title("cross entropy above the best, 95 %")
    axis.set_yticks(range(len(losses)), [""] * len(losses))
    axis.invert_yaxis()
    axis.grid(axis="x", alpha=0.3)
