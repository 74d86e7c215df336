"""HTML report with the curves of one run, or of several runs for comparison, drawn by Plotly.

All content comes from the event files. The same files give the same page, byte for byte. Curves are not smoothed.
"""

import base64
import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from abkd_megatron.config.pattern import PATTERN_OPTIONS, model_name
from abkd_megatron.config.schema import SCHEDULED
from abkd_megatron.config.yaml import flow
from abkd_megatron.errors import ConfigError
from abkd_megatron.tools.env import need_plots
from abkd_megatron.tools.events import TRAINING, Curve, Run, find_runs
from abkd_megatron.tools.runs import clock
from abkd_megatron.vocab_parallel.diagnostics import NUM_BINS, calibration_error, gap_name

_MOST_RUNS = 8  # colors that are easy to distinguish
_MOST_POINTS = 2000  # per curve
_GENERATOR = '<meta name="generator" content="abkd_megatron report">'
_DRAW = """
const charts = JSON.parse(document.getElementById("charts").textContent);
document.querySelectorAll(".chart").forEach((place, index) =>
  Plotly.newPlot(place, charts[index].data, charts[index].layout, { displaylogo: false, responsive: true }));
"""

# {heading: {regular expression of a chart's names: unit of its axis}}.
_CHARTS = {
    "Losses": {
        "lm loss|teacher lm loss": "nats per token",
        "total loss": "",
        "kd loss": "",
        "hidden loss .+": "unweighted",
        r".+ loss( \d+)?": "unweighted",
    },
    "Student and teacher": {
        "kl to teacher|reverse kl to teacher": "nats per token",
        "student entropy|teacher entropy": "nats per token",
        "top-1 .+|student confidence|selected tokens": "fraction of tokens",
        "calibration error": "",
        "(hardness|confidence) concentration": "",
        "todi weight.*": "",
    },
    "Schedules": dict.fromkeys(SCHEDULED, ""),
    "Optimizer": {"learning-rate": "", "grad-norm": ""},
    "Time": {
        "iteration-time": "seconds per step",
        "tokens per second": "",
        "throughput": "TFLOP/s per GPU",
        "teacher seconds": "seconds per micro-batch",
        "teacher's share": "fraction of step time",
    },
    "Other": {".+": ""},
}
_LOGARITHMIC = re.compile(".*(loss|kl to teacher|grad-norm).*")  # if the values span more than a decade
_ARGUMENTS = (
    *("num_layers", "hidden_size", "num_attention_heads", "num_experts", "vocab_size", "seq_length", "world_size"),
    *("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size", "data_parallel_size"),
    *("expert_model_parallel_size", "global_batch_size", "micro_batch_size"),
)


def write_report(run: Path | Sequence[Path], out: Path | None = None) -> Path:
    """Write the report.

    Args:
        run: the directory of a run, its tensorboard directory, a folder of several runs, or several of these.
        out: the file; None for `report.html` in the directory, if only one is given.

    Returns:
        The file.

    Raises:
        ConfigError: a directory has no numbers, there are more than 8 runs, or `out` exists and is not a report.
        HostError: packages of the extra `plots` are missing.
    """
    paths = [run] if isinstance(run, Path) else list(run)
    need_plots("report", "tensorboard", "plotly", "jinja2")
    if out is None and len(paths) != 1:
        raise ConfigError(f"expected an output file for the report of {len(paths)} runs, got none; add --out FILE")
    out = out if out is not None else paths[0] / "report.html"
    runs = find_runs(paths)
    if len(runs) > _MOST_RUNS:
        raise ConfigError(
            f"expected at most {_MOST_RUNS} runs, got {len(runs)}: {', '.join(it.name for it in runs)}; pass fewer "
            "directories"
        )
    if not out.parent.is_dir():
        raise ConfigError(f"{out}: expected an existing folder, got {out.parent}; create it, or change --out")
    try:
        if out.exists() and _GENERATOR not in out.read_text(encoding="utf-8", errors="replace")[:2000]:
            raise ConfigError(f"{out}: expected a new file or an earlier report, got another file; change --out")
        out.write_text(render(runs), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{out}: expected a writable file, got: {error.strerror}; change --out") from error
    return out


def render(runs: Sequence[Run]) -> str:
    """Return the HTML page of at most 8 runs. Adds derived curves and notes to the runs."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from plotly.offline import get_plotlyjs

    for run in runs:
        _derive(run)
    scripts = [get_plotlyjs(), _DRAW]
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    loader = PackageLoader("abkd_megatron", "tools")
    template = Environment(autoescape=True, undefined=StrictUndefined, loader=loader, trim_blocks=True)
    return template.get_template("report.html").render(
        generator=_GENERATOR,
        policy=" ".join(f"'sha256-{it}'" for it in hashes),
        names=[run.name for run in runs],
        about=_rows([_about(run) for run in runs]),
        notes=[note if len(runs) == 1 else f"{run.name}: {note}" for run in runs for note in run.notes],
        charts=_charts(runs),
        last=_last_numbers(runs),
        configurations={run.name: run.config for run in runs if run.config},
        scripts=scripts,
    )


# Derived curves -----------------------------------------------------------------------------------------------


def _derive(run: Run) -> None:
    """Add calibration error, throughput and the teacher's share of the step time, and notes on missing numbers."""
    for curves in run.splits.values():
        gaps = {name: curves.pop(name) for name in map(gap_name, range(NUM_BINS)) if name in curves}
        if len(gaps) == NUM_BINS:
            steps = sorted(set.intersection(*map(set, gaps.values())))
            of_steps = ({name: gap[step] for name, gap in gaps.items()} for step in steps)
            curves["calibration error"] = dict(zip(steps, map(calibration_error, of_steps), strict=True))
    training = run.splits[TRAINING]
    times, sizes, length = training.get("iteration-time", {}), training.get("batch-size", {}), run.integer("seq_length")
    times = {step: time for step, time in times.items() if time > 0 and step in sizes}
    if training and not times:
        run.notes.append("iteration-time or batch-size is missing: add Megatron's --log-timers-to-tensorboard")
    elif length:
        training["tokens per second"] = {step: sizes[step] * length / time for step, time in times.items()}
    at_once = run.integer("micro_batch_size") * run.integer("data_parallel_size")
    passes = {step: it for step, it in training.get("teacher seconds", {}).items() if math.isfinite(it)}
    if at_once and times and passes:
        ends = np.searchsorted(list(passes), list(times), side="right")
        sums, counts = (np.diff(it, prepend=0) for it in (np.cumsum([0, *passes.values()])[ends], ends))
        training["teacher's share"] = {
            step: total / count * sizes[step] / at_once / times[step]
            for step, total, count in zip(times, sums.tolist(), counts.tolist(), strict=True)
            if count
        }
    for split, curves in run.splits.items():
        for name, curve in curves.items():
            if missing := {step: value for step, value in curve.items() if not math.isfinite(value)}:
                which = f"{len(missing)} of {len(curve)} points, from step {min(missing)} to {max(missing)}"
                kinds = " or ".join(sorted({f"{value}" for value in missing.values()}))
                run.notes.append(f"{name} ({split}) is {kinds} at {which}")


# Charts -------------------------------------------------------------------------------------------------------


def _charts(runs: Sequence[Run]) -> dict[str, list[dict[str, Any]]]:
    """Return the charts by heading. A chart shows several names of one run, or one name of several runs."""
    names = list(dict.fromkeys(name for run in runs for curves in run.splits.values() for name in curves))
    charts: dict[str, list[dict[str, Any]]] = {}
    for heading, units in _CHARTS.items():
        for pattern, unit in units.items():
            found = [name for name in names if re.fullmatch(pattern, name)]
            names = [name for name in names if name not in found]
            together = len(runs) == 1 and heading != "Other"
            for part in [found] if found and together else [[name] for name in found]:
                charts.setdefault(heading, []).append(_chart(part, unit, runs))
    return charts


def _chart(names: Sequence[str], unit: str, runs: Sequence[Run]) -> dict[str, Any]:
    """Return `title`, and Plotly's `data` and `layout`. Names in them are escaped, because Plotly interprets markup."""
    from plotly import graph_objects
    from plotly.colors import qualitative

    title = ", ".join(names[:3]) + ", ..." * (len(names) > 3)
    figure = graph_objects.Figure()
    for index, (run, name) in enumerate((run, name) for run in runs for name in names):
        color, label = qualitative.D3[index % len(qualitative.D3)], name if len(runs) == 1 else run.name
        for split, curves in run.splits.items():
            if name not in curves or split.startswith("test"):
                continue
            points = _thinned(curves[name])
            trained = split == TRAINING
            figure.add_scatter(
                x=list(points),
                y=[value if math.isfinite(value) else None for value in points.values()],  # None draws a gap
                name=escape(label if trained else f"{label}, {split}", quote=False),
                mode="markers" if not trained else "lines" if len(points) > 50 else "lines+markers",
                line={"color": color, "width": 1.5},
                marker={"color": color, "size": 4 if trained else 8},
            )
    figure.update_layout(
        template="none",
        title={"text": escape(title, quote=False), "font": {"size": 14}},
        xaxis={"title": {"text": "step"}},
        yaxis={"title": {"text": unit}, "automargin": True},
        legend={"orientation": "h", "y": -0.25},
        margin={"l": 60, "r": 20, "t": 40, "b": 40},
        hovermode="x unified",
        showlegend=True,
    )
    drawn = [value for trace in figure.data for value in trace.y if value is not None]
    if drawn and 0 < 10 * min(drawn) < max(drawn) and all(map(_LOGARITHMIC.fullmatch, names)):
        figure.update_yaxes(type="log")
    return {"title": title, **figure.to_plotly_json()}


def _thinned(curve: Curve) -> Curve:
    """Return about `_MOST_POINTS` points at most: the minimum and maximum of each interval, rounded to fp32."""
    values = np.array(list(curve.values()), dtype=np.float32)
    kept = set(range(len(values)))
    if len(values) > _MOST_POINTS:
        parts = np.array_split(np.arange(len(values)), _MOST_POINTS // 2)
        extremes = [part[at] for part in parts for at in (values[part].argmin(), values[part].argmax())]
        kept = {0, len(values) - 1, *map(int, extremes)}
    steps = list(curve)
    return {steps[index]: float(str(values[index])) for index in sorted(kept)}


# Tables -------------------------------------------------------------------------------------------------------


def _about(run: Run) -> dict[str, str]:
    """Return the rows of a run: duration and settings."""
    planned, tokens = run.integer("train_iters"), run.samples * run.integer("seq_length")
    shares = run.splits[TRAINING].get("teacher's share")
    found = {
        "started": f"{datetime.fromtimestamp(run.started, UTC):%Y-%m-%d %H:%M UTC}",
        "steps": f"{run.last_step}{f' of {planned}' if planned else ''}",
        "tokens": f"{tokens:,}" if tokens else "",
        "wall time": clock(run.seconds),
        "teacher's share of step time": f"{sum(shares.values()) / len(shares):.1%}" if shares else "",
    }
    if run.arguments:
        found["student"] = model_name(_pattern(run.arguments.get("hybrid_layer_pattern")))
    with suppress(yaml.YAMLError):
        config = yaml.safe_load(run.config)
        for section in ("teacher", "distillation"):
            values = config.get(section) if isinstance(config, dict) else None
            if section == "teacher" and isinstance(values, dict) and values.get("load"):
                given = [values.get(name.replace("_", "-")) for name in PATTERN_OPTIONS]
                found["teacher"] = model_name(next(filter(None, map(_pattern, given)), None))
            for key, value in values.items() if isinstance(values, dict) else ():
                found[f"{section}.{key}"] = "" if value is None else flow(value)
    of_script = [name for name in run.arguments if name.startswith("kd_")]
    return found | {name: run.arguments[name] for name in (*of_script, *_ARGUMENTS) if name in run.arguments}


def _pattern(value: object) -> str | None:
    """Return a layer pattern as TensorBoard or a configuration has it; None for a GPTModel."""
    return None if value in (None, "None") else str(value)


def _rows(columns: Sequence[Mapping[str, str]]) -> dict[str, list[str]]:
    """Return rows by title, without empty rows."""
    titles = dict.fromkeys(title for column in columns for title in column)
    rows = {title: [column.get(title, "") for column in columns] for title in titles}
    return {title: row for title, row in rows.items() if any(row)}


def _last_numbers(runs: Sequence[Run]) -> tuple[list[str], dict[str, list[str]]]:
    """Return the numbers of each split's last step: column titles (one per run and split) and rows by name."""
    columns: dict[str, dict[str, str]] = {}
    for run in runs:
        for split, curves in run.splits.items():
            step = max((max(curve) for curve in curves.values()), default=0)
            title = f"{split}, step {step}" if len(runs) == 1 else f"{run.name}: {split}, step {step}"
            found = {name: f"{curve[step]:.5g}" for name, curve in curves.items() if step in curve}
            columns |= {title: found} if found else {}
    return list(columns), _rows(list(columns.values()))
