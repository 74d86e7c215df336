"""The page of a run: its numbers are those of the event files, and what the files say cannot harm the page."""

import base64
import hashlib
import importlib.util
import json
import math
import shutil
import subprocess
from collections.abc import Mapping
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest

pytest.importorskip("tensorboard")
pytest.importorskip("plotly")
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from abkd_megatron.__main__ import main
from abkd_megatron.config.load import CONFIG_TEXT
from abkd_megatron.errors import ConfigError, HostError
from abkd_megatron.tools import report as report_module
from abkd_megatron.tools.events import find_runs
from abkd_megatron.tools.report import write_report
from abkd_megatron.vocab_parallel.diagnostics import NUM_BINS, gap_name

# As Megatron writes them: 2 data-parallel ranks of 4 micro-batches each a step.
ARGUMENTS = {
    **{"seq_length": "4096", "micro_batch_size": "2", "data_parallel_size": "2", "global_batch_size": "16"},
    **{"pipeline_model_parallel_size": "2", "world_size": "4", "train_iters": "20", "num_layers": "2"},
    **{"eval_interval": "5", "do_valid": "1", "do_test": "1"},
}
CONFIG = """\
device: cpu
teacher:
  load: runs/teacher
distillation:
  divergence: alpha_beta
  alpha: {schedule: linear, from: 0.5, to: 0.2, end: 20}
  beta: 0.7
  temperature: 2.0
  kd_weight: 1.0
  lm_weight: 0.5
  chunk_tokens: null
"""
TRAINED = ("lm loss", "teacher lm loss", "kd loss", "total loss", "kl to teacher", "teacher seconds", "alpha")


def curve(name: str, step: int) -> float:
    return len(name) / 7 + math.sin(step + len(name)) / 3


def write_job(
    directory: Path,
    steps: range = range(1, 21),
    names: tuple[str, ...] = TRAINED,
    *,
    shift: float = 0.0,
    ends: bool = True,
    config: str | None = CONFIG,
    others: Mapping[str, Mapping[int, float]] | None = None,
) -> Path:
    """The event file of one job, by the writer that Megatron uses."""
    writer = SummaryWriter(str(directory), filename_suffix=f".{steps.start:04}")
    if config is not None:
        writer.add_text(CONFIG_TEXT, "    " + config.replace("\n", "\n    ").removesuffix("    "))
    for name, value in ARGUMENTS.items():
        writer.add_text(name, value)
    for step in steps:
        for name in (*names, "batch-size"):
            value = 16.0 if name == "batch-size" else curve(name, step) + shift
            writer.add_scalar(name, value, step)
            writer.add_scalar(f"{name} vs samples", value, 16 * step)
        if step % 5 == 0:
            writer.add_scalar("iteration-time", 2.0 + step / 10, step)
        # In training; after it once more; and of the test split.
        for times in range(0 if step % 5 else 3 if ends and step == steps[-1] else 1):
            for name in names[:4]:
                writer.add_scalar(f"{name} validation", curve(name, step) + 1 + times + shift, step)
                writer.add_scalar(f"{name} validation vs samples", curve(name, step), 16 * step)
    for name, values in (others or {}).items():
        for step, value in values.items():
            writer.add_scalar(name, value, step)
    writer.close()
    return directory


class Page(HTMLParser):
    """Elements with attributes, the text in each kind of element, rows of tables, and Plotly's charts by title."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.rows: dict[str, list[str]] = {}
        self._open: list[str] = []
        self._row: list[str] = []
        self.source = path.read_text()
        self.feed(self.source)
        self.charts = {it["title"]: it for it in json.loads(self.texts["script"][0])}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag != "meta":
            self._open.append(tag)
            self.texts.setdefault(tag, []).append("")
        if tag == "tr":
            self._row = []
        if tag in ("th", "td"):
            self._row.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, "elements are closed in order"
        if tag == "tr":
            self.rows[self._row[0]] = self._row[1:]

    def handle_data(self, data: str) -> None:
        if self._open:
            self.texts[self._open[-1]][-1] += data
            if self._open[-1] in ("th", "td"):
                self._row[-1] += data

    def curves(self, title: str) -> dict[str, dict[int, float | None]]:
        """The points of each trace of a chart, by the trace's name as it is shown."""
        return {unescape(it["name"]): dict(zip(it["x"], it["y"], strict=True)) for it in self.charts[title]["data"]}


def report(*runs: Path, out: Path) -> Page:
    return Page(write_report(list(runs), out))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rates = {step: 0.0008 / step for step in range(1, 21)}
    directory = tmp_path_factory.mktemp("runs") / "student" / "tensorboard"
    return write_job(directory, others={"learning-rate": rates}).parent


@pytest.fixture(scope="module")
def page(run: Path) -> Page:
    return Page(write_report(run))


def test_charts_have_the_numbers_of_the_event_files(run: Path, page: Page) -> None:
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    shown: dict[str, dict[int, float | None]] = {}
    for title in page.charts:
        shown |= {name.replace(", ", " "): curve for name, curve in page.curves(title).items()}
    for tag in events.Tags()["scalars"]:
        if " vs samples" not in tag:
            values: dict[int, float] = {}
            for event in events.Scalars(tag):
                values.setdefault(event.step, event.value)  # of validation the first of a step
            curve = shown.pop(tag)
            assert list(curve) == list(values), tag
            assert list(curve.values()) == pytest.approx(list(values.values()), rel=1e-7), tag
    assert shown.keys() == {"tokens per second", "teacher's share"}
    places = [attributes["aria-label"] for tag, attributes in page.elements if attributes.get("class") == "chart"]
    assert places == list(page.charts)


def test_the_test_split_is_told_from_validation(page: Page) -> None:
    assert page.rows[""] == ["training, step 20", "validation, step 20", "test, step 20"]
    for name in ("lm loss", "total loss"):
        assert page.rows[name] == [f"{curve(name, 20) + add:.5g}" for add in (0, 1, 3)]
        chart = "lm loss, teacher lm loss" if name == "lm loss" else name
        assert page.curves(chart)[f"{name}, validation"][20] == pytest.approx(curve(name, 20) + 1)


def test_the_teachers_share_of_a_step(page: Page) -> None:
    wanted = {
        step: sum(curve("teacher seconds", at) for at in range(step - 4, step + 1)) / 5 * 4 / (2 + step / 10)
        for step in (5, 10, 15, 20)
    }
    assert page.curves("teacher's share")["teacher's share"] == pytest.approx(wanted, rel=1e-5)
    assert page.rows["teacher's share of step time"] == [f"{sum(wanted.values()) / 4:.1%}"]
    throughput = page.curves("tokens per second")["tokens per second"]
    assert throughput == pytest.approx({step: 16 * 4096 / (2 + step / 10) for step in wanted}, rel=1e-5)


def test_what_was_run(page: Page) -> None:
    assert page.texts["pre"] == [CONFIG]
    wanted = {
        "steps": "20 of 20",
        "tokens": f"{20 * 16 * 4096:,}",
        "teacher.load": "runs/teacher",
        "distillation.alpha": "{schedule: linear, from: 0.5, to: 0.2, end: 20}",
        "distillation.beta": "0.7",
        "pipeline_model_parallel_size": "2",
    }
    assert {name: page.rows[name] for name in wanted} == {name: [text] for name, text in wanted.items()}
    assert "distillation.chunk_tokens" not in page.rows


def test_it_is_one_file_that_asks_for_nothing(page: Page) -> None:
    tags = [tag for tag, _ in page.elements]
    assert tags.count("script") == 3 and not {"link", "img", "iframe", "object", "base"} & set(tags)
    for tag, attributes in page.elements:
        assert not {"src", "href", "action", "data", "srcset"} & attributes.keys(), (tag, attributes)
    style = page.texts["style"][0]
    assert "@import" not in style and "url(" not in style
    (policy,) = [it["content"] for tag, it in page.elements if it.get("http-equiv") == "Content-Security-Policy"]
    library, own = page.texts["script"][1:]
    assert "plotly.js" in library[:200] and "Plotly.newPlot" in own and "http" not in own
    hashes = [f"'sha256-{base64.b64encode(hashlib.sha256(it.encode()).digest()).decode()}'" for it in (library, own)]
    assert policy is not None and f"script-src {' '.join(hashes)};" in policy
    # The library knows hosts (of maps); the page cannot reach any.
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline';") and "connect-src" not in policy
    assert "http" not in policy


def test_the_same_files_give_the_same_page(run: Path, page: Page) -> None:
    assert write_report(run).read_text() == page.source  # and one of ours is replaced


def test_several_runs_are_drawn_over_each_other(tmp_path: Path, run: Path) -> None:
    plain = write_job(tmp_path / "alone", names=("lm loss",), config=None, shift=0.5)
    page = report(plain, run, out=tmp_path / "both.html")
    alone, student = find_runs([plain, run])
    assert (alone.name.rpartition("/")[2], student.name.rpartition("/")[2]) == ("alone", "student")
    found = page.curves("lm loss")
    assert list(found) == [name + split for name in (alone.name, student.name) for split in ("", ", validation")]
    assert found[alone.name][1] == pytest.approx(curve("lm loss", 1) + 0.5)
    colors = {title: {it["name"]: it["line"]["color"] for it in chart["data"]} for title, chart in page.charts.items()}
    assert len(set(colors["lm loss"].values())) == 2
    assert colors["total loss"][student.name] == colors["lm loss"][student.name], "one color for a run in all charts"
    assert page.rows["distillation.divergence"] == ["", "alpha_beta"]
    assert ("tr", {"class": "differs"}) in page.elements
    folder = report(tmp_path, out=tmp_path / "one.html")
    assert folder.texts["h1"] == ["alone"], "a folder of runs"
    with pytest.raises(ConfigError, match=r"--out FILE"):
        write_report([plain, run])


def test_names_are_the_paths_that_differ(tmp_path: Path) -> None:
    for name in ("kl/seed-1", "todi/seed-1"):
        write_job(tmp_path / name / "tensorboard", range(1, 2), ("lm loss",))
    assert [it.name for it in find_runs([tmp_path])] == ["kl/seed-1", "todi/seed-1"]


def test_more_runs_than_colors_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for index in range(9):
        write_job(tmp_path / f"{index}", range(1, 2), ("lm loss",))
    with pytest.raises(ConfigError, match="8 runs, got 9"):
        write_report(tmp_path)
    assert main(["report", str(tmp_path)]) == 2
    assert not (tmp_path / "report.html").exists()
    shutil.rmtree(tmp_path / "8")
    assert main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'report.html'}\n"


def test_what_the_files_say_is_text(tmp_path: Path) -> None:
    evil = '"><img src=x onerror=alert(1)>'
    ending = "</script><script>alert(1)</script>&amp;"
    link = '<a href="https://example.org">loss</a>'  # Plotly's own markup
    names = ("lm loss", f"{ending} loss", evil, link)
    write_job(tmp_path / evil, names=names, config=f"distillation:\n  divergence: '{ending}'\n")
    page = report(tmp_path / evil, out=tmp_path / "report.html")
    assert [tag for tag, _ in page.elements].count("script") == 3
    assert not [tag for tag, attributes in page.elements if tag in ("img", "a") or "onerror" in attributes]
    assert page.texts["h1"] == [evil]
    traces = [it["name"] for chart in page.charts.values() for it in chart["data"]]
    assert {*names} <= {unescape(it) for it in traces}
    titles = [chart["layout"]["title"]["text"] for chart in page.charts.values()]
    assert not any("<" in it for it in [*traces, *titles])
    assert page.rows["distillation.divergence"] == [f"{ending}"] and ending in page.texts["pre"][0]


def test_nothing_of_others_is_overwritten(tmp_path: Path, run: Path) -> None:
    out = tmp_path / "report.html"
    out.write_text("<html>precious</html>")
    with pytest.raises(ConfigError, match=r"--out"):
        write_report(run, out)
    assert out.read_text() == "<html>precious</html>"
    with pytest.raises(ConfigError, match="writable"):
        write_report(run, tmp_path)
    with pytest.raises(ConfigError, match="existing folder"):
        write_report(run, tmp_path / "nowhere" / "report.html")


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="event files"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="event files"):
        write_report(tmp_path)
    SummaryWriter(str(tmp_path / "empty")).close()
    with pytest.raises(ConfigError, match="numbers"):
        write_report(tmp_path)


@pytest.mark.parametrize("package", ["tensorboard", "plotly", "jinja2"])
def test_a_missing_package_is_named_with_its_extra(package: str, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
    with pytest.raises(HostError, match=rf"{package}.*abkd-megatron\[plots\]"):
        write_report(run)


def test_damaged_files_are_named_and_read_as_far_as_they_go(tmp_path: Path) -> None:
    write_job(tmp_path / "run")
    (file,) = (tmp_path / "run").iterdir()
    whole = file.read_bytes()
    end = whole.index(b"lm loss", len(whole) // 2)
    for damaged in (whole[:end], whole[:end] + b"XX" + whole[end + 2 :]):
        file.write_bytes(damaged)
        page = report(tmp_path / "run", out=tmp_path / "report.html")
        (note,) = [it for it in page.texts["li"] if "damaged" in it]
        assert file.name in note and f"to {len(damaged)}" in note
        line = page.curves("lm loss, teacher lm loss")["lm loss"]
        assert 1 < len(line) < 20 and line[1] == pytest.approx(curve("lm loss", 1))
    file.unlink()
    file.mkdir()  # no file at all
    with pytest.raises(ConfigError, match=r"events\.out"):
        write_report(tmp_path / "run")


def test_a_step_that_was_trained_twice_is_the_later_jobs(tmp_path: Path) -> None:
    first = write_job(tmp_path / "run", range(1, 18), ends=False)
    write_job(first, range(11, 16), shift=2.0, config=CONFIG.replace("0.7", "0.3"))
    (run,) = find_runs([first])
    assert list(run.splits["training"]["lm loss"]) == list(range(1, 16))
    assert list(run.splits["validation"]["lm loss"]) == [5, 10, 15]
    for split, add in (("training", 0.0), ("validation", 1.0)):
        for step, value in run.splits[split]["lm loss"].items():
            assert value == pytest.approx(curve("lm loss", step) + add + 2.0 * (step > 10)), (split, step)
    assert run.splits["test"]["lm loss"] == {15: pytest.approx(curve("lm loss", 15) + 5.0)}
    assert run.notes == ["steps 11 to 17 were trained twice; the later job's numbers are shown"]
    assert run.samples == 15 * 16 and "beta: 0.3" in run.config


def test_what_is_no_number_is_a_gap_with_a_name(tmp_path: Path) -> None:
    values = {step: math.nan if 4 <= step <= 6 else math.inf if step == 9 else float(step) for step in range(1, 12)}
    page = report(write_job(tmp_path / "run", others={"grad-norm": values}), out=tmp_path / "report.html")
    line = page.curves("grad-norm")["grad-norm"]
    assert line == {step: value if math.isfinite(value) else None for step, value in values.items()}
    (note,) = [it for it in page.texts["li"] if it.startswith("grad-norm (training)")]
    assert "inf or nan at 4 of 11 points" in note and "4 to 9" in note


def test_a_run_without_a_teacher_and_without_times(tmp_path: Path) -> None:
    writer = SummaryWriter(str(tmp_path))
    for step in range(1, 4):
        writer.add_scalar("lm loss", 3.0 / step, step)
    writer.close()
    page = Page(write_report(tmp_path))
    assert list(page.charts) == ["lm loss"]
    assert any("--log-timers-to-tensorboard" in it for it in page.texts["li"])


def test_validation_sets_have_curves_of_their_own(tmp_path: Path) -> None:
    sets = {f"lm loss validation-{name}": {5: value} for name, value in (("code", 1.5), ("prose", 2.5))}
    writer = SummaryWriter(str(tmp_path))
    for name, values in {"lm loss": {1: 4.0, 5: 2.0}, **sets, "lm loss validation-code ppl": {5: 9.0}}.items():
        for step, value in values.items():
            writer.add_scalar(name, value, step)
    writer.close()
    assert Page(write_report(tmp_path)).curves("lm loss") == {
        "lm loss": {1: 4.0, 5: 2.0},
        "lm loss, validation code": {5: 1.5},
        "lm loss, validation prose": {5: 2.5},
    }


def test_the_arguments_of_a_script_of_ones_own_are_shown(tmp_path: Path) -> None:
    writer = SummaryWriter(str(tmp_path / "run"))
    own = {"kd_teacher_load": "runs/<teacher>", "kd_alpha": "0.3", "hybrid_layer_pattern": "M*-|M*-"}
    for name, value in {**ARGUMENTS, **own}.items():
        writer.add_text(name, value)
    for name in TRAINED:
        writer.add_scalar(name, 1.0, 1)
    writer.close()
    page = report(tmp_path / "run", out=tmp_path / "report.html")
    assert page.rows["kd_teacher_load"] == ["runs/<teacher>"] and page.rows["kd_alpha"] == ["0.3"]
    assert page.rows["seq_length"] == ["4096"]
    assert page.rows["student"] == ["HybridModel M*-|M*-"]


def test_calibration_is_one_number_of_its_gaps(tmp_path: Path) -> None:
    gaps = {f"{gap_name(index)} validation": {5: (-1) ** index * 0.01 * index} for index in range(NUM_BINS)}
    page = report(write_job(tmp_path / "run", others=gaps), out=tmp_path / "report.html")
    wanted = sum(0.01 * index for index in range(NUM_BINS))
    assert page.curves("calibration error") == {"calibration error, validation": {5: pytest.approx(wanted)}}
    assert "calibration gap" not in "".join(page.texts["script"][:1])


def test_a_long_curve_keeps_its_extremes() -> None:
    values = {step: math.sin(step / 50) for step in range(1, 30_001)}
    values |= {777: 9.0, 20_000: -9.0, 25_000: math.nan}
    points = report_module._thinned(values)
    assert len(points) <= report_module._MOST_POINTS + 2
    assert (points[777], points[20_000]) == (9.0, -9.0) and math.isnan(points[25_000])
    assert {1, 30_000} <= points.keys() and list(points) == sorted(points)
    assert report_module._thinned({1: 0.1, 2: 5.0}) == {1: 0.1, 2: 5.0}


def test_a_curve_over_a_decade_is_over_a_logarithmic_axis(tmp_path: Path) -> None:
    others = {"grad-norm": {1: 100.0, 2: 10.0, 3: 1.0}, "learning-rate": {1: 0.1, 2: 0.001}}
    page = report(write_job(tmp_path / "run", others=others), out=tmp_path / "report.html")
    kinds = {title: chart["layout"]["yaxis"].get("type") for title, chart in page.charts.items()}
    assert {title for title, kind in kinds.items() if kind == "log"} == {"grad-norm"}


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH")
def test_a_browser_draws_every_chart(tmp_path: Path, page: Page) -> None:
    (tmp_path / "page.html").write_text(page.source)
    words = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", "--virtual-time-budget=9000"]
    words += ["--enable-logging=stderr", "--dump-dom", (tmp_path / "page.html").as_uri()]
    ended = subprocess.run([str(CHROMIUM), *words], capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in ended.stderr, "the page's own policy lets its own scripts run"
    assert ended.stdout.count('class="plot-container') == len(page.charts)
