"""Comparing losses, around the jobs: what is planned, what is refused, what the numbers come to."""

import json
import statistics
from dataclasses import replace
from functools import partial

import pytest

from abkd_megatron.config.compare import compare_problems
from abkd_megatron.config.load import load_config
from abkd_megatron.config.presets import PRESETS
from abkd_megatron.errors import ConfigError, HostError
from abkd_megatron.tools import compare, comparison, env, gradient_variance
from abkd_megatron.tools.events import Run
from abkd_megatron.tools.gradient_variance import Measurement
from abkd_megatron.vocab_parallel.diagnostics import NUM_BINS, gap_name

YAML = """\
device: cpu
teacher: {load: runs/teacher}
distillation: {lm_weight: 0, alpha: 0.4}
compare:
  out: OUT
  seeds: [3, 5]
  losses:
    CE only: {kd_weight: 0, lm_weight: 1}
    steep: {losses: [{name: forward_kl, weight: 0.5}], temperature: {schedule: linear, from: 2, to: 1, end: 9}}
    ToDi: {divergence: todi, megatron.lr: 0.1}
"""


@pytest.fixture
def load(tmp_path, monkeypatch):
    import argparse

    parser = argparse.ArgumentParser()
    for name, kind in (("seed", int), ("save", str), ("lr", float), ("tensorboard-dir", str)):
        parser.add_argument(f"--{name}", type=kind)
    options = {name.removeprefix("--"): action for name, action in parser._option_string_actions.items()}
    path = tmp_path / "compare.yaml"
    path.write_text(YAML.replace("OUT", str(tmp_path / "out")))
    return partial(load_config, path, megatron_options=options)


def test_every_loss_at_every_seed_with_a_configuration_of_its_own(load, tmp_path):
    config = load([])
    config.check("compare")
    planned = compare.plan(config, load)
    assert [(run.loss, run.seed) for run in planned] == [(n, s) for s in (3, 5) for n in ("CE only", "steep", "ToDi")]
    assert planned[5].directory == tmp_path / "out/todi/seed-5"
    runs = {}
    for run in planned[3:]:
        run.prepare()
        options = load.keywords["megatron_options"]
        runs[run.loss] = load_config(run.directory / "config.yaml", [], options)
        runs[run.loss].check("distill")
        assert runs[run.loss].megatron["seed"] == 5
        assert runs[run.loss].megatron["save"] == str(run.directory / "checkpoints")
        assert runs[run.loss].distillation.diagnostics and runs[run.loss].data.seed == compare.DATA_SEED
    of = {name: run.distillation for name, run in runs.items()}
    assert (of["CE only"].kd_weight, of["CE only"].lm_weight, of["CE only"].alpha) == (0.0, 1.0, 0.4)
    assert of["steep"].losses == [{"name": "forward_kl", "weight": 0.5}]
    assert of["steep"].temperature.points == ((0, 2.0), (9, 1.0))
    assert (of["ToDi"].divergence, of["ToDi"].lm_weight) == ("todi", 0.0)
    assert (runs["ToDi"].megatron["lr"], "lr" in runs["steep"].megatron) == (0.1, False)


def test_a_preset_of_a_loss_replaces_what_the_file_has(load):
    override = "compare.losses={annealed: {preset: annealed, kd_weight: 2}, late: {kd_weight: {schedule: linear, "
    override += "from: 0, to: 1, start: 0.9, end: 1.0, by: fraction}, lm_weight: 1}}"
    planned = compare.plan(load([override]), partial(_with, load, override))
    for run in planned:
        run.prepare()
    options = load.keywords["megatron_options"]
    of = {run.loss: load_config(run.directory / "config.yaml", [], options).distillation for run in planned}
    assert (of["annealed"].preset, of["annealed"].kd_weight, of["annealed"].lm_weight) == ("annealed", 2.0, 0.0)
    assert of["annealed"].alpha == PRESETS["annealed"]["alpha"] and of["annealed"].beta == PRESETS["annealed"]["beta"]
    assert (of["late"].preset, of["late"].alpha, of["late"].lm_weight) == ("none", 0.4, 1.0)
    assert (of["late"].kd_weight.by, of["late"].kd_weight.points) == ("fraction", ((0.9, 0.0), (1.0, 1.0)))


def test_the_shown_configuration_is_the_same(load, tmp_path):
    from abkd_megatron.config.load import render

    config = load([])
    path = tmp_path / "shown.yaml"
    path.write_text(render(config))
    again = load_config(path, [], load.keywords["megatron_options"])
    shown, planned = (compare.plan(it, load) for it in (again, config))
    assert again.compare.losses.keys() == config.compare.losses.keys()
    assert [run.config for run in shown] == [run.config for run in planned]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("compare.seeds=[1, 1]", "compare.seeds: expected each seed once"),
        ("compare.seeds=[]", "compare.seeds: expected at least one"),
        ("compare.at_once=0", "compare.at_once: expected 1 or more"),
        ("compare.new_tokens=0", "compare.new_tokens: expected 1 or more"),
        ("compare.gradient_batches=1", "compare.gradient_batches: expected 0, or 2 or more"),
        ("compare.gradient_batches=4", "compare.losses: CE only: compare.gradient_batches: .*global-batch-size"),
        ("compare.losses=todi", "expected a mapping of names"),
        ("compare.losses={x: todi}", "expected x to be a mapping"),
        ("compare.losses={a b: {}, A-b: {}}", "'A-b'.* a-b; rename"),
        ("compare.losses={x: {divergence: todo}}", "compare.losses: x: .*did you mean 'todi'"),
        ("compare.losses={x: {kd_weight: 0}}", "compare.losses: x: .*kd_weight"),
        ("compare.losses={x: {teacher.load: null}}", "compare.losses: x: teacher.load: expected the path"),
        ("compare.out=", "compare.out"),
    ],
)
def test_refused_before_anything_is_run(load, override, message):
    with pytest.raises(ConfigError, match=message):
        config = load([override])
        config.check("compare")
        compare.plan(config, partial(_with, load, override))


def _with(load, override, settings):
    return load([override, *settings])


def test_what_another_configuration_left_is_kept(load, tmp_path):
    for run in compare.plan(load([]), load):
        run.prepare()
        run.prepare()  # its own is found again
    override = "distillation.chunk_tokens=64"
    changed = compare.plan(load([override]), partial(_with, load, override))
    with pytest.raises(ConfigError, match=r"chunk_tokens: 64; chunk_tokens: null.*comp"):
        changed[0].prepare()
    assert "chunk_tokens: null" in (tmp_path / "out/ce-only/seed-3/config.yaml").read_text()


def result(loss: str, seed: int, ce: float) -> dict:
    test = {"lm loss": ce, "kl to teacher": 0.1, "reverse kl to teacher": 0.2, "top-1 agreement": 0.5}
    test |= {"calibration error": 0.01, "student entropy": 4.0, "teacher lm loss": 3.0, "teacher entropy": 3.5}
    return {"loss": loss, "seed": seed, "test": test}


def test_spread_within_seeds_leaves_out_what_they_have_in_common():
    found = {"A": (4.0, 5.0, 6.0), "B": (4.1, 5.3, 6.2), "C": (4.2, 5.1, 6.1)}
    results = [result(loss, seed, ce) for loss, values in found.items() for seed, ce in enumerate(values)]
    summary = comparison.summarize(results, list(found))
    of = {loss: summary[loss]["cross entropy"] for loss in found}
    assert of["B"]["mean"] == pytest.approx(5.2)
    assert of["B"]["std"] == pytest.approx(statistics.stdev(found["B"]))
    residues = [4.1 - 4.1, 5.3 - 15.4 / 3, 6.2 - 6.1]
    assert of["B"]["std within seeds"] == pytest.approx(statistics.stdev(residues) * (3 / 2) ** 0.5)
    assert summary["teacher"]["cross entropy"]["mean"] == 3.0
    text = comparison.table(summary)
    assert f"| B | 5.200 ± {of['B']['std within seeds']:.3f} | 0.200 [" in text
    assert "| teacher | 3.000 |" in text and "3 seeds ± standard deviation after subtracting" in text


def test_an_unfinished_comparison_is_told_as_such():
    results = [result("A", 0, 4.0), result("A", 1, 5.0), result("B", 0, 4.5)]
    summary = comparison.summarize(results, ["A", "B", "C"])
    assert summary["A"]["cross entropy"]["std within seeds"] is None and "C" not in summary
    text = comparison.table(summary)
    assert "| A | 4.500 ± 0.707 |  |" in text and "| B | 4.500 | 0.500 |" in text
    assert "1 to 2 seeds ± standard deviation over the seeds" in text


def test_a_teacher_with_another_tokenizer_has_no_row_of_its_own():
    chunks = {"loss": "chunks", "seed": 0, "test": {"lm loss": 4.2, "teacher lm loss": 2.0, "chunk log-ratio": 0.7}}
    same = result("same tokenizer", 0, 4.0)
    for results, wanted in (([chunks], None), ([chunks, same], 3.0), ([same, chunks], 3.0)):
        summary = comparison.summarize(results, [of["loss"] for of in results])
        assert ("teacher" in summary) == (wanted is not None)
        if wanted is not None:
            assert summary["teacher"]["cross entropy"]["mean"] == wanted
        assert ("chunk log-ratio" in summary["chunks"]) == (len(results) == 1), "columns are what all have"
        assert "| chunks | 4.200 |" in comparison.table(summary)


def test_students_that_passed_their_teacher_are_named():
    results = [result("A", 0, 2.9), result("B", 0, 3.1), result("A", 1, 3.0), result("B", 1, 3.0)]
    line = comparison.outgrown(comparison.summarize(results, ["A", "B"]))
    assert "3.000: A." in line and ", B" not in line
    assert comparison.outgrown(comparison.summarize(results[1:2], ["B"])) == ""


def test_differences_are_paired_by_seed():
    found = {"A": (4.0, 5.0, 6.0), "B": (4.1, 5.3, 6.2), "C": (4.0, 5.1, 6.3)}
    results = [result(loss, seed, ce) for loss, values in found.items() for seed, ce in enumerate(values)]
    of = comparison.differences(results)["B"]["A"]
    half = 4.3027 * statistics.stdev([0.1, 0.3, 0.2]) / 3**0.5
    assert [of["mean"], of["low"], of["high"], of["seeds"]] == pytest.approx([0.2, 0.2 - half, 0.2 + half, 3])
    assert comparison.differences(results)["A"]["B"]["low"] == pytest.approx(-0.2 - half)
    line = comparison.recommend(results)
    assert line.startswith("Recommendation: none. A has") and "B" in line.rpartition("interval")[2]
    assert comparison.differences([*results, result("D", 9, 4.0)])["D"] == {}, "no seed in common"

    won = [
        result(loss, seed, ce) for loss, values in found.items() if loss != "C" for seed, ce in enumerate(values * 3)
    ]
    assert comparison.recommend(won).startswith(
        "Recommendation: A. Its cross entropy is 0.200 [0.133, 0.267] nats below B"
    )
    for few in (results[:1], [*results[:3], result("B", 0, 4.1)]):
        assert comparison.recommend(few).startswith("Recommendation: none.")


@pytest.mark.parametrize(
    ("freedom", "wanted"), [(1, 12.7062), (4, 2.7764), (10, 2.2281), (11, 2.2010), (20, 2.0860), (60, 2.0003)]
)
def test_points_of_students_t(freedom, wanted):
    assert comparison.t_quantile(freedom) == pytest.approx(wanted, abs=2e-4)


def test_results_of_event_files():
    run = Run("A", paces=[0.5, 0.4, 9.0], arguments={"global_batch_size": "8", "seq_length": "32"})
    run.splits |= {"validation": {"lm loss": {10: 5.0, 20: 4.5}}, "test": {"lm loss": {20: 4.4}}}
    for split, steps in (("test", [20]), ("validation", [10, 20])):
        run.splits[split] |= {gap_name(index): dict.fromkeys(steps, 0.01) for index in range(NUM_BINS)}
    found = comparison.result_of(run)
    assert found["test"]["lm loss"] == 4.4 and found["validation"]["10"]["lm loss"] == 5.0
    assert (found["seconds per step"], found["tokens per step"]) == (0.5, 256)
    assert found["test"]["calibration error"] == pytest.approx(0.01 * NUM_BINS)
    assert not any(gap_name(0) in report for report in (found["test"], found["validation"]["20"]))
    run.splits["test"] = {}
    with pytest.raises(HostError, match="test split"):
        comparison.result_of(run)


def test_a_run_goes_on_from_its_checkpoint(tmp_path):
    run = compare.Run("A, seed 1", tmp_path, "device: cpu\n", loss="A", seed=1, overrides=())
    assert run.command("torchrun --nproc-per-node 2")[:4] == ["torchrun", "--nproc-per-node", "2", "-m"]
    assert not any("megatron.load" in word for word in run.command(None))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/latest_checkpointed_iteration.txt").write_text("5")
    assert f"megatron.load={tmp_path / 'checkpoints'}" in run.command(None)


def test_the_picture_is_drawn_of_whatever_is_done(tmp_path, monkeypatch):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    figures = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    names = [name for name, _ in comparison._CURVES if name.split()[0] not in ("bucketed", "sampled", "chunk")]
    results = [result("A", 0, 4.0), result("A", 1, 5.0), result("B", 0, 4.5)]
    for one in results:
        one |= {"tokens per step": 64, "seconds per step": 0.5}
        one["validation"] = {str(step): dict.fromkeys(names, one["seed"] + step) for step in (10, 20)}
    comparison.draw(results, ["A", "B", "C"], tmp_path / "picture.png")
    (figure,) = figures
    height, width, _ = pyplot.imread(tmp_path / "picture.png").shape
    assert [width, height] == [round(inches * 100) for inches in figure.get_size_inches()]
    assert [axis.get_title() for axis in figure.axes[:2]] == ["cross entropy, test", "KL(teacher, student), test"]
    dots = [(list(line.get_xdata()), list(line.get_ydata())) for line in figure.axes[0].lines]
    assert dots == [([4.0, 5.0], [0, 0]), ([4.5], [0]), ([4.5], [1]), ([4.5], [1])]  # seeds, then their mean
    units = [("step", 1)] * 6 + [("tokens", 64), ("seconds", 0.5)]
    for axis, name, (unit, scale) in zip(figure.axes[8:], [*names, names[0], names[0]], units, strict=True):
        curves = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axis.lines}
        steps = [10 * scale, 20 * scale]
        assert curves == {"A": (steps, [10.5, 20.5]), "B": (steps, [10.0, 20.0])}, name
        assert axis.get_xlabel() == unit
    json.dumps(comparison.summarize(results, ["A", "B"]))


def test_a_package_is_missed_after_the_configuration_is_checked(load, tmp_path, monkeypatch):
    monkeypatch.setattr(env.importlib.util, "find_spec", lambda name: None)
    for override, error in (
        ("compare.losses={x: {divergence: todo}}", ConfigError),
        ("compare.launch=no-such-launcher", ConfigError),
        ("compare.at_once=1", HostError),
    ):
        with pytest.raises(error):
            compare.compare(load([override]), partial(_with, load, override))
    assert not (tmp_path / "out").exists()


def test_variances_of_gradients(tmp_path):
    jobs, norms = [], {"start": ((3.0, 5.0), 4.0), "end": ((1.0, 1.0), 1.0)}
    for seed in (1, 2):
        for point, (of_batches, of_mean) in norms.items():
            for steps, found in ((2, of_batches), (1, (of_mean,))):
                here = tmp_path / f"{seed}-{point}-{steps}"
                job = Measurement("A", here, "", of=("A", seed), point=point, gradient_of="text", steps=steps)
                jobs.append(job)
                if (seed, point) != (2, "end"):
                    here.mkdir()
                    (here / "result.json").write_text(json.dumps({"norms": found}))
    results = gradient_variance.results(jobs)
    # Gradients of 3 and 5 in one direction: a mean of 4, and 1 + 1 around it.
    assert results["A", 1]["start"]["text"] == {"variance": 2.0, "squared norm": 16.0, "relative": 0.125}
    assert results["A", 1]["end"]["text"]["relative"] == 0.0 and "end" not in results["A", 2]
    runs = [{"loss": "A", "seed": seed, "gradient": of} for (_, seed), of in results.items()]
    text = gradient_variance.table([*runs, {"loss": "B", "seed": 1}], 2)
    assert "| A |  | 0.125 ± 0 |  | 0 |" in text and "| B |" not in text
    assert gradient_variance.table([{"loss": "B", "seed": 1}], 2) == ""


@pytest.mark.parametrize("content", [None, "mine", "[1]", '{"runs": []}'])
def test_what_no_comparison_has_written_is_not_written_over(tmp_path, content):
    compare.check_out(tmp_path)
    (tmp_path / "table.md").write_text("mine")
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    with pytest.raises(ConfigError, match=r"table\.md"):
        compare.check_out(tmp_path)
    (tmp_path / "results.json").write_text(json.dumps({"summary": {}, "runs": []}))
    compare.check_out(tmp_path)


def test_seeds_that_would_be_the_same_run(load):
    for seeds, more, problems in (
        ([1, 2], {"sft": True}, []),
        ([1], {"sft": True, "load": "student"}, []),
        ([1, 2], {"load": "student"}, []),
        ([1, 2], {"sft": True, "load": "student"}, ["compare.seeds"]),
    ):
        config = load([f"compare.seeds={seeds}"])
        chats = replace(config, megatron={**config.megatron, **more})
        assert [key for key, _ in compare_problems(chats, "compare")] == problems
        assert not [*compare_problems(chats, "distill")]


def test_no_continuations_of_packed_documents(load):
    for prompts, problems in ((0, []), (8, ["compare.rouge_prompts"])):
        config = load([f"compare.rouge_prompts={prompts}"])
        packed = replace(config, megatron={**config.megatron, "dataloader-inter-document-masking": True})
        assert [key for key, _ in compare_problems(config, "distill")] == []
        assert [key for key, _ in compare_problems(packed, "distill")] == problems
