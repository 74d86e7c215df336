"""The Triton kernels give what the eager ones do, and compile for the GPUs they are meant for.

No GPU is needed: the comparisons run in Triton's interpreter, the compiler without a device. Both run in processes of
their own, since Triton reads its environment once.
"""

import importlib.util
import itertools
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from abkd_megatron import AlphaBeta, ToDi
from abkd_megatron.errors import ConfigError, HostError
from abkd_megatron.kernels import eager
from abkd_megatron.kernels.record import Layout
from abkd_megatron.vocab_parallel.statistics import merge

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

DIVERGENCES = {
    "ab(0.2,0.7)": AlphaBeta(0.2, 0.7),
    "ab(1,0)": AlphaBeta(1.0, 0.0),
    "ab(0,1)": AlphaBeta(0.0, 1.0),
    "ab(0,0)": AlphaBeta(0.0, 0.0),
    "ab(0.5,-0.5)": AlphaBeta(0.5, -0.5),
    "ab(1.2,-0.3)": AlphaBeta(1.2, -0.3),
    "ab(1e-9,0.5)": AlphaBeta(1e-9, 0.5),
    "todi": ToDi(),
    "todi whole": ToDi(detach=False),
    "todi scale 2": ToDi(2.0, detach=False),
    "todi scale 0": ToDi(0.0),
}
# (student's dtype, teacher's dtype, labels, temperature, columns, columns between the rows)
SETTINGS = {
    "plain": (torch.float32, torch.float32, True, 1.0, 1499, 1499),
    "strided at T=2": (torch.float32, torch.float32, True, 2.0, 1281, 1500),
    "unlabelled at T=2": (torch.float32, torch.float32, False, 2.0, 1024, 1024),
    "bf16": (torch.bfloat16, torch.bfloat16, True, 1.0, 1025, 1100),
    "mixed": (torch.float16, torch.float32, False, 1.0, 7, 9),
}
FIRST_COLUMN, ROWS = 300, 8
TOLERANCE = 1e-5


def logits(dtype, columns, stride, generator):
    wide = torch.full((ROWS, stride), math.nan, dtype=dtype)
    wide[:, :columns] = (3 * torch.randn(ROWS, columns, generator=generator)).to(dtype)
    return wide[:, :columns]


def inputs(setting, generator):
    student_dtype, teacher_dtype, has_labels, temperature, columns, stride = SETTINGS[setting]
    student = logits(student_dtype, columns, stride, generator)
    teacher = logits(teacher_dtype, columns, stride, generator)
    student[1, 2:5] = teacher[1, 2:5] = -math.inf  # excluded by both
    student[2], teacher[2] = -100.0, -100.0  # one-hot, of the same token
    student[2, 3], teacher[2, 3] = 30.0, 28.0
    student[3] = -math.inf  # one-hot, of a token that the teacher likes too; KL(p || q) is infinite
    student[3, 4] = 1.0
    student[4] = teacher[4] = -math.inf  # a shard that neither model uses
    student[5, -3:] = student[5].amax() + 1  # ties
    student[6] = (teacher[6].float() + 0.02 * student[6].float()).to(student_dtype)
    labels = FIRST_COLUMN + torch.randint(0, columns, (ROWS,), generator=generator) if has_labels else None
    if labels is not None:
        labels[0], labels[1], labels[5], labels[6] = -1, FIRST_COLUMN + columns, FIRST_COLUMN, FIRST_COLUMN - 1
    return student, teacher, labels, temperature


def error(got, wanted, scale):
    """The largest difference over `scale`; inf if one is not finite where the other is."""
    same = (got == wanted) | (got.isnan() & wanted.isnan())
    difference = (got.double() - wanted.double()).abs() / scale
    return difference.nan_to_num(nan=math.inf).masked_fill(same, 0.0).amax().item()


def row_scale(wanted):
    return wanted.double().abs().nan_to_num(0.0, 0.0, 0.0).amax(dim=-1, keepdim=True).clamp_min(1e-30)


def compare(kernel, divergence, setting):
    """Errors of record and gradient against eager's, in units of what is allowed."""
    generator = torch.Generator().manual_seed(0)
    student, teacher, labels, temperature = inputs(setting, generator)
    layout = Layout(divergence, labels is not None, temperature)
    arguments = (student, teacher, labels, FIRST_COLUMN, divergence, layout, torch.float32)
    got, wanted = kernel.local_record(*arguments), eager.local_record(*arguments)
    # A shard's masses are about 1, and slopes that cancel are known to the rounding of a mass.
    worst = {"record": error(got, wanted, row_scale(wanted).clamp_min(1.0)) / TOLERANCE}
    for model in (layout.student, layout.teacher):
        exact = [model.start, *([model.start + 2, model.start + 3] if labels is not None else [])]
        worst["record"] = max(worst["record"], error(got[exact], wanted[exact], 1e-30))

    in_fp64 = (student.double(), teacher.double(), *arguments[2:-1], torch.float64)
    exact = merge(eager.local_record(*in_fp64).unsqueeze(0), divergence, layout)
    merged = [merge(record.unsqueeze(0), divergence, layout) for record in (got, wanted)]
    if exact.value is not None:
        finite = exact.value.isfinite()
        scale = exact.value[finite].abs() + 0.1
        for name, side in (("value", merged[0]), ("eager value", merged[1])):
            worst[name] = error(side.value[finite], exact.value[finite], scale) / TOLERANCE

    q, p = exact.q, exact.p
    slope_sum = torch.linspace(-0.5, 0.5, ROWS, dtype=torch.float64)
    scalars = torch.stack([q.maximum, q.log_z, q.log_z_at_1, p.maximum, p.log_z, slope_sum])
    of_divergence = torch.linspace(0.5, 1.5, ROWS)
    of_divergence[0] = 0.0
    of_cross_entropy = torch.tensor(0.25).expand(ROWS)
    student[7, 5], teacher[7, 6] = math.nan, math.inf  # of no weight
    of_divergence[7] = 0.0
    weights = [(of_divergence, None)]
    if labels is not None:
        labels[7] = -1
        weights += [(of_divergence, of_cross_entropy), (None, of_cross_entropy)]
    for pair in weights:
        outs = [student.new_full((ROWS, student.stride(0) + 1), 7.0) for _ in range(2)]
        for side, out in zip((kernel, eager), outs, strict=True):
            side.local_gradient(
                out[:, : student.shape[1]],
                *(student, teacher, labels, FIRST_COLUMN, divergence, temperature, torch.float32, scalars, *pair),
            )
        assert (outs[0][:, student.shape[1] :] == 7.0).all()
        got, wanted = (out[:, : student.shape[1]] for out in outs)
        assert (got[7] == 0).all() and (wanted[7] == 0).all()
        # Half a unit in the last place of the dtype written, where the two are rounded apart.
        allowed = TOLERANCE * row_scale(wanted) + torch.finfo(got.dtype).eps * wanted.double().abs().nan_to_num()
        if got.dtype == torch.float16:
            allowed = allowed + 6e-8  # its smallest step
        worst["gradient"] = max(worst.get("gradient", 0.0), error(got, wanted, allowed))
    return worst


def special(kernel):
    """What does not depend on a setting, by name: whether it holds."""
    divergence = AlphaBeta(0.2, 0.7)
    layout = Layout(divergence, True, 1.0)
    student, teacher = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([1, 2, 3])
    student[0, 1], teacher[1, 0] = math.nan, math.inf
    got, wanted = (
        side.local_record(student, teacher, labels, 0, divergence, layout, torch.float32) for side in (kernel, eager)
    )
    got[layout.student.start + 3, 0] = wanted[layout.student.start + 3, 0]  # the id of a NaN maximum means nothing
    no_columns = [
        side.local_record(student[:, :0], teacher[:, :0], labels, 0, divergence, layout, torch.float32)
        for side in (kernel, eager)
    ]
    one = torch.randn(2, 700, generator=torch.Generator().manual_seed(0))
    layout = Layout(divergence, False, 3.0)
    same = kernel.local_record(one, one.clone(), None, 0, divergence, layout, torch.float32)
    return {
        "nan and inf logits": torch.allclose(got, wanted, rtol=1e-5, equal_nan=True),
        "no columns": torch.equal(*no_columns),
        "equal models": same[layout.sums][1:].eq(0.0).all().item(),
    }


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
    assert len(found) >= 4
    for kernel, used in found.items():
        assert used["registers"] <= 128, (kernel, used)
        assert used["local"] == 0, (kernel, used)


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
    if mode == "refuse":
        return refusals()
    import abkd_megatron.kernels.triton as kernel

    names = itertools.product(DIVERGENCES, SETTINGS)
    compared = {f"{name}, {setting}": compare(kernel, DIVERGENCES[name], setting) for name, setting in names}
    return {"compared": compared, "special": special(kernel)}


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
