"""The Triton kernels give what the eager ones do, and compile for the GPUs they are meant for.

No GPU is needed: the comparisons run in Triton's interpreter, the compiler without a device. Both run in processes of
their own, since Triton reads its environment once.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import sass
import torch
from kernel_cases import DIVERGENCES, OTHERS, SETTINGS, compare, hard, special, vectors

from abkd_megatron import AlphaBeta, ToDi
from abkd_megatron.errors import ConfigError, HostError
from abkd_megatron.kernels.record import Layout
from abkd_megatron.losses import JensenShannon, SkewForwardKL, SkewReverseKL, TotalVariation, WeightedSum

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

ALL = DIVERGENCES | OTHERS
# The interpreter is slow: every divergence once, a few in all settings, and only some of these in the shorter suites.
CASES = [(name, "strided at T=2") for name in ALL]
CASES += [
    (name, setting) for name in ("ab(0.2,0.7)", "todi", "nested sum") for setting in SETTINGS if setting[0] != "s"
]
SHORT = [(name, "strided at T=2") for name in ("ab(1,0)", "ab(0,0)", "todi", "js", "nested sum", "sum of ab")]
SHORT += [("ab(0.2,0.7)", setting) for setting in ("plain", "bf16")]
HARD = [(name, 1.0, 1) for name in ("ab(0.2,0.7)", "ab(0.9,0.01)", "ab(1,0)", "ab(0,1)", "todi", "js", "sum of ab")]
HARD += [("ab(0.2,0.7)", 2.0, 3), ("todi", 3.0, 3)]

# Losses whose kernels are compiled, and instructions per logit that they may take on any of ARCHITECTURES with labels,
# at T = 1, in bf16: for the record, the second record if there is one, and the gradient.
BUDGET = {
    "ab(0.2,0.7)": (AlphaBeta(0.2, 0.7), 74, None, 50),
    "ab(1,0)": (AlphaBeta(1.0, 0.0), 66, None, 50),
    "ab(0,1)": (AlphaBeta(0.0, 1.0), 66, None, 40),
    "ab(1.2,-0.3)": (AlphaBeta(1.2, -0.3), None, None, 50),
    "todi": (ToDi(), 100, 53, 61),
    "js": (JensenShannon(), 28, 157, 107),
    "skew": (SkewForwardKL(), 28, 127, 66),
    "skew reverse": (SkewReverseKL(), 28, 127, 122),
    "tv": (TotalVariation(), 28, 47, 38),
    "sum": (
        WeightedSum([(1.0, AlphaBeta(0.2, 0.7)), (0.5, AlphaBeta(1.0, 0.0)), (2.0, JensenShannon())]),
        28,
        280,
        147,
    ),
}
ARCHITECTURES = (80, 90, 100)
# (dtype, temperature, labels); columns are no multiple of 16, their stride is.
VARIANTS = [
    (dtype, temperature, labels) for dtype in ("bfloat16", "float32") for temperature in (1.0, 2.0) for labels in (1, 0)
]
COLUMNS, STRIDE, ROWS = 4001, 4096, 16


def without_gpu(arch):
    """Have Triton compile for a GPU that is not there; return the kernels, whose launches return the binary."""
    import triton
    from triton.backends.compiler import GPUTarget

    import abkd_megatron.kernels.triton as kernel

    class Driver:
        """A GPU that is not there."""

        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device: 0)
        get_current_target = staticmethod(lambda: GPUTarget("cuda", arch, 32))

    triton.runtime.driver.set_active(Driver())
    kernel._check = lambda *arguments: None
    launched = {}
    jits = {
        "record": kernel.record_kernel,
        "exact record": kernel.exact_record_kernel,
        "second record": kernel.second_record_kernel,
        "gradient": kernel.gradient_kernel,
    }
    for name, jit in jits.items():
        build = jit.run

        def run(*args, name=name, build=build, **kwargs):
            launched[name] = build(*args, **{**kwargs, "warmup": True}), kwargs

        jit.run = run
    return kernel, jits, launched


def launch(kernel, divergence, dtype, temperature, has_labels, rows=ROWS, columns=COLUMNS, skipped=0):
    """Launch all kernels as a loss does."""
    wide = torch.zeros(3, rows + skipped, STRIDE, dtype=dtype)[:, skipped:, :columns]
    labels = torch.zeros(rows, dtype=torch.int64)[:rows] if has_labels else None
    weight, scalars = torch.ones(rows), torch.zeros(6, rows).double()
    layout = Layout(divergence, has_labels, temperature)
    student, teacher, out = wide
    kernel.local_record(student, teacher, labels, 17 * skipped, divergence, layout, torch.float32)
    if divergence.num_partial_sums == 0 or isinstance(divergence, ToDi):
        asked = divergence.num_partial_sums == 0, True
        kernel.local_second_record(student, teacher, divergence, temperature, torch.float32, scalars[:4], *asked)
    shared = (student, teacher, labels, 17 * skipped, divergence, temperature, torch.float32, scalars, weight)
    kernel.local_gradient(out, *shared, weight if has_labels else None)


def compiled(arch, names, variants):
    """Of each kernel of each loss and variant: `sass.described`, and columns per thread on the path."""
    from triton.runtime.errors import PTXASError

    kernel, _, launched = without_gpu(arch)
    found = {}
    for name in names:
        for dtype, temperature, has_labels in variants:
            launched.clear()
            try:
                launch(kernel, BUDGET[name][0], getattr(torch, dtype), temperature, bool(has_labels))
            except PTXASError as failure:
                return {"refused": str(failure)}
            for which, (binary, options) in launched.items():
                with tempfile.TemporaryDirectory() as folder:
                    of = sass.described(binary.asm["cubin"], folder)
                threads = 32 * options["num_warps"]
                of["columns"] = options.get("EACH") or options["BLOCK"] // threads
                found[f"{name}, {dtype}, T={temperature}, labels={has_labels}, {which}"] = of
    return found


def scheduled():
    """Binaries of each kernel after the first step of a schedule, and after 100 steps in which everything changes."""
    kernel, jits, _ = without_gpu(90)

    def of(step):
        part = step / 99
        a, b = 0.95 - 0.9 * part, 0.02 + 0.9 * part
        return [
            AlphaBeta(a, b),
            ToDi(1.5 + a, detach=False),
            WeightedSum([(0.1 + part, SkewForwardKL(b)), (1 + part, SkewReverseKL(a)), (2 - part, JensenShannon(b))]),
        ]

    def count():
        return {name: sum(len(cache[0]) for cache in jit.device_caches.values()) for name, jit in jits.items()}

    counts = []
    for step in range(100):
        rows = (16, 1, 33, 7)[step % 4]  # ragged micro-batches, first columns and chunks
        for divergence in of(step):
            launch(kernel, divergence, torch.bfloat16, 1.5 + step / 7, True, rows, 4001 - step % 3, step % 5)
        counts.append(count())
    return counts[0], counts[-1]


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
        "parts": refused(WeightedSum([(1.0, AlphaBeta(1.0, 1.0))] * 5), logits, torch.float32),
        "dtype": refused(ToDi(), logits.double(), torch.float64),
        "device": refused(ToDi(), logits, torch.float32),
    }
    for name in [name for name in sys.modules if name.startswith("abkd_megatron.kernels.triton")]:
        del sys.modules[name]
    sys.modules["triton"] = None  # as where it is not installed
    kernel = importlib.import_module("abkd_megatron.kernels.triton")
    found["no triton"] = refused(ToDi(), logits, torch.float32)
    return found


def interpreted(cases, hard_cases):
    """Errors of each case; or why Triton's interpreter does not run here."""
    import abkd_megatron.kernels.triton as kernel

    try:
        specials = special(kernel)
    except TypeError as failure:  # Triton 3.6 converts arrays of one element, which numpy 2.4 rejects
        if "0-dimensional" not in str(failure):
            raise
        return {"skipped": str(failure)}
    return {
        "special": specials,
        "vectors": vectors("triton", "cpu"),
        "compared": {f"{name}, {setting}": compare(kernel, ALL[name], setting) for name, setting in cases},
        "hard": {f"{name}, {T}, {parts}": hard(kernel, ALL[name], T, parts=parts) for name, T, parts in hard_cases},
    }


def run(folder, mode, *arguments, interpret=False):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(folder)}
    environment.pop("TRITON_INTERPRET", None)
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    words = [sys.executable, "-W", "ignore::RuntimeWarning", __file__, mode, json.dumps(arguments)]
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def is_slow(item, short):
    return () if item in short else pytest.mark.slow


def cases(every, short):
    return [pytest.param(*case, marks=is_slow(case, short), id=", ".join(map(str, case))) for case in every]


@pytest.fixture(scope="module")
def found(request, tmp_path_factory):
    """Results of the cases among the tests that were chosen."""
    chosen = {item.callspec.id for item in request.session.items if hasattr(item, "callspec")}
    of = [[case for case in every if ", ".join(map(str, case)) in chosen] for every in (CASES, HARD)]
    results = run(tmp_path_factory.mktemp("triton"), "interpreted", *of, interpret=True)
    if "skipped" in results:
        pytest.skip(f"this Triton's interpreter does not run with this numpy: {results['skipped']}")
    return results


def test_vectors(found):
    assert len(found["vectors"]) > 30
    assert all(number <= 1.0 for of_row in found["vectors"].values() for number in of_row), found["vectors"]


@pytest.mark.parametrize(("name", "setting"), cases(CASES, SHORT))
def test_equals_eager(found, name, setting):
    worst = found["compared"][f"{name}, {setting}"]
    assert set(worst) >= {"record", "gradient"}
    assert all(number <= 1.0 for number in worst.values()), worst


@pytest.mark.parametrize(("name", "temperature", "parts"), cases(HARD, HARD[:1]))
def test_late_maxima_ramps_and_uneven_shards(found, name, temperature, parts):
    worst = found["hard"][f"{name}, {temperature}, {parts}"]
    assert all(number <= 1.0 for number in worst.values()), worst


@pytest.mark.parametrize("name", ["nan and inf logits", "no columns", "equal models"])
def test_special_rows(found, name):
    assert found["special"][name]


def check_budget(results, most_local):
    if "refused" in results:
        pytest.skip(f"this Triton's ptxas does not compile for it: {results['refused']}")
    for case, of in results.items():
        name, dtype, temperature, _, which = case.split(", ")
        _, *limits = BUDGET[name]
        limit = dict(zip(("record", "second record", "gradient"), limits, strict=True)).get(which)
        assert of["local"] <= most_local, (case, of)
        assert "LDG.E.128" in of["loads"], (case, of)
        assert which != "gradient" or "STG.E.128" in of["stores"], (case, of)
        if which != "exact record":  # of rows that are not finite, or outside of alpha, beta >= 0
            limit += 16 * (temperature != "T=1.0") + 10 * (dtype == "float32")
            assert of["instructions"] / of["columns"] <= limit, (case, of["instructions"] / of["columns"])


@pytest.mark.parametrize("name", BUDGET)
def test_budget(name, tmp_path):
    check_budget(run(tmp_path, "compiled", 90, [name], VARIANTS[:1]), most_local=8)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", BUDGET)
def test_budget_of_every_variant(name, arch, tmp_path):
    check_budget(run(tmp_path, "compiled", arch, [name], VARIANTS), most_local=32)


def test_a_schedule_compiles_nothing(tmp_path):
    first, last = run(tmp_path, "scheduled")
    assert first == last and all(first.values())


def test_says_where_it_cannot_run(tmp_path):
    found = run(tmp_path, "refusals")
    kinds = ["ConfigError", "ConfigError", "ConfigError", "HostError", "HostError"]
    assert [kind for kind, _ in found.values()] == kinds
    for _, message in found.values():
        assert "choose the eager kernel" in message
    assert "Mine(alpha=0.2, beta=0.7)" in found["divergence"][1] and "torch.float64" in found["dtype"][1]
    assert "pip install triton" in found["no triton"][1]


if __name__ == "__main__":
    modes = {"interpreted": interpreted, "compiled": compiled, "scheduled": scheduled, "refusals": refusals}
    print(json.dumps(modes[sys.argv[1]](*json.loads(sys.argv[2]))))
