"""`make gpu` does what it says, as far as a machine without a GPU can show.

Proves: the stages are sane; one that fails, crashes, hangs or leaves processes behind costs itself alone; the time
budget is kept; table and JSON say what happened; without a GPU it says what it would do and ends with 0. The stages
themselves are run on CPU ranks, those that need no Megatron here, the others in tests/host.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
import textwrap
import time
from argparse import Namespace
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WITHOUT_GPU = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def load(name):
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = sys.modules[name] = module  # also by its own name: the stages import gpu
    spec.loader.exec_module(module)
    return module


gpu, gpu_stages = load("gpu"), load("gpu_stages")
TWO = gpu.Machine("cpu", ("a", "b"))

# What stands in for gpu_stages.py: its first word says how it ends.
STAND_IN = """\
import json, os, signal, subprocess, sys, time
what, result = sys.argv[1], sys.argv[sys.argv.index("--result") + 1]
def write(problems=(), skipped=""):
    said = {"summary": "some numbers", "numbers": {"x": 1}, "problems": list(problems), "skipped": skipped}
    open(result, "w").write(json.dumps(said))
print("about to", what, flush=True)
if what == "pass": write()
elif what == "skip": write(skipped="needs what is not here")
elif what == "check": write(["off by 1", "off by 2"]); sys.exit(1)
elif what == "raise": raise RuntimeError("as asked")
elif what == "exit": sys.exit(7)
elif what == "crash": os.kill(os.getpid(), signal.SIGSEGV)
elif what == "silent": pass
elif what == "hang":
    # As torchrun's ranks: a process in a session of its own, deaf to SIGTERM.
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    child = subprocess.Popen([sys.executable, "-c", deaf], start_new_session=True)
    print("child", child.pid, flush=True)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(600)
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    path = tmp_path / "stand_in.py"
    path.write_text(STAND_IN)
    monkeypatch.setattr(gpu, "STAGES", path)
    return tmp_path


def stage(name, limit=20.0, **more):
    return gpu.Stage(name, f"shows {name}", limit, (name,), **more)


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# ---- the list


def test_the_stages_are_sane():
    stages = gpu.stages()
    names = [one.name for one in stages]
    assert len(set(names)) == len(names)
    for number, one in enumerate(stages):
        assert one.shows and one.words and 0 < one.limit <= 300
        assert one.words[0] in gpu_stages.FUNCTIONS
        assert set(one.after) <= set(names[:number]), "what a stage needs comes before it"
        assert one.ranks <= one.gpus
        assert all(next(s for s in stages if s.name == before).gpus <= one.gpus for before in one.after)
    files = {re.sub(r"\W+", "-", name) for name in names}
    assert len(files) == len(names), "logs and results do not overwrite each other"


def test_the_stages_are_all_that_is_asked_for():
    stages = {one.name: one for one in gpu.stages()}
    assert {"versions", "tests", "data", "loss", "head", "step", "train local", "train te"} <= set(stages)
    from abkd_megatron import kernels

    assert {f"kernel {name}" for name in kernels.NAMES} <= set(stages)
    words = [" ".join(one.words) for one in stages.values() if one.gpus >= 2]
    for wanted in (
        "megatron.tensor-model-parallel-size=2",
        "megatron.pipeline-model-parallel-size=2",
        "overlap-param-gather=true",
        "teacher.tensor-model-parallel-size=2",
        "teacher.pipeline-model-parallel-size=2",
    ):
        assert any(wanted in one for one in words), wanted
    assert gpu_stages.VOCABULARIES["full"] == (128256, 151936)


def test_the_settings_of_every_stage_are_megatrons():
    pytest.importorskip("megatron.training")
    from abkd_megatron.config.load import load_config
    from abkd_megatron.config.megatron_args import megatron_options

    options = megatron_options()
    place = gpu_stages.Place("cuda", "full", ROOT)
    for one in gpu.stages():
        if one.words[0] != "train":
            continue
        given = [word for word in one.words[1:] if "=" in word]
        spec = one.words[one.words.index("--spec") + 1]
        settings = gpu_stages.of_megatron(
            gpu_stages.SHAPE, gpu_stages.TRAINING["full"], gpu_stages.spec_settings(spec, "cuda")
        )
        words = [f"{key}={gpu_stages.text(value)}" for key, value in settings.items()]
        config = load_config(None, [*words, *given], options, lambda device: {})
        assert config.device == place.device
        assert config.megatron["transformer-impl"] == ("local" if spec == "local" else "transformer_engine")


# ---- running them


def test_a_stage_costs_only_itself(stand_in):
    stages = [stage("raise"), stage("exit"), stage("crash"), stage("silent"), stage("check"), stage("hang", 3.0)]
    stages += [stage("skip"), stage("pass"), gpu.Stage("later", "uses another's", 20, ("pass",), after=("raise",))]
    seen = []
    outcomes = gpu.run_all(stages, TWO, 120, stand_in, "tiny", lambda so_far: seen.append(len(so_far)))
    by = {one.name: one for one in outcomes}
    assert [one.name for one in outcomes] == [one.name for one in stages] and seen == list(range(1, 10))
    assert {name: one.result for name, one in by.items()} == {
        **dict.fromkeys(("raise", "exit", "crash", "silent", "check"), "failed"),
        **{"hang": "timed out", "skip": "skipped", "pass": "passed", "later": "skipped"},
    }
    assert "exit code 1" in by["raise"].why and by["raise"].output[-1] == "RuntimeError: as asked"
    assert by["exit"].why == "exit code 7" and "SIGSEGV" in by["crash"].why
    assert by["silent"].why == "ended without a result"
    assert by["check"].why == "off by 1; off by 2" and by["check"].numbers == {"x": 1}
    assert by["hang"].why == "killed after 3 s" and 3 <= by["hang"].seconds < 10
    assert by["skip"].why == "needs what is not here" and by["later"].why == "needs raise, which failed"
    assert by["pass"].summary == "some numbers" and by["pass"].output == []
    assert gpu.exit_status(outcomes) == 1 and gpu.exit_status([by["pass"], by["skip"]]) == 0


def test_a_stage_that_hangs_leaves_no_process_behind(stand_in):
    outcome = gpu.run_stage(stage("hang"), 3.0, stand_in, "cpu", "tiny")
    (pid,) = (int(line.split()[1]) for line in outcome.output if line.startswith("child "))
    deadline = time.monotonic() + 10
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(pid)


def test_an_old_result_is_not_taken_for_a_new_one(stand_in):
    assert gpu.run_stage(gpu.Stage("one", "", 20, ("pass",)), 20, stand_in, "cpu", "tiny").result == "passed"
    again = gpu.run_stage(gpu.Stage("one", "", 20, ("silent",)), 20, stand_in, "cpu", "tiny")
    assert again.result == "failed" and again.summary == ""


def test_the_budget_is_kept(stand_in, monkeypatch):
    monkeypatch.setattr(gpu, "LEAST_SECONDS", 1.5)
    start = time.monotonic()
    outcomes = gpu.run_all([stage("hang", 60.0), stage("pass")], TWO, 4.0, stand_in, "tiny")
    assert time.monotonic() - start < 10
    assert [one.result for one in outcomes] == ["timed out", "skipped"]
    assert outcomes[1].why.startswith("out of time: 0 of 4 s")
    # It could have run, so the run is not whole.
    assert gpu.exit_status(outcomes[1:]) == 1


def test_what_this_machine_cannot_run_is_skipped(stand_in):
    stages = [
        gpu.Stage("wide", "", 20, ("pass",), gpus=4),
        gpu.Stage("absent", "", 20, ("pass",), modules=("json", "no_such_module")),
        gpu.Stage("within", "", 20, ("pass",), modules=("no_such_module.part",)),
        gpu.Stage("then", "", 20, ("pass",), after=("absent",)),
    ]
    outcomes = gpu.run_all(stages, TWO, 60, stand_in, "tiny")
    assert {one.result for one in outcomes} == {"skipped"} and gpu.exit_status(outcomes) == 0
    assert [one.why for one in outcomes] == [
        "needs 4 GPUs, found 2",
        "needs no_such_module, not installed",
        "needs no_such_module.part, not installed",
        "needs absent, which was skipped",
    ]


def test_only_brings_what_it_needs():
    assert [one.name for one in gpu.choose(["train TP 2"])] == ["data", "train local", "train TP 2"]
    assert len(gpu.choose(None)) == len(gpu.stages())
    with pytest.raises(ValueError, match=r"'nothing'.*versions"):
        gpu.choose(["nothing"])


# ---- what is shown and written


def test_table_and_json_say_what_happened(stand_in, monkeypatch, capsys):
    stages = [stage("pass"), stage("check"), gpu.Stage("wide", "", 20, ("pass",), gpus=8)]
    monkeypatch.setattr(gpu, "stages", lambda: stages)
    out = stand_in / "results" / "gpu.json"
    assert gpu.main(["--device", "cpu", "--size", "tiny", "--out", str(out)]) == 1
    report = json.loads(out.read_text())
    assert report["complete"] and report["device"] == "cpu" and report["versions"]["python"]
    assert [one["result"] for one in report["stages"]] == ["passed", "failed", "skipped"]
    assert report["stages"][1]["output"] == ["about to check"]
    assert list(out.parent.iterdir()) == [out]
    shown = capsys.readouterr().out
    for line in (r"pass +passed +\d+ s +some numbers", r"check +failed .* off by 1; off by 2", r"wide +skipped +needs"):
        assert re.search(line, shown), shown
    assert "about to check" in shown and "about to pass" not in shown


def test_an_interrupted_run_leaves_what_it_has(stand_in, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu, "stages", lambda: [stage("pass"), stage("check")])
    ran = gpu.run_stage
    monkeypatch.setattr(gpu, "run_stage", lambda one, *rest: interrupted() if one.name == "check" else ran(one, *rest))
    out = stand_in / "gpu.json"
    with pytest.raises(KeyboardInterrupt):
        gpu.main(["--device", "cpu", "--out", str(out)])
    report = json.loads(out.read_text())
    assert [one["name"] for one in report["stages"]] == ["pass"] and not report["complete"]


def run(*words):
    command = [sys.executable, "benchmarks/gpu.py", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=WITHOUT_GPU)


def test_without_a_gpu_it_says_what_it_would_do(tmp_path):
    before = sorted((ROOT / "benchmarks/results").iterdir())
    done = run("--out", str(tmp_path / "gpu.json"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("No NVIDIA GPU was found on this machine, so nothing was run.\nWhat would run")
    for one in gpu.stages():
        assert re.search(rf"^{re.escape(one.name)} +{one.gpus} GPU", done.stdout, re.MULTILINE)
    assert not (tmp_path / "gpu.json").exists() and sorted((ROOT / "benchmarks/results").iterdir()) == before


def test_a_gpu_that_torch_does_not_find_is_no_success(tmp_path, monkeypatch, capsys):
    (tmp_path / "torch.py").write_text("raise ImportError('libcuda is broken')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpu.main([]) == 2
    assert capsys.readouterr().out.startswith("Nothing was run: torch: ImportError: libcuda is broken.\n")

    (tmp_path / "torch.py").write_text("class cuda:\n    device_count = staticmethod(lambda: 0)")
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H100 (UUID: GPU-1)'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert gpu.look("cuda") == gpu.Machine("cuda", (), "torch finds none, nvidia-smi lists NVIDIA H100")
    smi.unlink()
    assert gpu.look("cuda") == gpu.Machine("cuda", ())


# ---- the stages


def test_make_gpu_needs_no_network(tmp_path):
    """With PYTHON, or an environment that is there, nothing is installed."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n')
    python.chmod(0o755)
    command = ["make", "gpu", f"PYTHON={python}"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    subprocess.run([*command, "GPU_FLAGS=--dry-run"], cwd=ROOT, check=True, capture_output=True)
    assert (tmp_path / "calls").read_text() == "benchmarks/gpu.py\nbenchmarks/gpu.py --dry-run\n"


def test_the_page_has_the_stages_and_the_wheels():
    page = (ROOT / "docs/gpu.md").read_text()
    listed = (ROOT / "benchmarks/gpu_wheels.txt").read_text()
    groups = re.split(r"^# .*?: (\d+) wheels, ([\d.]+) MB$", listed, flags=re.MULTILINE)[1:]
    assert len(groups) == 9
    for count, total, text in zip(groups[::3], groups[1::3], groups[2::3], strict=True):
        sizes = [float(size) for size in re.findall(r"^\S+==\S+ +# ([\d.]+) MB$", text, re.MULTILINE)]
        assert len(sizes) == int(count) and sum(sizes) == pytest.approx(float(total), abs=0.1)
        assert f"{count}, {total} MB" in page or f"{count} wheels, {total} MB" in page
    needed = re.findall(r"^(\S+)==(\S+) +# ([\d.]+) MB$", groups[2], re.MULTILINE)
    rows = re.findall(r"^\| ([\w-]+) \| ([\d.]+) \| ([\d.]+) \|$", page, re.MULTILINE)
    assert rows == needed
    for one in gpu.stages():
        kind = one.name.split()[0].rstrip(",")
        assert f"`{kind}" in page, one.name


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory):
    """Outcomes of the stages that need no Megatron, at a tiny size on CPU ranks."""
    work = tmp_path_factory.mktemp("gpu")
    names = ("versions", "kernel eager", "head")
    return {one.name: one for one in gpu.run_all(gpu.choose(names), TWO, 200, work, "tiny")}


def test_stages_run_on_a_cpu(on_cpu):
    assert {one.result for one in on_cpu.values()} == {"passed"}, on_cpu
    found = on_cpu["kernel eager"].numbers["V 1000"]
    assert len(found) == 2 and all(set(one) == {"divergence", "cross entropy", "gradient"} for one in found.values())
    fused = on_cpu["head"].numbers["fused, gradient in forward"]
    assert fused["seconds"] > 0 and fused["error"] <= gpu_stages.HEAD_TOLERANCE
    assert "torch " in on_cpu["versions"].summary


def test_a_kernel_that_is_off_fails(tmp_path, monkeypatch):
    from abkd_megatron import kernels

    before = kernels.use("auto")
    try:
        monkeypatch.setattr(gpu_stages, "LIMIT", 1e-9)
        report = gpu_stages.Report()
        place = gpu_stages.Place("cpu", "tiny", tmp_path)
        gpu_stages.kernel(report, place, Namespace(kernel="eager"))
    finally:
        kernels.use(before)
    assert report.problems and "divergence off by" in report.problems[0]


LOG = textwrap.dedent("""\
    abkd_megatron: LM head fused with the loss: chunks of 24 tokens, 1 MiB, in place of 64 x 512 logits of both models
     [2026-01-01 00:00:00.0] iteration        1/       2 | elapsed time per iteration (ms): 9.5 | lm loss: 6.5E+00 | kd loss: 1.5E+00 | total loss: 8.0E+00 | grad norm: 2.0 |
     [2026-01-01 00:00:01.0] iteration        2/       2 | elapsed time per iteration (ms): 7.5 | lm loss: 6.0E+00 | kd loss: 1.0E+00 | total loss: 7.0E+00 | grad norm: nan |
    """)  # noqa: E501


def test_what_a_log_says():
    steps = gpu_stages.of_steps(LOG)
    assert steps["kd loss"] == [1.5, 1.0] and steps["lm loss"] == [6.5, 6.0]
    (nan,) = gpu_stages.problems_of_steps(steps, 2)
    assert nan.startswith("grad norm is not finite")
    assert len(gpu_stages.problems_of_steps(steps, 3)) == 5
    assert gpu_stages.problems_of_head(LOG) == []
    for log in (LOG + "abkd_megatron: LM head materialized: 64 x 512 logits (has hooks)", ""):
        assert len(gpu_stages.problems_of_head(log)) == 1


def test_the_cause_of_a_job_that_failed():
    noise = "  logits_load_ignore_errors .............. False"
    ours = "[rank 1] abkd-megatron distill: error: head: fused is not possible (has hooks)"
    assert gpu_stages.cause("\n".join(["ValueError: x", ours, noise])) == ours
    assert (
        gpu_stages.cause("\n".join(["torch.AcceleratorError: no driver", noise])) == "torch.AcceleratorError: no driver"
    )
    assert gpu_stages.cause("Killed\n\n") == "Killed" and gpu_stages.cause("") == "it said nothing"


def test_other_losses_than_one_gpus_are_seen():
    one = {"kd loss": [1.0, 0.5], "grad norm": [2.0, 2.0]}
    differences, wrong = gpu_stages.compared({"kd loss": [1.0, 0.505], "grad norm": [2.0, 2.1]}, one)
    assert differences == {"kd loss": pytest.approx(0.01), "grad norm": pytest.approx(0.05)}
    assert len(wrong) == 1 and wrong[0].startswith("grad norm differs from one GPU's by 5.0e-02")
    _, wrong = gpu_stages.compared({"kd loss": [float("nan")], "grad norm": []}, one)
    assert len(wrong) == 2


def test_ranks_share_gpus(tmp_path, monkeypatch):
    four = gpu.Stage("four", "", 1, gpus=4)
    one_gpu = gpu.Machine("cuda", ("a",))
    assert gpu.why_not(four, one_gpu, {}, [])
    monkeypatch.setenv(gpu.RANKS_PER_GPU, "4")
    assert not gpu.why_not(four, one_gpu, {}, [])
    monkeypatch.setenv(gpu.RANKS_PER_GPU, "2")
    assert gpu.why_not(four, one_gpu, {}, [])
    script = tmp_path / "rank.py"
    script.write_text(
        "import os, sys\nopen(f'{sys.argv[1]}/{os.environ[\"RANK\"]}', 'w').write(os.environ['LOCAL_RANK'])\n"
    )
    subprocess.run([*gpu.on_ranks(4, sys.executable), str(script), str(tmp_path)], check=True, env=os.environ)
    assert [(tmp_path / str(rank)).read_text() for rank in range(4)] == ["0", "0", "1", "1"]
