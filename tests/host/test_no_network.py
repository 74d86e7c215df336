"""Jobs ask for no host but this machine, and run where there is no network.

What Python asks for is seen by an audit hook in every process of a job. What C++ asks for is not; but the jobs run in a
network namespace of their own, with its loopback device alone, where that is permitted.
"""

import functools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from launch import ROOT

# As sitecustomize.py it is run by every Python that starts with its folder on PYTHONPATH.
WATCH = """\
import json, os, sys

def note(event, values):
    if event in ("socket.connect", "socket.sendto"):
        asked = values[1]
    elif event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr", "urllib.Request"):
        asked = values[0]
    else:
        return
    with open(os.environ["ASKED"], "a") as file:
        file.write(json.dumps([event, asked], default=repr) + "\\n")

sys.addaudithook(note)
"""

# The loopback device of a new namespace is down.
LOOPBACK = """\
import fcntl, os, socket, struct, sys
SIOCSIFFLAGS, IFF_UP = 0x8914, 1
with socket.socket() as any_socket:
    fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sh", b"lo", IFF_UP))
os.execvp(sys.argv[1], sys.argv[1:])
"""

# TEST-NET-2 of RFC 5737: nobody's.
OUTSIDE = "import socket; socket.create_connection(('198.51.100.1', 9), timeout=5)"


@functools.cache
def alone() -> list[str]:
    """What runs a command in a namespace without a network; nothing if that is not permitted."""
    command = ["unshare", "--user", "--map-root-user", "--net", sys.executable, "-c", LOOPBACK]
    try:
        done = subprocess.run([*command, "true"], capture_output=True, timeout=60)
    except FileNotFoundError:
        return []
    return command if done.returncode == 0 else []


def run(words: list[str], folder: Path) -> tuple[subprocess.CompletedProcess, list[str]]:
    """Run `python WORDS`.

    Returns:
        How it ended, and what other hosts it asked for.
    """
    (folder / "sitecustomize.py").write_text(WATCH)
    asked = folder / "asked"
    asked.write_text("")
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("HF_HUB_", "MASTER_", "WANDB_"))},
        "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]),
        "ASKED": str(asked),
        "OMP_NUM_THREADS": "1",
        **{
            "RANK": "0",
            "WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "29500",
        },  # torchrun's are its own
    }
    command = [*alone(), sys.executable, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment, cwd=ROOT)
    here = {"", "None", "localhost", "127.0.0.1", "::1", "0.0.0.0", "::", socket.gethostname(), socket.getfqdn()}
    others = []
    for event, what in map(json.loads, asked.read_text().splitlines()):
        if isinstance(what, str) and event in ("socket.connect", "socket.sendto"):
            continue  # the path of a Unix socket
        host = what[0] if isinstance(what, list) else what
        if str(host) not in here:
            others.append(f"{event} {what}")
    return done, others


def test_another_host_would_be_seen(tmp_path: Path) -> None:
    done, others = run(["-c", OUTSIDE], tmp_path)
    assert done.returncode != 0
    assert "socket.connect ['198.51.100.1', 9]" in others


def test_there_is_no_network_in_the_namespace(tmp_path: Path) -> None:
    if not alone():
        pytest.skip("no network namespace can be made here (unshare --user --net)")
    done, _ = run(["-c", OUTSIDE], tmp_path)
    assert "Network is unreachable" in done.stderr


def test_jobs_ask_for_no_other_host(config: Path, teacher: Path, tmp_path: Path) -> None:
    out = tmp_path / "student"
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
    saving = [f"megatron.save={out}", "megatron.save-interval=2", f"megatron.tensorboard-dir={out}/tensorboard"]
    steps = ["--config", str(config), "megatron.train-iters=2"]
    distill = [*steps, f"teacher.load={teacher}", *saving]
    # One job, as torchrun's store serves but one process group.
    several = {"distill": ["distill", *distill]}
    of_one = {
        "env": ["env"],
        "pretrain": ["pretrain", *steps],
        "prepare": ["prepare", "--config", str(config), f"data.dir={tmp_path / 'data'}"],
        "check": ["check", *distill, f"megatron.load={out}", "--world-size", "2"],
        "estimate": ["estimate", *distill, "--world-size", "1"],
        "report": ["report", str(out)],
    }
    for start, jobs in ((torchrun, several), ([], of_one)):
        cases = tmp_path / "cases.json"
        cases.write_text(json.dumps(jobs))
        done, others = run([*start, "tests/host/refused.py", str(cases)], tmp_path)
        ends = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"')]
        assert len(ends) == (2 if start else 1), f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        for ended in ends:
            assert all(code == 0 for code, _ in ended.values()), json.dumps(ended, indent=1)[-4000:]
        assert not others
    assert (out / "report.html").is_file()
