"""Commands and configurations on the pages, read by their parsers.

Words in capitals are placeholders and are left out. The jobs of docs/command-line.md run in
tests/host/test_readme_commands.py.
"""

import re
import shlex
from argparse import ArgumentParser
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from pages import PAGES, ROOT

pytest.importorskip("megatron.training")

from megatron.training.arguments import add_megatron_arguments
from torch.distributed.run import get_args_parser

from abkd_megatron import cpu_backend
from abkd_megatron.__main__ import JOBS, parse
from abkd_megatron.config.load import load_config
from abkd_megatron.config.megatron_args import megatron_options
from abkd_megatron.hosts.script import add_kd_arguments

OPTIONS = megatron_options()
PLACEHOLDER = re.compile(r"[A-Z][A-Z0-9_]+$")
# Placeholders for files in synopses.
FILES = {"CONFIG": "configs/tiny_cpu.yaml", "FILE": "configs/tiny_cpu.yaml"}


def blocks(language: str) -> list[tuple[str, str]]:
    return [
        (page.name, text)
        for page in PAGES
        for text in re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    ]


def commands() -> list[tuple[str, str]]:
    """Return every line of `sh` blocks, and indented or inline commands that start with a program of ours."""
    found = [(page, line) for page, text in blocks("sh") for line in text.replace("\\\n", " ").splitlines()]
    indented = r"^ {4}((?:abkd-megatron|torchrun|make|pip|python) .*)$"
    for page in PAGES:
        plain = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        found += [(page.name, line) for line in re.findall(indented, plain, re.MULTILINE)]
        within = r"`(torchrun [^`]* -m [^`]*|abkd-megatron [\w-]+ (?:--config |configs/)[^`]*)`"
        found += [(page.name, line) for line in re.findall(within, plain)]
    return [(page, line.strip()) for page, line in found if line.strip() and not line.strip().startswith("#")]


def defaults(device: str) -> Mapping[str, Any]:
    return cpu_backend.MEGATRON_DEFAULTS if device == "cpu" else {}


def check_job(words: list[str]) -> None:
    given = parse([FILES.get(word, word) for word in words])
    path = getattr(given, "config", None)
    overrides = [word for word in getattr(given, "overrides", []) if not PLACEHOLDER.match(word)]
    if path is not None:
        config = load_config(ROOT / path, overrides, OPTIONS, defaults)
        if given.job in ("prepare", "pretrain", "cache", "distill", "generate", "compare"):
            config.check(given.job)


def check_script(words: list[str]) -> None:
    """Parse the arguments of a script of the repository."""
    script, *arguments = words
    assert (ROOT / script).is_file() or (ROOT / "examples" / script).is_file(), script
    if Path(script).name == "pretrain_gpt.py":
        parser = add_kd_arguments(add_megatron_arguments(ArgumentParser(allow_abbrev=False)))
        given = parser.parse_args([word for word in arguments if not PLACEHOLDER.match(word) and word != "..."])
        settings = [f"teacher.{word}" for word in getattr(given, "kd_teacher_args", [])]
        settings += [
            f"distillation.{name.removeprefix('kd_') if name != 'kd_weight' else name}={value}"
            for name, value in vars(given).items()
            if name.startswith("kd_") and not name.startswith("kd_teacher")
        ]
        load_config(None, settings, OPTIONS)


@pytest.fixture(autouse=True)
def modules_of_the_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write the modules of docs/adding-a-divergence.md."""
    text = (ROOT / "docs/adding-a-divergence.md").read_text()
    for name, source in re.findall(r"^<!-- file: (\S+) -->\n```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        (tmp_path / name).write_text(source)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.parametrize(("page", "line"), commands(), ids=str)
def test_a_command_is_taken(page: str, line: str) -> None:
    words = shlex.split(line, comments=True)
    while re.match(r"[A-Z_]+=", words[0]):
        del words[0]
    program, *rest = words
    program = program.removeprefix(".venv/bin/")
    if program == "abkd-megatron":
        check_job(rest)
    elif program == "torchrun":
        given = get_args_parser().parse_args(rest)
        if given.module and given.training_script == "abkd_megatron":
            check_job(given.training_script_args)
        elif given.module:
            assert given.training_script == "abkd_megatron.cpu_backend"
            check_script(given.training_script_args)
        else:
            check_script([given.training_script, *given.training_script_args])
    elif program in ("bash", "sbatch"):  # a launcher, and behind it the words of a job
        (at,) = [at for at, word in enumerate(rest) if word.endswith(".sh")]
        assert (ROOT / rest[at]).is_file()
        check_job(rest[at + 1 :])
    elif program == "make":
        targets = {word for word in rest if not re.match(r"[A-Z_]+=", word)}
        assert targets <= set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    elif program == "pip" and "-r" in rest:
        assert rest[0] in ("download", "install") and (ROOT / rest[rest.index("-r") + 1]).is_file()
    elif program == "pip":
        assert rest[0] == "install" and (rest == ["install", "-e", "."] or page == "bridge.md")
    elif program == "python" and rest[0] == "-m":
        assert rest[1] == "pytest"
        named = [word for word in rest[2:] if word.startswith("tests/")]
        assert named and all((ROOT / word).exists() for word in named)
    elif program == "python":
        check_script(rest)
    else:
        pytest.fail(f"{page}: what is {program}? Say here how it is checked")


def test_there_are_commands() -> None:
    assert len(commands()) >= 15 and {page for page, _ in commands()} >= {"README.md", "configuration.md"}


@pytest.mark.parametrize(("page", "text"), blocks("yaml"), ids=str)
def test_a_configuration_is_taken(page: str, text: str, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    config = load_config(file, [], OPTIONS, defaults)
    config.check("distill" if config.teacher.load else "pretrain")
    if any("." in str(term.get("name", "")) for term in config.distillation.losses):
        assert config.distillation.make_logit_losses() or config.distillation.make_divergence()


def test_the_jobs_are_the_command_lines() -> None:
    """docs/command-line.md names every job, and no page names another."""
    known = set(JOBS)
    page = ROOT / "docs/command-line.md"
    shown = re.findall(r"^\| `abkd-megatron ([\w-]+)", page.read_text(), re.MULTILINE)
    assert set(shown) == known and len(shown) == len(known)
    for page in PAGES:
        assert set(re.findall(r"`abkd-megatron ([a-z][\w-]*)", page.read_text())) <= known, page.name
