"""The commands of docs/command-line.md run in their order, with only sizes and directories changed."""

import re
import shlex
import sys
from pathlib import Path

from launch import ROOT, launch

SMALL = [
    "megatron.train-iters=2",
    "megatron.lr-warmup-iters=1",
    "megatron.eval-iters=1",
    "megatron.global-batch-size=16",
]
TWO = "{CE only: {kd_weight: 0, lm_weight: 1}, ToDi: {divergence: todi}}"


def test_the_commands_run(tmp_path: Path) -> None:
    _, _, jobs = (ROOT / "docs/command-line.md").read_text().partition("\n## The jobs\n")
    block = re.findall(r"```sh\n(.*?)```", jobs, re.DOTALL)[0]
    commands = [shlex.split(line) for line in block.splitlines()]
    jobs = [command[command.index("abkd_megatron") + 1 if command[0] == "torchrun" else 1] for command in commands]
    assert jobs == ["env", "prepare", "pretrain", "check", "distill", "show-config", "report", "compare"]
    for command in commands:
        if "env" in command or "report" in command:
            words = [str(tmp_path / "tiny_cpu") if word == "runs/demo/student" else word for word in command[1:]]
            (rank,) = launch(["-m", "abkd_megatron", *words], 1)
            assert rank.code == 0, f"{command}:\n{rank.output[-4000:]}"
            continue
        num_ranks = 1
        if command[0] == "torchrun":
            num_ranks = int(command[2])
            assert command[3:5] == ["-m", "abkd_megatron"]
            command = command[4:]
        config = next(word for word in command if word.endswith(".yaml"))
        places = [f"data.dir={tmp_path / 'data'}"]
        if "prepare" not in command:
            run = tmp_path / Path(config).stem
            places += [f"megatron.save={run}", f"megatron.tensorboard-dir={run / 'tensorboard'}", *SMALL]
            places.append(f"teacher.load={tmp_path / 'tiny_cpu_teacher'}")
        if "check" in command:
            places += ["--world-size", "4"]  # launch() says 1
        if "compare" in command:
            places += [f"compare.out={tmp_path / 'compare'}", "compare.seeds=[1]", f"compare.losses={TWO}"]
            places.append(f"compare.launch={sys.executable} {Path(__file__).with_name('quick.py')}")
        for number, rank in enumerate(launch(["-m", "abkd_megatron", *command[1:], *places], num_ranks)):
            assert rank.code == 0, f"rank {number} of {command}:\n{rank.output[-4000:]}"
        if "show-config" in command:
            assert "preset: pretrain" in rank.output and "# tiny_cpu.yaml:" in rank.output
    assert (tmp_path / "tiny_cpu/report.html").is_file()
    assert "| ToDi |" in rank.output
