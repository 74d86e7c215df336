"""``abkd-megatron report``: the curves of a run, or of several over each other, as an HTML page of one file.

Everything comes from the event files, so the same files give the same page, byte for byte. Lines are the points as they
were logged, not smoothed.
"""

import base64
import hashlib
import json
import math
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from importlib import resources
from itertools import accumulate, batched
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from abkd_megatron.config.schema import SCHEDULED
from abkd_megatron.config.yaml import flow
from abkd_megatron.errors import ConfigError
from abkd_megatron.tools import chart
from abkd_megatron.tools.chart import Chart, Series, number
from abkd_megatron.tools.events import Curve, Run, find_runs, known, numbers_missing
from abkd_megatron.tools.runs import clock
from abkd_megatron.vocab_parallel.diagnostics import NUM_BINS, calibration_error, gap_name

_GENERATOR = '<meta name="generator" content="abkd_megatron report">'
_ROWS = 60  # of a chart's table

# Derived here from what is written.
_SHARE, _TOKENS, _CALIBRATION = "teacher's share", "tokens per second", "calibration error"
_SECONDS, _STEP = "teacher seconds", "iteration-time"
_MAIN = ("lm loss", "kd loss", "total loss", "teacher lm loss")


@dataclass(frozen=True)
class _Plan:
    """A chart of what is there of some names."""

    title: str
    unit: str
    names: str
    """A regular expression."""
    may_be_logarithmic: bool = False


_NATS = "nats a token"
_OF_TOKENS = "share of tokens"
_PLANS: dict[str, tuple[_Plan, ...]] = {
    "Losses": (
        _Plan("Cross entropy with the data", _NATS, "lm loss|teacher lm loss"),
        _Plan("What is trained", "", "total loss", True),
        _Plan("Divergence from the teacher, as it is trained", "", "kd loss", True),
        _Plan("Losses, without their weights", "", r"(?!(lm|kd|total|teacher lm|hidden) loss).+ loss( \d+)?", True),
        _Plan("Losses between layers, without their weights", "", "hidden loss .+", True),
    ),
    "Beside the teacher": (
        _Plan("KL to the teacher", _NATS, "kl to teacher|reverse kl to teacher", True),
        _Plan("Top-1 agreement with the teacher", _OF_TOKENS, "top-1 agreement"),
        _Plan("Entropy", _NATS, "student entropy|teacher entropy"),
        _Plan("The student's likeliest token", _OF_TOKENS, "top-1 accuracy|student confidence"),
        _Plan("Selected tokens", _OF_TOKENS, "selected tokens"),
        _Plan("Expected calibration error", _OF_TOKENS, _CALIBRATION),
        _Plan("Where the loss pushes", "", "hardness concentration|confidence concentration"),
        _Plan("ToDi's weight", "", "todi weight|todi weight of teacher"),
    ),
    "Schedules": tuple(_Plan(name, "", name) for name in SCHEDULED),
    "Optimiser": (
        _Plan("Learning rate", "", "learning-rate"),
        _Plan("Gradient norm", "", "grad-norm", True),
    ),
    "Time": (
        _Plan("Time of a step", "seconds, mean of a log interval", _STEP),
        _Plan("Throughput", "tokens per second", _TOKENS),
        _Plan("The teacher's share of a step", "share of time", _SHARE),
        _Plan("The teacher's pass on a micro-batch", "seconds", _SECONDS),
        _Plan("Arithmetic", "TFLOP/s a GPU", "throughput"),
    ),
}


def write_report(run: Path | Sequence[Path], out: Path | None = None) -> Path:
    """Write the page.

    Args:
        run: the directory of a run, its tensorboard directory, or several of either; a folder of several runs, too.
            Several are drawn over each other.
        out: the file; None for `report.html` in the directory, where only one is given.

    Returns:
        The file that was written.

    Raises:
        ConfigError: for a directory without a number to show, more runs than there are colors, or a file in place of
            the page that is no such page.
        HostError: without tensorboard, which reads the files.
    """
    paths = [run] if isinstance(run, Path) else list(run)
    if out is None and len(paths) != 1:
        raise ConfigError(f"expected a file to write the report of {len(paths)} runs to, got none; give --out FILE")
    out = out if out is not None else paths[0] / "report.html"
    runs = find_runs(paths)
    if len(runs) > chart.MOST_COLOURS:
        raise ConfigError(
            f"expected at most {chart.MOST_COLOURS} runs, which can be told apart, got {len(runs)}: "
            f"{', '.join(it.name for it in runs)}; give the directories of those to compare"
        )
    _check_place(out)
    page = render(runs)
    try:
        out.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{out}: expected a file that can be written, got: {error.strerror}; give --out") from error
    return out


def _check_place(out: Path) -> None:
    if not out.parent.is_dir():
        raise ConfigError(f"{out}: expected an existing folder to write to, got {out.parent}; make it, or give --out")
    if not out.exists():
        return
    with suppress(OSError), out.open(encoding="utf-8", errors="replace") as file:
        if _GENERATOR in file.read(2000):
            return
    raise ConfigError(f"{out}: expected an earlier report, to replace it, got something else; give another --out")


def render(runs: Sequence[Run]) -> str:
    """The page of these runs.

    Args:
        runs: at most `chart.MOST_COLOURS`; gets derived curves added.

    Returns:
        HTML.
    """
    for run in runs:
        _derive(run)
    title = " and ".join(run.name for run in runs) if len(runs) < 3 else f"{len(runs)} runs"
    groups = _charts(runs)
    steps = [step for charts in groups.values() for it in charts for step in it.steps()]
    ends = (min(steps), max(steps))  # of all charts, so that they can be held against each other
    figures: list[str] = []
    data: list[dict[str, Any]] = []
    for name, charts in groups.items():
        drawn = [chart.draw(it, f"chart{len(data) + index}", ends) for index, it in enumerate(charts)]
        data += [found for _, found in drawn]
        inside = "".join(_figure(it, svg) for it, (svg, _) in zip(charts, drawn, strict=True))
        figures.append(f'<h2>{escape(name)}</h2>\n<div class="charts">{inside}</div>\n')
    body = [
        f"<main><h1>{escape(title)}</h1>\n<p class=soft>{escape(_subtitle(runs))}</p>\n",
        _tiles(runs[0]) if len(runs) == 1 else "",
        _table_of_runs(runs),
        _notes(runs),
        *figures,
        _last_numbers(runs),
        *(_configuration(run, alone=len(runs) == 1) for run in runs),
        "</main>",
    ]
    script = (resources.files("abkd_megatron.tools") / "report.js").read_text(encoding="utf-8")
    parts = {
        "title": escape(f"{title}: training report"),
        "body": "".join(body),
        "data": _embedded(data),
        "script": script,
        "script-hash": f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}",
    }
    template = (resources.files("abkd_megatron.tools") / "report.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{([a-z-]+)\}\}", lambda found: parts[found[1]], template)


def _embedded(data: object) -> str:
    """JSON that cannot end the element it is in."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


# What is derived --------------------------------------------------------------------------------------------


def _derive(run: Run) -> None:
    """Add to a run what follows from its numbers; and with it what a page should say of them."""
    for curves in (run.training, *run.validation.values()):
        for name, curve in curves.items():  # fp32, as short as it can be said
            curves[name] = {step: float(str(np.float32(value))) for step, value in curve.items()}
        gaps = [gap_name(index) for index in range(NUM_BINS)]
        if all(name in curves for name in gaps):
            found = {name: curves.pop(name) for name in gaps}
            curves[_CALIBRATION] = {
                step: _short(calibration_error({name: curve[step] for name, curve in found.items()}))
                for step in found[gaps[0]]
                if all(step in curve for curve in found.values())
            }
    times, length = known(run.training.get(_STEP, {})), run.integer("seq_length")
    sizes = run.training.get("batch-size", {})
    if times and sizes and length:
        run.training[_TOKENS] = {
            step: _short(sizes[step] * length / time) for step, time in times.items() if step in sizes and time > 0
        }
    shares = _teachers_shares(run, times)
    if shares:
        run.training[_SHARE] = shares
    if "kd loss" in run.training and not shares:
        if _SECONDS not in run.training:
            run.notes.append(f"the teacher's share of the time is not known: there is no `{_SECONDS}` in the files")
        elif not times:
            run.notes.append(
                f"the teacher's share of the time is not known: there is no `{_STEP}` in the files; give Megatron "
                "--log-timers-to-tensorboard"
            )
        else:
            run.notes.append("the teacher's share of the time is not known: the files do not say how large a batch is")
    elif run.training and not times:
        run.notes.append(f"there is no `{_STEP}` in the files: give Megatron --log-timers-to-tensorboard")
    for name, curve in run.training.items():
        for first, last, what in numbers_missing(curve):
            where = f"step {first}" if first == last else f"steps {first} to {last}"
            run.notes.append(f"{name} is {what} at {where}: a gap in its line")
    for of_set, curves in run.validation.items():
        for name, curve in curves.items():
            for first, last, what in numbers_missing(curve):
                where = f"step {first}" if first == last else f"steps {first} to {last}"
                run.notes.append(f"{name} is {what} in {_set(of_set)} at {where}")


def _teachers_shares(run: Run, times: Mapping[int, float]) -> Curve:
    """Of each log interval that Megatron has timed: seconds of a pass, times micro-batches a step, over a step's."""
    passes, sizes = known(run.training.get(_SECONDS, {})), run.training.get("batch-size", {})
    of_ranks = [run.integer(name) for name in ("micro_batch_size", "data_parallel_size")]
    at_once = math.prod(it for it in of_ranks if it) if all(of_ranks) else 0
    steps, sums = list(passes), [0.0, *accumulate(passes.values())]
    shares, before = {}, 0
    for step, seconds in times.items():
        until = bisect_right(steps, step)
        if until > before and at_once and seconds > 0 and step in sizes:
            shares[step] = _short((sums[until] - sums[before]) / (until - before) * sizes[step] / at_once / seconds)
        before = until
    return shares


def _short(value: float) -> float:
    return float(f"{value:.6g}")


# Charts -----------------------------------------------------------------------------------------------------


def _charts(runs: Sequence[Run]) -> dict[str, list[Chart]]:
    """By heading. Of one run a chart has several names; of several runs one name, in a color a run."""
    names = list(dict.fromkeys(name for run in runs for curves in _all_curves(run) for name in curves))
    groups: dict[str, list[Chart]] = {}
    taken = set()
    for heading, plans in _PLANS.items():
        for plan in plans:
            found = [name for name in names if name not in taken and re.fullmatch(plan.names, name)]
            taken |= set(found)
            if found:
                groups.setdefault(heading, []).extend(_charts_of(plan, found, runs))
    for name in names:
        if name not in taken and _changes(name, runs):
            groups.setdefault("Other numbers", []).extend(_charts_of(_Plan(name, "", ""), [name], runs))
    return groups


def _charts_of(plan: _Plan, names: Sequence[str], runs: Sequence[Run]) -> Iterable[Chart]:
    sets = list(dict.fromkeys(of_set for run in runs for of_set in run.validation)) or [""]

    def series(run: Run, name: str, of_set: str, label: str, color: int) -> Series:
        line = run.training.get(name, {}) if of_set == sets[0] else {}
        return Series(label, color, line, run.validation.get(of_set, {}).get(name, {}))

    charts: dict[str, list[Series]] = {}
    if len(runs) == 1:
        labels = {(name, it): name if len(sets) == 1 else f"{name}, {_set(it)}" for name in names for it in sets}
        for part in batched(labels.items(), chart.MOST_COLOURS):
            title = plan.title if len(labels) <= chart.MOST_COLOURS else f"{plan.title}: {part[0][1]} and so on"
            charts[title] = [series(runs[0], *key, label, color) for color, (key, label) in enumerate(part)]
    else:
        for name in names:
            for it in sets:
                title = ": ".join([plan.title, *([name] if len(names) > 1 else []), *([_set(it)] if it else [])])
                charts[title] = [series(run, name, it, run.name, color) for color, run in enumerate(runs)]
    for title, found in charts.items():
        if drawn := [one for one in found if one.line or one.dots]:
            yield Chart(title, plan.unit, drawn, plan.may_be_logarithmic)


def _all_curves(run: Run) -> list[dict[str, Curve]]:
    return [run.training, *run.validation.values()]


def _changes(name: str, runs: Sequence[Run]) -> bool:
    """Whether there is anything to see of it: the batch size and the loss scale are often one number."""
    return len({value for run in runs for curves in _all_curves(run) for value in curves.get(name, {}).values()}) > 1


def _set(name: str) -> str:
    return f"validation {name}".strip()


def _figure(it: Chart, svg: str) -> str:
    legend = [f'<li><i class="k{one.color}"></i>{escape(one.label)}</li>' for one in it.series]
    if any(one.dots for one in it.series):
        legend.append('<li><i class="round"></i>validation</li>')
    return (
        f'<figure><h3>{escape(it.title)}</h3><ul class="legend">{"".join(legend)}</ul>{svg}'
        f'<output aria-live="polite">{escape(chart.last_of(it))}</output>'
        f"{_numbers(it)}</figure>\n"
    )


def _numbers(it: Chart) -> str:
    """The table of a chart's points, or of every so manieth."""
    tables = []
    for kind, curves in (
        ("Training", {one.label: one.line for one in it.series if one.line}),
        ("Validation", {one.label: one.dots for one in it.series if one.dots}),
    ):
        steps = sorted({step for curve in curves.values() for step in curve})
        every = math.ceil(len(steps) / _ROWS)
        shown = [step for index, step in enumerate(steps) if index % every == 0 or step == steps[-1]]
        if not steps:
            continue
        rows = [[str(step), *(_cell(curve.get(step), repr) for curve in curves.values())] for step in shown]
        caption = kind if every == 1 else f"{kind}: one of every {every} of {len(steps)} logged steps, and the last"
        tables.append(_table(caption, ["step", *curves], rows))
    return f'<details><summary>Numbers</summary><div class="wide">{"".join(tables)}</div></details>'


def _cell(value: float | None, write: Callable[[float], str] = number) -> str:
    return "" if value is None else write(value) if math.isfinite(value) else number(value)


def _table(caption: str, titles: Sequence[str], rows: Iterable[Sequence[str]], words: bool = False) -> str:
    kind = ' class="words"' if words else ""
    head = "".join(f'<th scope="col"{kind if index else ""}>{escape(it)}</th>' for index, it in enumerate(titles))
    lines = []
    for first, *others in rows:
        cells = "".join(f"<td{kind}>{escape(it)}</td>" for it in others)
        lines.append(f'<tr><th scope="row">{escape(first)}</th>{cells}</tr>')
    return (
        f"<table><caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(lines)}</tbody></table>"
    )


# Words and tables -------------------------------------------------------------------------------------------


def _subtitle(runs: Sequence[Run]) -> str:
    started = f"Started {_date(runs[0])}. " if len(runs) == 1 else ""
    return (
        f"{started}Lines are training as it was logged, every point, not smoothed; of more than {chart.MOST_POINTS} "
        "points the smallest and the largest of neighbors. Dots are validation. Point at a chart, or go along it with "
        "the arrow keys, to read it."
    )


def _date(run: Run) -> str:
    return datetime.fromtimestamp(run.started, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _tiles(run: Run) -> str:
    of_set, validation = next(iter(run.validation.items()), ("", {}))
    found: list[tuple[str, str]] = []
    for name, title in (
        ("lm loss", "cross entropy"),
        ("teacher lm loss", "the teacher's"),
        ("kl to teacher", "KL to the teacher"),
        ("top-1 agreement", "top-1 agreement"),
    ):
        source = validation if name in validation else run.training
        if curve := source.get(name):
            step = next(reversed(curve))
            where = _set(of_set) if source is validation else "training"
            found.append((number(curve[step]), f"{title}, {where} at step {step}"))
    found.append((number(run.last_step), f"steps{_of_steps(run)}"))
    if (tokens := _tokens(run)) is not None:
        found.append((number(tokens), "tokens trained on"))
    found.append((clock(run.seconds), "wall time, " + ("h:min:s" if run.seconds >= 3600 else "min:s")))
    if shares := run.training.get(_SHARE):
        found.append((f"{sum(shares.values()) / len(shares):.1%}", "of a step is the teacher's"))
    items = "".join(f"<li><b>{escape(value)}</b><span>{escape(what)}</span></li>" for value, what in found)
    return f'<ul class="tiles">{items}</ul>\n'


def _of_steps(run: Run) -> str:
    planned = run.integer("train_iters")
    return f" of {number(planned)}" if planned else ""


def _tokens(run: Run) -> int | None:
    length = run.integer("seq_length")
    return run.samples * length if run.samples is not None and length else None


def _table_of_runs(runs: Sequence[Run]) -> str:
    rows: dict[str, list[str]] = {}

    def row(title: str, write: Callable[[Run], str | None]) -> None:
        if any(cells := [write(run) or "" for run in runs]):
            rows[title] = cells

    row("trained on", _trained_on)
    row("teacher", _teacher)
    row("student", _student)
    row("layout", _layout)
    if len(runs) > 1:  # of one run they stand above
        row("started", _date)
        row("steps", lambda run: f"{number(run.last_step)}{_of_steps(run)}")
        row("tokens", lambda run: None if (tokens := _tokens(run)) is None else number(tokens))
        row("wall time", lambda run: clock(run.seconds))
    row("the teacher's share of a step", _share)
    titles, cells = ["", *(run.name for run in runs)], [[title, *row] for title, row in rows.items()]
    return f'<div class="wide summary">{_table("What was run", titles, cells, words=True)}</div>\n'


def _distillation(run: Run) -> dict[str, Any]:
    """The `distillation:` section of the configuration, as it was merged; empty where there is none."""
    with suppress(yaml.YAMLError):
        config = yaml.safe_load(run.config or "")
        if isinstance(config, dict) and isinstance(config.get("distillation"), dict):
            return config["distillation"]
    return {}


# What of `distillation:` is no parameter of the divergence.
_NO_PARAMETERS = (
    *("divergence", "losses", "temperature", "kd_weight", "lm_weight", "hidden_losses", "head", "chunk_tokens"),
    *("kernel", "gradient_in_place", "shared_vocab", "tokens", "diagnostics", "on_change"),
)


def _trained_on(run: Run) -> str:
    given = _distillation(run)
    if given:
        parameters = {key: value for key, value in given.items() if key not in _NO_PARAMETERS}
        how = f" ({', '.join(f'{key} {flow(value)}' for key, value in parameters.items())})" if parameters else ""
        losses = flow(given["losses"]) if given.get("losses") else f"{given.get('divergence')}{how}"
        beside = ["kd_weight", "lm_weight", "temperature"]
        beside += [name for name in ("hidden_losses", "tokens", "shared_vocab") if given.get(name)]
        return "; ".join([losses, *(f"{name} {flow(given.get(name))}" for name in beside)])
    arguments = {name: text for name, text in run.arguments.items() if name.startswith("kd_")}
    if arguments:
        return " ".join(f"--{name.replace('_', '-')} {text}" for name, text in arguments.items())
    if any("kd loss" in curves for curves in _all_curves(run)):
        return "total loss = cross entropy with the data and a divergence from a teacher, which these files do not name"
    return "cross entropy with the data, without a teacher"


def _teacher(run: Run) -> str | None:
    with suppress(yaml.YAMLError):
        config = yaml.safe_load(run.config or "")
        if isinstance(config, dict) and isinstance(config.get("teacher"), dict):
            return ", ".join(f"{key} {flow(value)}" for key, value in config["teacher"].items() if value is not None)
    return None


def _student(run: Run) -> str:
    names = {"layers": "num_layers", "hidden size": "hidden_size", "heads": "num_attention_heads"}
    names |= {"experts": "num_experts", "vocabulary": "vocab_size", "sequences of": "seq_length"}
    return ", ".join(f"{title} {value}" for title, name in names.items() if (value := run.integer(name)))


def _layout(run: Run) -> str:
    names = {"TP": "tensor_model_parallel_size", "PP": "pipeline_model_parallel_size"}
    names |= {"VPP": "virtual_pipeline_model_parallel_size", "CP": "context_parallel_size"}
    names |= {"EP": "expert_model_parallel_size", "DP": "data_parallel_size"}
    sizes = " x ".join(
        f"{title} {value}" for title, name in names.items() if (value := run.integer(name)) and value > 1
    )
    ranks, batch, micro = map(run.integer, ("world_size", "global_batch_size", "micro_batch_size"))
    said = [f"{ranks} rank{'s' * (ranks > 1)}" if ranks else "", sizes]
    said += [f"{batch} sequences a step, {micro} a micro-batch" if batch and micro else ""]
    return ", ".join(it for it in said if it)


def _share(run: Run) -> str | None:
    if not (shares := run.training.get(_SHARE)):
        return None
    stages = run.integer("pipeline_model_parallel_size") or 1
    where = f"on the ranks of the last of {stages} pipeline stages" if stages > 1 else "on every rank"
    return (
        f"{sum(shares.values()) / len(shares):.1%}, measured {where}: its pass on each micro-batch and waiting for "
        f"its messages, without its output layer, which is part of the loss; mean over {len(shares)} log intervals"
    )


def _notes(runs: Sequence[Run]) -> str:
    notes = [note if len(runs) == 1 else f"{run.name}: {note}" for run in runs for note in run.notes]
    if not notes:
        return ""
    return f'<h2>Notes</h2><ul class="notes">{"".join(f"<li>{escape(note)}</li>" for note in notes)}</ul>\n'


def _last_numbers(runs: Sequence[Run]) -> str:
    columns: list[tuple[str, dict[str, float]]] = []
    for run in runs:
        name = "" if len(runs) == 1 else f"{run.name}: "
        parts: list[tuple[str, dict[str, tuple[int, float]]]] = [("training", _last(run.training))]
        for of_set in run.validation:
            parts.append((_set(of_set), _last(run.validation[of_set])))
        for of_set, last in run.test.items():
            parts.append((f"test {of_set}".strip(), last))
        for title, found in parts:
            if found:
                step = max(step for step, _ in found.values())
                column = {key: value for key, (at, value) in found.items() if at == step}
                columns.append((f"{name}{title}, step {step}", column))
    names = list(dict.fromkeys(name for _, column in columns for name in column))
    first = [name for name in names if name in _MAIN]
    rows = [
        [name, *(_cell(column.get(name)) for _, column in columns)]
        for name in [*first, *(it for it in names if it not in first)]
    ]
    return (
        "<h2>Last numbers</h2>"
        f'<div class="wide">{_table("As they were logged", ["", *(title for title, _ in columns)], rows)}</div>\n'
    )


def _last(curves: Mapping[str, Curve]) -> dict[str, tuple[int, float]]:
    return {name: (step, curve[step]) for name, curve in curves.items() for step in [next(reversed(curve))]}


def _configuration(run: Run, alone: bool) -> str:
    of = "" if alone else f" of {run.name}"
    if run.config is not None:
        inside, what = f"<pre>{escape(run.config)}</pre>", "Configuration"
    elif run.arguments:
        rows = sorted([name, text] for name, text in run.arguments.items())
        inside = f'<div class="wide">{_table("As Megatron has written them", ["", ""], rows, words=True)}</div>'
        what = "Megatron's arguments"
    else:
        return ""
    return f"<details><summary>{escape(what + of)}</summary>{inside}</details>\n"
