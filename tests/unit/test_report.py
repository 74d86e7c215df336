"""The page of a run: its numbers are those of the event files, and what the files say cannot harm the page."""

import base64
import hashlib
import importlib.util
import json
import math
import re
import shutil
import subprocess
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path

import pytest

pytest.importorskip("tensorboard")
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from abkd_megatron.config.load import CONFIG_TEXT
from abkd_megatron.errors import ConfigError, HostError
from abkd_megatron.tools import chart
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
    """What is in a page: elements with attributes, and the text in some."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.figures: list[dict[str, list]] = []
        self.texts: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.source = path.read_text()
        self.feed(self.source)
        self.data = json.loads(self.texts["script"][0])

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "br"):
            self._open.append(tag)
            self.texts.setdefault(tag, []).append("")
        if tag == "figure":
            self.figures.append({name: [] for name in ("h3", "li", "title", "desc", "output", "th", "td", "path")})
        if "figure" in self._open and tag in self.figures[-1]:
            self.figures[-1][tag].append(dict(attrs).get("d", "") if tag == "path" else "")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, "elements are closed in order"

    def handle_data(self, data: str) -> None:
        if self._open:
            self.texts[self._open[-1]][-1] += data
            if "figure" in self._open and self._open[-1] in self.figures[-1]:
                self.figures[-1][self._open[-1]][-1] += data

    def figure(self, title: str) -> dict[str, list]:
        (found,) = [it for it in self.figures if it["h3"] == [title]]
        return found

    def chart(self, title: str) -> dict:
        return self.data[[it["h3"][0] for it in self.figures].index(title)]


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


def test_charts_and_tables_have_the_numbers_of_the_event_files(run: Path, page: Page) -> None:
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    titles = [found["h3"][0] for found in page.figures]
    assert len(titles) == len(set(titles)) == len(page.data) == page.source.count("<svg ")
    seen = set()
    for title in titles:
        figure, cells = page.figure(title), iter(page.figure(title)["td"])
        series = page.chart(title)["series"]
        legend = [one["label"] for one in series]
        assert figure["li"] == legend + ["validation"] * any(one["dots"] for one in series)
        assert figure["title"] == [title] and all(label in figure["desc"][0] for label in legend)
        # The table of training, then that of validation: a row a step, a column a curve.
        for part, suffix in (("line", ""), ("dots", " validation")):
            columns = [one for one in series if one[part]]
            if all(f"{one['label']}{suffix}" in events.Tags()["scalars"] for one in columns):
                for one in columns:
                    values: dict[int, float] = {}
                    for event in events.Scalars(f"{one['label']}{suffix}"):
                        values.setdefault(event.step, event.value)  # of validation the first of a step
                    assert [step for step, _ in one[part]] == list(values)
                    assert [it for _, it in one[part]] == pytest.approx(list(values.values()), rel=1e-7)
                    seen.add(f"{one['label']}{suffix}")
            for row in zip(*(one[part] for one in columns), strict=True):
                assert [next(cells) for _ in row] == [str(value) for _, value in row]
        assert next(cells, None) is None
    shown = {tag for tag in events.Tags()["scalars"] if " vs samples" not in tag}
    assert shown - seen == {"batch-size"}, "one number all the time"


def test_the_test_split_is_told_from_validation(page: Page) -> None:
    at = {name: curve(name, 20) for name in ("lm loss", "total loss")}
    columns = [it for it in page.texts["th"] if it.startswith(("training,", "validation,", "test,"))]
    assert columns == ["training, step 20", "validation, step 20", "test, step 20"]
    rows = re.findall(
        r'<th scope="row">([^<]+)</th>(?:<td>([^<]*)</td>)(?:<td>([^<]*)</td>)(?:<td>([^<]*)</td>)', page.source
    )
    for name, value in at.items():
        (numbers,) = [cells for title, *cells in rows if title == name]
        assert numbers == [f"{value + add:.5g}" for add in (0, 1, 3)]
    assert page.chart("Cross entropy with the data")["series"][0]["dots"][-1][1] == pytest.approx(at["lm loss"] + 1)


def test_the_teachers_share_of_a_step(page: Page) -> None:
    line = page.chart("The teacher's share of a step")["series"][0]["line"]
    wanted = {
        step: sum(curve("teacher seconds", at) for at in range(step - 4, step + 1)) / 5 * 4 / (2 + step / 10)
        for step in (5, 10, 15, 20)
    }
    assert dict(line) == pytest.approx(wanted, rel=1e-5)
    assert any("on the ranks of the last of 2 pipeline stages" in text for text in page.texts["td"])
    throughput = page.chart("Throughput")["series"][0]["line"]
    assert dict(throughput) == pytest.approx({step: 16 * 4096 / (2 + step / 10) for step in wanted}, rel=1e-5)


def test_what_was_run(page: Page) -> None:
    cells = " ".join(page.texts["td"])
    assert "alpha_beta (alpha {schedule: linear, from: 0.5, to: 0.2, end: 20}, beta 0.7); kd_weight 1.0" in cells
    assert "load runs/teacher" in cells and "4 ranks, PP 2 x DP 2, 16 sequences a step, 2 a micro-batch" in cells
    assert page.texts["pre"] == [CONFIG]
    assert {"20", "1\u202f310\u202f720"} <= set(page.texts["b"])  # steps, and tokens: 20 x 16 x 4096
    (drawn,) = page.chart("alpha")["series"]
    assert len(drawn["line"]) == 20


def test_it_is_one_file_that_asks_for_nothing(page: Page) -> None:
    for tag, attributes in page.elements:
        for name in ("src", "href", "action", "data", "srcset"):
            assert attributes.get(name, "data:,") == "data:,", (tag, attributes)
    assert "@import" not in page.source and "url(" not in page.source
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg\b)", page.source)
    (policy,) = [it["content"] for tag, it in page.elements if it.get("http-equiv") == "Content-Security-Policy"]
    script = page.texts["script"][1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in policy


def test_the_same_files_give_the_same_page(run: Path, page: Page) -> None:
    assert write_report(run).read_text() == page.source  # and one of ours is replaced


def test_several_runs_are_drawn_over_each_other(tmp_path: Path, run: Path) -> None:
    plain = write_job(tmp_path / "alone", names=("lm loss",), config=None, shift=0.5)
    # The first one's color stays free where it has no such curve.
    page = report(plain, run, out=tmp_path / "both.html")
    found = page.chart("Cross entropy with the data: lm loss")["series"]
    assert [(one["label"], one["color"]) for one in found] == [("alone", 0), ("student", 1)]
    assert [(one["label"], one["color"]) for one in page.chart("What is trained")["series"]] == [("student", 1)]
    assert found[0]["line"][0][1] == pytest.approx(curve("lm loss", 1) + 0.5)
    text = " ".join(page.texts["td"])
    assert "cross entropy with the data, without a teacher" in text and "alpha_beta" in text
    assert report(tmp_path, out=tmp_path / "one.html").figures, "a folder of runs"
    with pytest.raises(ConfigError, match=r"report of 2 runs.*--out FILE"):
        write_report([plain, run])


def test_more_runs_than_colors_are_refused(tmp_path: Path) -> None:
    for index in range(9):
        write_job(tmp_path / f"{index}", range(1, 2), ("lm loss",))
    with pytest.raises(ConfigError, match=r"at most 8 runs.*got 9: 0, 1, 2.*give the directories"):
        write_report(tmp_path)


def test_what_the_files_say_is_text(tmp_path: Path) -> None:
    evil = '"><img src=x onerror=alert(1)>'
    ending = "</script><script>alert(1)</script>&amp;"
    names = ("lm loss", f"{ending} loss", evil)
    write_job(tmp_path / evil, names=names, config=f"distillation:\n  divergence: '{ending}'\n")
    page = report(tmp_path / evil, out=tmp_path / "report.html")
    assert [tag for tag, _ in page.elements].count("script") == 2
    assert not [tag for tag, attributes in page.elements if tag == "img" or "onerror" in attributes]
    assert page.texts["h1"] == [evil]
    labels = {one["label"] for it in page.data for one in it["series"]}
    assert labels == {*names, "iteration-time", "tokens per second"}
    assert ending in page.texts["td"][0] and ending in page.texts["pre"][0]


def test_nothing_of_others_is_overwritten(tmp_path: Path, run: Path) -> None:
    out = tmp_path / "report.html"
    out.write_text("<html>precious</html>")
    with pytest.raises(ConfigError, match=r"expected an earlier report.*give another --out"):
        write_report(run, out)
    assert out.read_text() == "<html>precious</html>"
    with pytest.raises(ConfigError, match="expected an earlier report"):
        write_report(run, tmp_path)
    with pytest.raises(ConfigError, match="existing folder"):
        write_report(run, tmp_path / "nowhere" / "report.html")


def test_what_is_no_run_is_refused(tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="expected the directory of a run, got nothing"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"expected TensorBoard's event files, found none.*tensorboard-dir"):
        write_report(tmp_path)
    SummaryWriter(str(tmp_path / "empty")).close()
    with pytest.raises(ConfigError, match="expected the numbers of a run, its event files have none"):
        write_report(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(HostError, match=r"expected tensorboard.*abkd-megatron\[plots\]"):
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
        assert file.name in note and f"of {len(damaged)} is left out" in note
        line = page.chart("Cross entropy with the data")["series"][0]["line"]
        assert 1 < len(line) < 20 and line[0][1] == pytest.approx(curve("lm loss", 1))
    file.unlink()
    file.mkdir()  # no file at all
    with pytest.raises(ConfigError, match=r"have none; events.out.*cannot be read.*left out"):
        write_report(tmp_path / "run")


def test_a_step_that_was_trained_twice_is_the_later_jobs(tmp_path: Path) -> None:
    first = write_job(tmp_path / "run", range(1, 18), ends=False)
    write_job(first, range(11, 16), shift=2.0, config=CONFIG.replace("0.7", "0.3"))
    (run,) = find_runs([first])
    assert list(run.training["lm loss"]) == list(range(1, 16))
    assert list(run.validation[""]["lm loss"]) == [5, 10, 15]
    for step, value in run.training["lm loss"].items():
        assert value == pytest.approx(curve("lm loss", step) + 2.0 * (step > 10)), step
    assert run.test[""]["lm loss"] == (15, pytest.approx(curve("lm loss", 15) + 5.0))
    assert run.notes == ["steps 11 to 17 were trained before and again by a later job, whose numbers are shown"]
    assert run.samples == 15 * 16 and run.config is not None and "beta: 0.3" in run.config


def test_what_is_no_number_is_a_gap_with_a_name(tmp_path: Path) -> None:
    values = {step: math.nan if 4 <= step <= 6 else math.inf if step == 9 else float(step) for step in range(1, 12)}
    page = report(write_job(tmp_path / "run", others={"grad-norm": values}), out=tmp_path / "report.html")
    (line,) = [it for it in page.figure("Gradient norm")["path"] if it.count("M") > 1]
    assert line.count("M") == 3 and line.count("L") == 2 + 1 + 1
    assert "grad-norm is NaN at steps 4 to 6: a gap in its line" in page.texts["li"]
    assert "grad-norm is infinite at step 9: a gap in its line" in page.texts["li"]
    assert page.figure("Gradient norm")["td"][3:6] == ["NaN"] * 3


def test_a_run_without_a_teacher_and_without_times(tmp_path: Path) -> None:
    writer = SummaryWriter(str(tmp_path))
    for step in range(1, 4):
        writer.add_scalar("lm loss", 3.0 / step, step)
    writer.close()
    page = Page(write_report(tmp_path))
    assert [it["h3"] for it in page.figures] == [["Cross entropy with the data"]]
    assert any("give Megatron --log-timers-to-tensorboard" in it for it in page.texts["li"])
    assert "cross entropy with the data, without a teacher" in page.texts["td"]


def test_validation_sets_have_curves_of_their_own(tmp_path: Path) -> None:
    sets = {f"lm loss validation-{name}": {5: value} for name, value in (("code", 1.5), ("prose", 2.5))}
    writer = SummaryWriter(str(tmp_path))
    for name, values in {"lm loss": {1: 4.0, 5: 2.0}, **sets, "lm loss validation-code ppl": {5: 9.0}}.items():
        for step, value in values.items():
            writer.add_scalar(name, value, step)
    writer.close()
    found = Page(write_report(tmp_path)).chart("Cross entropy with the data")["series"]
    assert [(one["label"], one["line"], one["dots"]) for one in found] == [
        ("lm loss, validation code", [[1, 4.0], [5, 2.0]], [[5, 1.5]]),
        ("lm loss, validation prose", [], [[5, 2.5]]),
    ]


def test_the_arguments_of_a_script_of_ones_own_are_shown(tmp_path: Path) -> None:
    writer = SummaryWriter(str(tmp_path / "run"))
    for name, value in {**ARGUMENTS, "kd_teacher_load": "runs/<teacher>", "kd_alpha": "0.3"}.items():
        writer.add_text(name, value)
    for name in TRAINED:
        writer.add_scalar(name, 1.0, 1)
    writer.close()
    page = report(tmp_path / "run", out=tmp_path / "report.html")
    assert "--kd-teacher-load runs/<teacher> --kd-alpha 0.3" in page.texts["td"]
    assert {"seq_length", "eval_interval"} <= set(page.texts["th"]) and "Megatron's arguments" in page.texts["summary"]


def test_calibration_is_one_number_of_its_gaps(tmp_path: Path) -> None:
    gaps = {f"{gap_name(index)} validation": {5: (-1) ** index * 0.01 * index} for index in range(NUM_BINS)}
    page = report(write_job(tmp_path / "run", others=gaps), out=tmp_path / "report.html")
    wanted = sum(0.01 * index for index in range(NUM_BINS))
    assert page.chart("Expected calibration error")["series"][0]["dots"] == [[5, pytest.approx(wanted)]]
    assert "calibration gap" not in page.source


def test_a_long_curve_keeps_its_extremes() -> None:
    values = {step: math.sin(step / 50) for step in range(1, 30_001)}
    values |= {777: 9.0, 20_000: -9.0, 25_000: math.nan}
    points = chart.thinned(values)
    assert len(points) <= chart.MOST_POINTS + 10
    assert {(777, 9.0), (20_000, -9.0), (25_000, None), (1, values[1]), (30_000, values[30_000])} <= set(points)
    assert [step for step, _ in points] == sorted(step for step, _ in points)
    assert chart.thinned({1: 1.0, 2: 5.0, 3: 2.0}) == [(1, 1.0), (2, 5.0), (3, 2.0)]


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        *((0.123456, "0.12346"), (4.0, "4"), (16_384, "16\u202f384"), (1234567.8, "1\u202f234\u202f568")),
        *((0.00001234, "1.234e-5"), (math.nan, "NaN"), (-math.inf, "infinite")),
    ],
)
def test_numbers_are_short(value: float, wanted: str) -> None:
    assert chart.number(value) == wanted


@pytest.mark.parametrize(
    ("low", "high", "wanted"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (3.1, 7.9, [4, 5, 6, 7]), (-1, 250, [0, 50, 100, 150, 200, 250])],
)
def test_ticks_are_round(low: float, high: float, wanted: list[float]) -> None:
    assert chart.ticks(low, high) == pytest.approx(wanted)


def test_a_curve_over_a_decade_is_over_a_logarithmic_axis(tmp_path: Path) -> None:
    others = {"grad-norm": {1: 100.0, 2: 10.0, 3: 1.0}}
    page = report(write_job(tmp_path / "run", others=others), out=tmp_path / "report.html")
    assert page.chart("Gradient norm")["log"] and not page.chart("What is trained")["log"]
    (path,) = [it for it in page.figure("Gradient norm")["path"] if "L" in it]
    first, second, third = [float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", path)]
    assert second - first == pytest.approx(third - second, abs=0.2)


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

# What a hand would do; it is put into a copy of the page, which then has to allow scripts.
ACTIONS = """<script>
window.onerror = (message) => document.body.setAttribute("data-error", message);
const results = [...document.querySelectorAll("figure")].map((figure) => {
  const [svg, output] = [figure.querySelector("svg"), figure.querySelector("output")];
  const [said, area] = [[output.textContent], svg.getBoundingClientRect()];
  svg.dispatchEvent(new KeyboardEvent("keydown", { key: "Home" }));
  said.push(output.textContent);
  svg.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight" }));
  said.push(output.textContent, svg.querySelectorAll(".pointer circle").length);
  svg.dispatchEvent(new PointerEvent("pointermove", { clientX: area.right, clientY: area.top + 50 }));
  said.push(output.textContent);
  svg.dispatchEvent(new PointerEvent("pointerleave"));
  said.push(output.textContent);
  return said;
});
const root = document.documentElement;
document.body.textContent = JSON.stringify({ results, overflow: root.scrollWidth - root.clientWidth });
</script></body>"""


def browse(page: Path, profile: Path) -> subprocess.CompletedProcess[str]:
    assert CHROMIUM is not None
    words = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}", "--window-size=500,900"]
    words += ["--enable-logging=stderr", "--dump-dom", page.as_uri()]
    return subprocess.run([CHROMIUM, *words], capture_output=True, text=True, timeout=120, check=True)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH")
def test_a_browser_shows_what_is_under_the_pointer(tmp_path: Path, page: Page) -> None:
    plain, tried = tmp_path / "plain.html", tmp_path / "tried.html"
    plain.write_text(page.source)
    ended = browse(plain, tmp_path / "profile")
    assert "CONSOLE" not in ended.stderr, "the page's own policy lets its own script run"
    open_page = re.sub(r"<meta http-equiv[^>]*>", "", page.source)
    tried.write_text(open_page.replace("</body>", ACTIONS))
    dumped = browse(tried, tmp_path / "profile")
    assert "CONSOLE" not in dumped.stderr and "data-error" not in dumped.stdout
    (found,) = re.findall(r"<body>(\{.*\})\s*</body>", dumped.stdout, re.DOTALL)
    seen = json.loads(found)
    assert seen["overflow"] == 0
    assert len(seen["results"]) == len(page.figures)
    titles = [it["h3"][0] for it in page.figures]
    at_rest, home, second, marks, at_end, left = seen["results"][titles.index("Cross entropy with the data")]
    lm, teacher = ({step: f"{curve(name, step):.5g}" for step in (1, 2, 20)} for name in TRAINED[:2])
    assert home == f"step 1: lm loss {lm[1]}; teacher lm loss {teacher[1]}"
    assert second == f"step 2: lm loss {lm[2]}; teacher lm loss {teacher[2]}" and marks == 2
    assert at_end == at_rest == left == page.figure("Cross entropy with the data")["output"][0]
    throughput = seen["results"][titles.index("Throughput")]
    small = seen["results"][titles.index("Learning rate")]
    assert small[4] == small[0] == "step 20: learning-rate 4e-5"
    assert throughput[4] == throughput[0] == "step 20: tokens per second 16\u202f384"
    assert at_end.startswith(f"step 20: lm loss {lm[20]}, validation ")
