"""The command line: its words, its help, what it refuses before it looks at a configuration."""

import os
import pty
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from abkd_megatron import cpu_backend
from abkd_megatron.__main__ import JOBS, main, parse
from abkd_megatron.errors import HostError

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = [(name, line) for name, job in JOBS.items() for line in job.examples]


def run(*words: str, path: str = str(ROOT), **how) -> subprocess.CompletedProcess:
    """`python WORDS` in the repository."""
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, **how
    )


def words_of(line: str) -> list[str]:
    """What stands behind `abkd-megatron`, or behind what torchrun starts."""
    words = shlex.split(line)
    if words[0] == "torchrun":
        assert words[1] == "--nproc-per-node" and words[2].isdigit() and words[3:5] == ["-m", "abkd_megatron"]
        return words[5:]
    assert words[0] == "abkd-megatron"
    return words[1:]


def test_the_stand_in_refuses_to_start_beside_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(HostError, match=r"device: cuda"):
        cpu_backend.install()
    assert not torch.cuda.is_initialized()


@pytest.mark.parametrize(
    ("job", "message"), [("distl", "did you mean 'distill'?"), ("finetune", "known: env, prepare")]
)
def test_an_unknown_job_is_told(job: str, message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        parse([job, "config.yaml"])
    assert ended.value.code == 2
    assert f"abkd-megatron: error: command line: unknown job '{job}'; " in (said := capsys.readouterr().err)
    assert message in said


@pytest.mark.parametrize("words", [["env"], ["--help"]])
def test_a_reader_may_leave(words: list[str]) -> None:
    """As `head` does."""
    reader, writer = os.pipe()
    os.close(reader)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "abkd_megatron", *words]
    ended = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, env=environment, timeout=300)
    os.close(writer)
    assert ended.returncode == 0
    assert "BrokenPipe" not in ended.stderr and "Traceback" not in ended.stderr, ended.stderr


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "first", "WORLD_SIZE": "2"}, r"whole numbers in RANK and WORLD_SIZE, got RANK=first, WORLD_SIZE=2"),
        ({"WORLD_SIZE": "2"}, r"expected RANK together with WORLD_SIZE=2, got none; start ranks by torchrun"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, r"expected RANK below WORLD_SIZE, got RANK=2, WORLD_SIZE=2"),
        ({"RANK": "1"}, r"expected RANK below WORLD_SIZE, got RANK=1; "),
        (
            {"RANK": "0", "WORLD_SIZE": "2"},
            r"expected MASTER_ADDR and MASTER_PORT together with RANK=0, WORLD_SIZE=2, got none",
        ),
    ],
)
def test_ranks_that_do_not_know_their_place(
    environment: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main(["pretrain", "no-such.yaml"]) == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.fixture
def foreign_apex(tmp_path: Path) -> str:
    """Where to look for packages so that there is an `apex` that is not NVIDIA's."""
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex/__init__.py").write_text("")
    return os.pathsep.join([str(tmp_path), str(ROOT)])


def test_an_unrelated_apex_is_refused(foreign_apex: str) -> None:
    ended = run("-m", "abkd_megatron", "show-config", path=foreign_apex)
    assert ended.returncode == 2
    assert "pip uninstall apex" in ended.stderr
    assert "Traceback" not in ended.stderr


# The words behind a job ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ["a.yaml", "device=cpu", "data.dir=b", "--world-size", "4"],
        ["--config", "a.yaml", "device=cpu", "data.dir=b", "--world-size=4"],
        ["--world-size", "4", "a.yaml", "device=cpu", "data.dir=b"],
        ["a.yaml", "device=cpu", "--world-size", "4", "data.dir=b"],
        ["device=cpu", "--config", "a.yaml", "--world-size", "4", "data.dir=b"],
    ],
    ids=" ".join,
)
def test_the_configuration_and_settings(words: list[str]) -> None:
    found = parse(["check", *words])
    assert (found.config, found.overrides, found.world_size) == (Path("a.yaml"), ["device=cpu", "data.dir=b"], 4)


def test_settings_alone_are_enough() -> None:
    found = parse(["show-config", "device=cpu"])
    assert (found.config, found.overrides) == (None, ["device=cpu"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["distill", "a.yaml", "--config", "b.yaml"], "expected one configuration, got --config b.yaml and 'a.yaml'"),
        (["distill", "a.yaml", "--wrold-size", "2"], "unrecognized arguments: --wrold-size; see"),
        (["env", "a.yaml"], "unrecognized arguments: a.yaml; see abkd-megatron env --help"),
        (["check", "a.yaml", "--world-size", "0"], "expected a whole number above 0, got '0'"),
        ([], "the following arguments are required: JOB"),
    ],
    ids=str,
)
def test_what_cannot_be_read_is_refused(words: list[str], said: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(words)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


# Help -----------------------------------------------------------------------------------------------------------


def test_the_overview_has_every_job_with_an_example(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0
    places = [text.index(f"\n  {name} ") for name in JOBS]
    assert places == sorted(places)
    for job in JOBS.values():
        assert f"  {job.examples[0]}\n" in text


@pytest.mark.parametrize("name", JOBS)
def test_the_help_of_a_job(name: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0
    assert all(f"  {line}\n" in text for line in JOBS[name].examples)
    assert "exit code  0" in text
    assert text.startswith(f"usage: abkd-megatron {name} ")


@pytest.mark.parametrize(("name", "line"), EXAMPLES)
def test_an_example_is_of_its_job(name: str, line: str) -> None:
    found = parse(words_of(line))
    assert found.job == name
    if JOBS[name].takes_config:
        assert (ROOT / found.config).is_file()


# Runs a command line, then says on stderr which of what takes seconds to import it has imported.
IMPORTS = """
import sys
from abkd_megatron.__main__ import main
try:
    code = main(sys.argv[1:])
except SystemExit as end:
    code = end.code
print("imported", *sorted({name.partition(".")[0] for name in sys.modules} & {"torch", "megatron"}), file=sys.stderr)
sys.exit(code)
"""


@pytest.mark.parametrize("words", [["--help"], ["distill", "--help"]], ids=str)
def test_help_imports_neither_torch_nor_megatron(words: list[str]) -> None:
    ended = run("-c", IMPORTS, *words)
    assert ended.returncode == 0 and ended.stderr == "imported\n", ended.stderr


# env ------------------------------------------------------------------------------------------------------------


def test_env_says_what_is_here() -> None:
    ended = run("-c", IMPORTS, "env")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stderr.endswith("imported torch\n")
    assert f"torch: {torch.__version__.partition('+')[0]}" in ended.stdout
    for name in ("Python", "megatron-core", "sentencepiece", "rich", "C++ compiler", "triton", "GPU", "NVIDIA apex"):
        assert f"  {name}: " in ended.stdout
    assert "needed for: device: cuda" in ended.stdout
    assert "https://github.com/NVIDIA/apex" in ended.stdout
    assert ended.stdout.endswith("all required parts are installed\n")


def test_env_says_what_is_missing_where_everything_is() -> None:
    """Without site-packages there is Python alone."""
    ended = run("-S", "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}){IMPORTS}", "env", path="")
    assert ended.returncode == 2, ended.stdout + ended.stderr
    for name in ("torch", "megatron-core", "sentencepiece", "PyYAML", "psutil", "rich"):
        assert f"missing   {name}: " in ended.stdout, ended.stdout
    assert "not here  triton: " in ended.stdout
    assert "ok        Python: " in ended.stdout
    assert "missing or wrong: torch, megatron-core" in ended.stdout
    assert ended.stderr == "imported\n"


def test_env_runs_beside_an_unrelated_apex(foreign_apex: str) -> None:
    ended = run("-m", "abkd_megatron", "env", path=foreign_apex)
    assert ended.returncode == 2
    assert "wrong" in ended.stdout and "pip uninstall apex" in ended.stdout
    assert ended.stdout.endswith("missing or wrong: NVIDIA apex\n")
    assert "Traceback" not in ended.stderr


def test_a_terminal_gets_a_table() -> None:
    code = """
from abkd_megatron.tools.tables import show
show(("what", "found", "verdict"), [("data", "[0.3, a]", "ok"), ("ranks", "64", "refused")], {"ok": "green"})
"""
    outside, inside = pty.openpty()
    with os.fdopen(outside, "rb") as terminal:
        subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "TERM": "xterm"}, stdout=inside, check=True
        )
        os.close(inside)
        shown = os.read(terminal.fileno(), 10_000).decode()
    assert "\u2502 [0.3, a]" in shown  # a table, and brackets are text
    assert "\x1b[32mok" in shown
    piped = run("-c", code)
    assert piped.stdout == "ok       data: [0.3, a]\nrefused  ranks: 64\n"
    long = run("-c", code.replace("[0.3, a]", "x" * 500))
    assert long.stdout.splitlines() == [f"ok       data: {'x' * 500}", "refused  ranks: 64"]
