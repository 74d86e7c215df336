"""The Triton kernels that merge records give what eager gives, and a GPU is asked for few launches.

No GPU is needed: both run in Triton's interpreter, in processes of their own, since Triton reads its environment once.
"""

import importlib.util
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from kernel_cases import DIVERGENCES, FIRST_COLUMN, SETTINGS, inputs
from launches import Launches
from torch.testing._internal.distributed import fake_pg

from abkd_megatron import AlphaBeta, ToDi, kernels
from abkd_megatron.kernels import eager
from abkd_megatron.kernels.record import Layout, view
from abkd_megatron.losses import JensenShannon
from abkd_megatron.losses.combination import WeightedSum, neyman_chi_square
from abkd_megatron.vocab_parallel import (
    VocabShard,
    stats,
    vocab_parallel_distillation,
    vocab_parallel_distillation_head,
)
from abkd_megatron.vocab_parallel.terms import METRICS, Terms

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

RANKS = (1, 2, 3, 8)
MORE = {
    "ab(-0.4,0.9)": AlphaBeta(-0.4, 0.9),
    "ab(0.3,-1.1)": AlphaBeta(0.3, -1.1),
    "ab(2,-2)": AlphaBeta(2.0, -2.0),
    "neyman": neyman_chi_square(),
    "sum": WeightedSum([(0.25, ToDi(detach=False)), (2.0, WeightedSum([(0.5, AlphaBeta(0.2, 0.7))]))]),
    "sum with detached todi": WeightedSum([(0.5, ToDi()), (1.0, AlphaBeta(1.0, 0.0))]),
    "js": JensenShannon(),
}
EVERY = {**DIVERGENCES, **MORE}
LOSSES = {
    "ab(0.2,0.7)": AlphaBeta(0.2, 0.7),
    "ab(1.2,-0.3)": AlphaBeta(1.2, -0.3),
    "todi": ToDi(),
    "js": JensenShannon(),
    "sum": WeightedSum([(0.5, AlphaBeta(1.0, 0.0)), (1.0, AlphaBeta(0.2, 0.7)), (2.0, JensenShannon())]),
    "sum of ab": WeightedSum([(0.5, AlphaBeta(1.0, 0.0)), (1.0, AlphaBeta(0.2, 0.7)), (2.0, AlphaBeta(0.0, 1.0))]),
}
SHORT = ("ab(0.2,0.7)", "todi", "ab(0.3,-1.1)", "sum", "js")
TOKENS, WIDTH, HIDDEN = 2, 72, 8
# Relative; of H, whose terms cancel, relative to the sum of their magnitudes or that of q^lam, if larger.
SCALARS = 1e-14


def gathered(divergence, layout, student, teacher, labels, ranks):
    """The records of `ranks` shards, the last but one of which is empty; of fp32 logits, in fp64."""
    bounds = [round(student.shape[1] * (at / ranks) ** 1.5) for at in range(ranks + 1)]
    if ranks > 2:
        bounds[-2] = bounds[-3]
    return torch.stack(
        [
            eager.local_record(
                student[:, first:end],
                teacher[:, first:end],
                labels,
                FIRST_COLUMN + first,
                divergence,
                layout,
                torch.float32,
            )
            for first, end in itertools.pairwise(bounds)
        ]
    )


def cases():
    """Rows of all settings, fp32, and their labels; narrower ones continue with columns that both models exclude."""
    width = max(columns for *_, columns, _ in SETTINGS.values())
    found = []
    for at, setting in enumerate(SETTINGS):
        student, teacher, labels, _ = inputs(setting, torch.Generator().manual_seed(at), "cpu")
        student[7, 5], teacher[7, 6] = (math.nan, 0.5) if at % 2 else (0.5, math.inf)
        if labels is None:
            labels = torch.full((len(student),), FIRST_COLUMN + 2)
        wide = [torch.full((len(student), width), -math.inf) for _ in range(2)]
        for of, logits in zip(wide, (student, teacher), strict=True):
            of[:, : logits.shape[1]] = logits
        found.append((*wide, labels))
    student, teacher, labels = (torch.cat(of) for of in zip(*found, strict=True))
    return student, teacher, labels


def relative(got, wanted, scale):
    same = (got == wanted) | (got.isnan() & wanted.isnan())
    difference = (got - wanted).abs() / scale
    return difference.nan_to_num(nan=math.inf).masked_fill(same, 0.0).amax().item()


def units(got, wanted):
    """The largest difference of fp32 numbers, in units of the last place of the wanted one."""
    same = (got == wanted) | (got.isnan() & wanted.isnan())
    unit = torch.nextafter(wanted.abs(), torch.full_like(wanted, math.inf)) - wanted.abs()
    return ((got - wanted).abs() / unit).nan_to_num(nan=math.inf).masked_fill(same, 0.0).amax().item()


def compare(divergence, labeled, temperature, ranks):
    """The largest error of scalars, terms and loss against eager's, and whether what is known matches."""
    from abkd_megatron.kernels import triton_merge

    layout = Layout(divergence, labeled, temperature)
    student, teacher, labels = cases()
    labels = labels if labeled else None
    records = gathered(divergence, layout, student, teacher, labels, ranks)
    num_tokens = records.shape[-1]
    whole = stats.merge(records, divergence, layout) if ranks > 1 else records[0].clone()
    exact = stats.conclude(whole, divergence, layout)
    q, p = exact.q, exact.p
    assert triton_merge.can_merge(divergence)
    wide = torch.full((2 + len(METRICS) if labeled else 1, num_tokens + 3), 7.0)
    wanted, got = Terms(wide[:, :num_tokens].clone()), Terms(wide[:, :num_tokens])
    losses = [torch.full((num_tokens,), 7.0) for _ in range(2)] if labeled else [None, None]
    wanted, got = (
        Terms(of.terms, None, True, loss, (0.3, 0.6)) for of, loss in zip((wanted, got), losses, strict=True)
    )
    scalars, has_value, has_slope = triton_merge.conclude(records, labels, divergence, layout, **vars(got))
    assert (has_value, has_slope) == (exact.value is not None, exact.slope_sum is not None)
    value, slope = exact.value, exact.slope_sum
    if not (has_value and has_slope):  # as of a second record
        second = torch.rand(ranks, (not has_value) + 1, num_tokens, dtype=torch.float64)
        value, slope = value if has_value else second.sum(dim=0)[0], second.sum(dim=0)[-1]
        triton_merge.finish(second, scalars, **vars(got), has_value=not has_value, has_slope=True)
    wanted.write(value, exact, labels)
    expected = torch.stack([q.maximum, q.log_z, q.log_z_at_1, p.maximum, p.log_z, slope])
    assert torch.equal(scalars[[6, 7, 8, 9]].nan_to_num(), scalars[[0, 1, 3, 4]].nan_to_num())
    assert (wide[:, num_tokens:] == 7.0).all()
    dense = view(student.double(), teacher.double(), (q.maximum, q.log_z), (p.maximum, p.log_z), temperature)
    masses = [dense.log_q.exp(), *divergence.partial_sums(*dense[:3])[::3], divergence.grad_log_q(*dense[:3]).abs()]
    scale = torch.stack([mass.masked_fill(dense.outside, 0.0).sum(dim=-1) for mass in masses]).amax(dim=0)
    return {
        "maxima": relative(scalars[[0, 3]], expected[[0, 3]], 0.0),
        "log_z": relative(scalars[[1, 2, 4]], expected[[1, 2, 4]], expected[[1, 2, 4]].abs()) / SCALARS,
        "H": relative(scalars[5], expected[5], scale) / SCALARS,
        "terms": units(got.terms, wanted.terms),
        "loss": units(got.loss, wanted.loss) if labeled else 0.0,
    }


def compared(*names):
    """By name and number of ranks: the errors, in one of the four layouts."""
    layouts, found = list(itertools.product((True, False), (1.0, 2.0))), {}
    for name in names:
        for at, ranks in enumerate(RANKS):
            layout = layouts[(list(EVERY).index(name) + at) % 4]
            found[f"{name}, {ranks}"] = compare(EVERY[name], *layout, ranks)
    return found


def whole_losses():
    """The largest differences of results and gradients of whole losses on one rank, relative to their largest."""
    found = {}
    for name, select in itertools.product(LOSSES, (False, True)):
        of = {}
        for kernel in ("eager", "triton"):
            with kernels.using(kernel):
                of[kernel] = results(LOSSES[name], select)
        for what, got in of["triton"].items():
            wanted = of["eager"][what]
            error = (got - wanted).abs().amax() / wanted.abs().amax()
            found[f"{name}, {'selected' if select else 'all'}, {what}"] = error.nan_to_num(nan=math.inf).item()
    return found


def results(divergence, select):
    generator = torch.Generator().manual_seed(0)
    tokens = 6
    hidden, of_teacher = torch.randn(2, tokens, HIDDEN, generator=generator)
    weight, of_teachers = torch.randn(2, WIDTH, HIDDEN, generator=generator)
    labels = torch.randint(-1, WIDTH - 8, (tokens,), generator=generator)
    shard = VocabShard.megatron(WIDTH, None, WIDTH - 8)
    selected = torch.arange(tokens) % 3 != 1 if select else None
    student, teacher = hidden @ weight.t(), of_teacher @ of_teachers.t()
    student.requires_grad_()
    of_selected = teacher if selected is None else teacher[selected]
    terms = vocab_parallel_distillation(student, of_selected, divergence, labels, shard, 2.0, selected=selected)
    (terms.divergence + 0.5 * terms.cross_entropy).sum().backward()
    hidden.requires_grad_(), weight.requires_grad_()
    loss, of_head = vocab_parallel_distillation_head(
        *(hidden, weight, of_teacher, of_teachers, divergence, labels, shard),
        **{"lm_weight": 0.5, "temperature": 2.0, "chunk_tokens": 4, "token_weights": labels + 1, "selected": selected},
    )
    (loss * (labels + 1)).sum().backward()
    every = [torch.stack([it.divergence, it.cross_entropy, *it.metrics.values()]).detach() for it in (terms, of_head)]
    return {
        "terms": every[0],
        "gradient": student.grad,
        "loss of the head": loss.detach(),
        "terms of the head": every[1],
        "gradient of hidden": hidden.grad,
        "gradient of the weight": weight.grad,
    }


def launches(*numbers):
    """By loss and number of ranks, see `count`."""
    kernels.use("triton")
    dist.Backend.register_backend("silent", fake_pg._create_fake_pg, extended_api=True, devices=["cpu"])
    found = {}
    for ranks in map(int, numbers):
        group = None
        if ranks > 1:
            dist.init_process_group("silent", store=fake_pg.FakeStore(), rank=0, world_size=ranks)
            group = dist.group.WORLD
        shard = VocabShard.megatron(WIDTH, group, WIDTH * ranks if ranks > 1 else WIDTH - 8)
        for name, divergence in LOSSES.items():
            found[f"{name}, {ranks}"] = count(divergence, shard)
        selected = torch.arange(TOKENS) % 2 == 0
        found[f"selected, {ranks}"] = of_logits(AlphaBeta(0.2, 0.7), shard, selected)
        if ranks > 1:
            dist.destroy_process_group()
    return found


def counted(forward):
    """Launches of `forward`, which returns losses per token, and of their backward."""
    with Launches() as of_forward:
        losses = forward()
    gradients = [torch.ones(TOKENS) for _ in losses]
    with Launches() as of_backward:
        torch.autograd.backward(losses, gradients)
    return of_forward.total, of_backward.total


def leaf(*shape):
    return torch.randn(shape).requires_grad_()


def of_logits(divergence, shard, selected=None):
    """Launches of a loss of materialized logits, forward and backward."""
    labels = torch.zeros(TOKENS, dtype=torch.int64)
    student, teacher = leaf(TOKENS, WIDTH), torch.randn(TOKENS if selected is None else int(selected.sum()), WIDTH)

    def forward():
        terms = vocab_parallel_distillation(student, teacher, divergence, labels, shard, selected=selected)
        return terms.divergence, terms.cross_entropy

    return counted(forward)


def of_head(divergence, shard, chunks, weights):
    """Launches of a fused head with this number of chunks."""
    operands = leaf(TOKENS, HIDDEN), leaf(WIDTH, HIDDEN), torch.randn(TOKENS, HIDDEN), torch.randn(WIDTH, HIDDEN)
    labels = torch.zeros(TOKENS, dtype=torch.int64)
    how = {"token_weights": weights, "chunk_tokens": TOKENS // chunks}
    return counted(lambda: vocab_parallel_distillation_head(*operands, divergence, labels, shard, **how)[:1])


def count(divergence, shard):
    """Launches, forward and backward: of logits, and per chunk of the head without and with token weights."""
    found = [of_logits(divergence, shard)]
    for weights in (None, torch.ones(TOKENS)):
        one, two = (of_head(divergence, shard, chunks, weights) for chunks in (1, 2))
        found.append([more - fewer for more, fewer in zip(two, one, strict=True)])
    return found


def compiled(arch):
    """Bytes of local memory of the kernels, compiled for a GPU that is not there, at 8 ranks; and numbers of binaries
    after launches that differ in coefficients, weights, temperature and tokens."""
    import sass
    from test_triton import without_gpu

    without_gpu(int(arch))
    from abkd_megatron.kernels import triton_merge

    binaries, found = [], {}
    jits = {"conclude": triton_merge._conclude_kernel, "finish": triton_merge._finish_kernel}
    for jit in jits.values():
        build = jit.run
        jit.run = lambda *args, build=build, **kwargs: binaries.append(build(*args, **{**kwargs, "warmup": True}))

    def launch(divergence, temperature, num_tokens):
        layout = Layout(divergence, True, temperature)
        terms, loss = torch.zeros(2 + len(METRICS), num_tokens), torch.zeros(num_tokens)
        how = {"rows": torch.arange(num_tokens), "loss": loss, "weights": (temperature, 1.0)}
        records = torch.zeros(8, layout.size, num_tokens).double()
        labels = torch.zeros(num_tokens, dtype=torch.int64)
        scalars, *_ = triton_merge.conclude(records, labels, divergence, layout, terms, **how)
        triton_merge.finish(records[:, :2].contiguous(), scalars, terms, **how, has_value=True, has_slope=True)

    for step in range(10):
        launch(AlphaBeta(0.9 - step / 10, step / 4 - 0.5), 1.5 + step, (48, 1, 33)[step % 3])
    for name, jit in jits.items():
        found[f"{name} binaries"] = sum(len(cache[0]) for cache in jit.device_caches.values())
    with tempfile.TemporaryDirectory() as folder:
        for name, binary in zip(jits, binaries[:2], strict=True):
            found[f"{name} local"] = sass.described(binary.asm["cubin"], folder)["local"]
    return found


def run(mode, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1"}
    if mode == "compiled":
        del environment["TRITON_INTERPRET"]
    command = [sys.executable, "-W", "ignore", __file__, mode, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if "only 0-dimensional arrays" in done.stderr:  # Triton 3.6 with numpy 2.4
        pytest.skip("this Triton's interpreter does not run with this numpy")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "name", [name if name in SHORT else pytest.param(name, marks=pytest.mark.slow) for name in EVERY]
)
def test_equals_eager(name):
    found = run("compared", name)
    assert set(found) == {f"{name}, {ranks}" for ranks in RANKS}
    for errors in found.values():
        assert errors["maxima"] == 0.0
        assert all(error <= 1.0 for error in errors.values()), found


def test_whole_losses_equal_eager():
    errors = run("whole_losses")
    assert len(errors) == 2 * 6 * len(LOSSES)
    assert all(error <= 1e-5 for error in errors.values()), errors


@pytest.mark.parametrize(
    "arch", [90, pytest.param(80, marks=pytest.mark.slow), pytest.param(100, marks=pytest.mark.slow)]
)
def test_compiles_once_for_any_numbers(arch):
    found = run("compiled", str(arch))
    assert found == {"conclude binaries": 1, "finish binaries": 1, "conclude local": 0, "finish local": 0}


@pytest.mark.parametrize("numbers", [(1, 8), pytest.param((2,), marks=pytest.mark.slow)])
def test_launches_are_few(numbers):
    """Collectives included; matrix products of the head are not."""
    found = run("launches", *map(str, numbers))
    for ranks in numbers:
        for name in LOSSES:
            materialized, of_chunk, (in_forward, later) = found[f"{name}, {ranks}"]
            for forward, backward in (materialized, of_chunk):
                assert 2 <= forward <= 6 and 1 <= backward <= 3, (name, ranks, forward, backward)
            assert in_forward <= 6 + 3 and later == 0, (name, ranks, in_forward, later)
        # Two sets of tokens: those that are compared, and the others.
        forward, backward = found[f"selected, {ranks}"]
        assert forward <= 2 * 6 and backward <= 3, (ranks, forward, backward)


if __name__ == "__main__":
    modes = {"compared": compared, "whole_losses": whole_losses, "launches": launches, "compiled": compiled}
    print(json.dumps(modes[sys.argv[1]](*sys.argv[2:])))
