"""The Triton kernels give what the eager ones do, and compile for the GPUs they are meant for.

No GPU is needed: the comparisons run in Triton's interpreter, the compiler without a device. Both run in processes of
their own, since Triton reads its environment once.
"""

import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_cases import DIVERGENCES, SETTINGS, compare, special

from abkd_megatron import AlphaBeta, ToDi
from abkd_megatron.errors import ConfigError, HostError
from abkd_megatron.kernels.record import Layout

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def compiled(arch):
    """Registers and bytes of local memory of each kernel, as its launch would have it compiled for `arch`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.errors import PTXASError

    import abkd_megatron.kernels.triton as kernel

    class Driver:
        """A GPU that is not there."""

        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device: 0)
        get_current_target = staticmethod(lambda: GPUTarget("cuda", arch, 32))

    triton.runtime.driver.set_active(Driver())
    kernel._check = lambda *arguments: None
    columns, rows, divergence = 4096, 16, AlphaBeta(0.2, 0.7)
    student, teacher, out = torch.zeros(3, rows, columns, dtype=torch.bfloat16)
    labels, weight, scalars = torch.zeros(rows, dtype=torch.int64), torch.ones(rows), torch.zeros(6, rows).double()
    shared = (student, teacher, labels, 0, divergence)
    launches = {
        kernel._record_kernel: lambda: kernel.local_record(*shared, Layout(divergence, True, 1.0), torch.float32),
        kernel._gradient_kernel: lambda: kernel.local_gradient(
            out, *shared, 1.0, torch.float32, scalars, weight, weight
        ),
        kernel._second_record_kernel: lambda: kernel.local_second_record(
            student, teacher, ToDi(), 1.0, torch.float32, scalars[:4], True, True
        ),
    }
    found = {}
    for tuner, launch in launches.items():
        binaries = []
        build = tuner.fn.run
        tuner.fn.run = lambda *args, build=build, binaries=binaries, **kwargs: binaries.append(
            build(*args, **{**kwargs, "warmup": True})
        )
        for config in list(tuner.configs):
            tuner.configs = [config]
            try:
                launch()
            except PTXASError as failure:
                return {"refused": str(failure)}
            found[f"{tuner.base_fn.__name__} {config}"] = resources(binaries[-1].asm["cubin"])
    return found


def resources(cubin):
    from triton import backends

    tool = Path(backends.__file__).parent / "nvidia" / "bin" / "cuobjdump"
    path = Path(os.environ["TRITON_CACHE_DIR"]) / "kernel.cubin"
    path.write_bytes(cubin)
    usage = subprocess.run([tool, "--dump-resource-usage", path], capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL"))
    return {"registers": registers, "local": stack + local}


def launches():
    """The tiles each launch has, by what they are left to; and whether records are equal to the bit where they are."""
    import abkd_megatron.kernels.triton as kernel

    student, teacher = torch.randn(2, 4, 3000, generator=torch.Generator().manual_seed(0))
    found = []
    for jit in (made.fn for made in kernel._kernels.values()):
        run = jit.run
        jit.run = lambda *args, run=run, **kwargs: (
            found.append({name: kwargs[name] for name in ("WIDE", "BLOCK", "num_warps") if name in kwargs}),
            run(*args, **kwargs),
        )

    def launch():
        found.clear()
        layout = Layout(ToDi(), False, 1.0)
        record = kernel.local_record(student, teacher, None, 0, ToDi(), layout, torch.float32)
        kernel.local_second_record(student, teacher, ToDi(), 1.0, torch.float32, torch.zeros(4, 4).double(), True, True)
        in_place = student.clone()
        scalars, weight = torch.zeros(6, 4).double(), torch.ones(4)
        kernel.local_gradient(in_place, in_place, teacher, None, 0, ToDi(), 1.0, torch.float32, scalars, weight, None)
        return list(found), record

    import triton

    said, launched = {"the only one": kernel.tiles(3000, torch.float32)}, {"the only one": launch()[0]}
    tuner = kernel._kernels["record"]
    other = triton.Config({"WIDE": 2048, "BLOCK": 512}, num_warps=8)
    tuner.configs.append(other)
    said["not tuned"] = kernel.tiles(3000, torch.float32)
    tuner.cache[(3000, "torch.float64", "torch.float32", "torch.float32")] = other  # as tuning leaves it
    said["tuned"], said["other width"] = kernel.tiles(3000, torch.float32), kernel.tiles(3001, torch.float32)
    tuner.configs.pop()
    torch.use_deterministic_algorithms(True)
    (launched["deterministic"], one), (_, other) = launch(), launch()
    said["deterministic"] = kernel.tiles(3000, torch.float32)
    torch.use_deterministic_algorithms(False)
    last = {name: choices[-1] for name, choices in kernel._choices.items()}
    assert kernel.use_tiles(last) == {}
    launched["set"], said["set"] = launch()[0], kernel.tiles(3000, torch.float32)
    assert kernel.use_tiles({}) == last
    try:
        kernel.use_tiles({"record": {"BLOCK": 17}})
    except ConfigError as error:
        refused = str(error)
    choices = kernel._choices
    return {"said": said, "launched": launched, "choices": choices, "equal": torch.equal(one, other), "no": refused}


def refusals():
    """What is said where the kernels cannot run: the error's type and message."""
    kernel = importlib.import_module("abkd_megatron.kernels.triton")

    class Mine(AlphaBeta):
        pass

    logits = torch.zeros(2, 4)

    def refused(divergence, logits, dtype):
        layout = Layout(divergence, False, 1.0)
        try:
            kernel.local_record(logits, logits, None, 0, divergence, layout, dtype)
        except (ConfigError, HostError) as error:
            return [type(error).__name__, str(error)]
        return None

    found = {
        "divergence": refused(Mine(0.2, 0.7), logits, torch.float32),
        "dtype": refused(ToDi(), logits.double(), torch.float64),
        "device": refused(ToDi(), logits, torch.float32),
    }
    del sys.modules["abkd_megatron.kernels.triton"]
    sys.modules["triton"] = None  # as where it is not installed
    kernel = importlib.import_module("abkd_megatron.kernels.triton")
    found["no triton"] = refused(ToDi(), logits, torch.float32)
    return found


def run(folder, *arguments, interpret):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(folder)}
    environment.pop("TRITON_INTERPRET", None)
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    return run(tmp_path_factory.mktemp("triton"), "compare", interpret=True)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", DIVERGENCES)
def test_equals_eager(interpreted, name, setting):
    worst = interpreted["compared"][f"{name}, {setting}"]
    assert set(worst) >= {"record", "gradient"}
    assert all(number <= 1.0 for number in worst.values()), worst


@pytest.mark.parametrize("name", ["nan and inf logits", "no columns", "equal models"])
def test_special_rows(interpreted, name):
    assert interpreted["special"][name]


@pytest.mark.parametrize("arch", [90, 100])
def test_compiles_for_a_gpu(arch, tmp_path):
    found = run(tmp_path, "compile", str(arch), interpret=False)
    if "refused" in found:
        pytest.skip(f"this Triton's ptxas does not compile for sm_{arch}: {found['refused']}")
    assert len(found) >= 9
    for kernel, used in found.items():
        assert used["registers"] <= 128, (kernel, used)
        assert used["local"] == 0, (kernel, used)


def test_tiles_are_tuned_fixed_or_set(tmp_path):
    found = run(tmp_path, "launches", interpret=True)
    said, launched, choices = found["said"], found["launched"], found["choices"]
    first, last = ({name: of[at] for name, of in choices.items()} for at in (0, -1))
    assert said["deterministic"] == first and launched["deterministic"] == list(first.values())
    assert said["set"] == last and launched["set"] == list(last.values())
    assert said["the only one"] == first, "of which the interpreter has the first alone"
    assert len(launched["the only one"]) == 4, "in place, the gradient is tuned on a copy"
    assert said["not tuned"] == said["other width"] == {**first, "record": None}
    assert said["tuned"] == {**first, "record": {"WIDE": 2048, "BLOCK": 512, "num_warps": 8}}
    assert found["equal"] and "got record: {'BLOCK': 17}; pass the result of tiles()" in found["no"]


def test_says_where_it_cannot_run(tmp_path):
    found = run(tmp_path, "refuse", interpret=False)
    assert [kind for kind, _ in found.values()] == ["ConfigError", "ConfigError", "HostError", "HostError"]
    for _, message in found.values():
        assert "choose the eager kernel" in message
    assert "Mine(alpha=0.2, beta=0.7)" in found["divergence"][1] and "torch.float64" in found["dtype"][1]
    assert "pip install triton" in found["no triton"][1]


def main(mode, *arguments):
    if mode == "compile":
        return compiled(int(arguments[0]))
    if mode == "launches":
        return launches()
    if mode == "refuse":
        return refusals()
    import abkd_megatron.kernels.triton as kernel

    names = itertools.product(DIVERGENCES, SETTINGS)
    compared = {f"{name}, {setting}": compare(kernel, DIVERGENCES[name], setting) for name, setting in names}
    return {"compared": compared, "special": special(kernel)}


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
