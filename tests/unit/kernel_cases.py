"""Logits that a kernel has to take as the eager one does, and how far apart the two are."""

import itertools
import math

import torch

from abkd_megatron import AlphaBeta, ToDi, kernels
from abkd_megatron.kernels import eager
from abkd_megatron.kernels.record import Layout
from abkd_megatron.losses import JensenShannon, SkewForwardKL, SkewReverseKL, TotalVariation, WeightedSum
from abkd_megatron.losses.combination import neyman_chi_square, pearson_chi_square
from abkd_megatron.vocab_parallel.stats import conclude, merge

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
OTHERS = {
    "ab(0.01,0.9)": AlphaBeta(0.01, 0.9),
    "ab(0.9,0.01)": AlphaBeta(0.9, 0.01),
    "chi-square": pearson_chi_square(),
    "chi-square, reversed": neyman_chi_square(),
    "js": JensenShannon(),
    "js 0.1": JensenShannon(0.1),
    "skew": SkewForwardKL(),
    "skew reverse": SkewReverseKL(),
    "skew reverse detached": SkewReverseKL(0.3, detach_mixture=True),
    "tv": TotalVariation(),
    "sum of ab": WeightedSum([(0.5, AlphaBeta(0.2, 0.7)), (2.0, AlphaBeta(1.0, 0.0)), (1.0, AlphaBeta(1.2, -0.3))]),
    "sum with todi": WeightedSum([(0.5, AlphaBeta(0.2, 0.7)), (2.0, ToDi())]),
    "nested sum": WeightedSum(
        [(0.5, WeightedSum([(2.0, SkewForwardKL(0.3)), (1.0, TotalVariation())])), (1.0, AlphaBeta(0.0, 1.0))]
    ),
}
# (student's dtype, teacher's dtype, labels, temperature, columns, columns between the rows)
SETTINGS = {
    "plain": (torch.float32, torch.float32, True, 1.0, 1499, 1499),
    "strided at T=2": (torch.float32, torch.float32, True, 2.0, 1281, 1500),
    "unlabelled at T=2": (torch.float32, torch.float32, False, 2.0, 1024, 1024),
    "bf16": (torch.bfloat16, torch.bfloat16, True, 1.0, 1025, 1100),
    "bf16 of fp32": (torch.bfloat16, torch.float32, True, 1.0, 530, 530),
    "mixed": (torch.float16, torch.float32, False, 1.0, 7, 9),
}
FIRST_COLUMN, ROWS = 300, 8
TOLERANCE = 1e-5


def logits(dtype, columns, stride, generator, device):
    wide = torch.full((ROWS, stride), math.nan, dtype=dtype, device=device)
    wide[:, :columns] = (3 * torch.randn(ROWS, columns, generator=generator)).to(dtype)
    return wide[:, :columns]


def inputs(setting, generator, device):
    student_dtype, teacher_dtype, has_labels, temperature, columns, stride = SETTINGS[setting]
    student = logits(student_dtype, columns, stride, generator, device)
    teacher = logits(teacher_dtype, columns, stride, generator, device)
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
        labels = labels.to(device)
        labels[0], labels[1], labels[5], labels[6] = -1, FIRST_COLUMN + columns, FIRST_COLUMN, FIRST_COLUMN - 1
    return student, teacher, labels, temperature


def error(got, wanted, scale):
    """The largest difference over `scale`; inf if one is not finite where the other is."""
    same = (got == wanted) | (got.isnan() & wanted.isnan())
    difference = (got.double() - wanted.double()).abs() / scale
    return difference.nan_to_num(nan=math.inf).masked_fill(same, 0.0).amax().item()


def row_scale(wanted):
    return wanted.double().abs().nan_to_num(0.0, 0.0, 0.0).amax(dim=-1, keepdim=True).clamp_min(1e-30)


def compare(kernel, divergence, setting, device="cpu"):
    """Errors of record and gradient against eager's, in units of what is allowed."""
    generator = torch.Generator().manual_seed(0)
    student, teacher, labels, temperature = inputs(setting, generator, device)
    layout = Layout(divergence, labels is not None, temperature)
    arguments = (student, teacher, labels, FIRST_COLUMN, divergence, layout, torch.float32)
    got, wanted = kernel.local_record(*arguments), eager.local_record(*arguments)
    # A shard's masses are about 1, and slopes that cancel are known to the rounding of a mass.
    worst = {"record": error(got, wanted, row_scale(wanted).clamp_min(1.0)) / TOLERANCE}
    for model in (layout.student, layout.teacher):
        exact = [model.start, *([model.start + 2, model.start + 3] if labels is not None else [])]
        worst["record"] = max(worst["record"], error(got[exact], wanted[exact], 1e-30))

    in_fp64 = (student.double(), teacher.double(), *arguments[2:-1], torch.float64)
    exact = conclude(eager.local_record(*in_fp64), divergence, layout)
    merged = [conclude(record, divergence, layout) for record in (got, wanted)]
    if exact.value is not None:
        finite = exact.value.isfinite()
        scale = exact.value[finite].abs() + 0.1
        for name, side in (("value", merged[0]), ("eager value", merged[1])):
            worst[name] = error(side.value[finite], exact.value[finite], scale) / TOLERANCE

    q, p = exact.q, exact.p
    if isinstance(divergence, ToDi) or exact.slope_sum is None:
        of_whole = torch.stack([q.maximum, q.log_z, p.maximum, p.log_z])
        inputs_of_second = (student, teacher, divergence, temperature, torch.float32, of_whole)
        for asked in ((True, True), (False, True), (True, False)):
            got, wanted = (side.local_second_record(*inputs_of_second, *asked) for side in (kernel, eager))
            assert got.shape == wanted.shape == (sum(asked), ROWS)
            scale = wanted.abs().nan_to_num(0.0, 0.0, 0.0).clamp_min(1.0)
            worst["second record"] = max(worst.get("second record", 0.0), error(got, wanted, scale) / TOLERANCE)
    slope_sum = torch.linspace(-0.5, 0.5, ROWS, dtype=torch.float64, device=device)
    scalars = torch.stack([q.maximum, q.log_z, q.log_z_at_1, p.maximum, p.log_z, slope_sum])
    of_divergence = torch.linspace(0.5, 1.5, ROWS, device=device)
    of_divergence[0] = 0.0
    of_cross_entropy = torch.tensor(0.25, device=device).expand(ROWS)
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
        in_place = student.clone(memory_format=torch.contiguous_format)
        kernel.local_gradient(
            in_place,
            *(in_place, teacher, labels, FIRST_COLUMN, divergence, temperature, torch.float32, scalars, *pair),
        )
        torch.testing.assert_close(in_place, outs[0][:, : student.shape[1]], rtol=0, atol=0, equal_nan=True)
        assert (outs[0][:, student.shape[1] :] == 7.0).all()
        got, wanted = (out[:, : student.shape[1]] for out in outs)
        assert (got[7] == 0).all() and (wanted[7] == 0).all()
        # Half a unit in the last place of the dtype written, where the two are rounded apart.
        allowed = TOLERANCE * row_scale(wanted) + torch.finfo(got.dtype).eps * wanted.double().abs().nan_to_num()
        if got.dtype == torch.float16:
            allowed = allowed + 6e-8  # its smallest step
        worst["gradient"] = max(worst.get("gradient", 0.0), error(got, wanted, allowed))
    return worst


def special(kernel, device="cpu"):
    """What does not depend on a setting, by name: whether it holds."""
    divergence = AlphaBeta(0.2, 0.7)
    layout = Layout(divergence, True, 1.0)
    student, teacher = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)).to(device)
    labels = torch.tensor([1, 2, 3], device=device)
    student[0, 1], teacher[1, 0] = math.nan, math.inf
    got, wanted = (
        side.local_record(student, teacher, labels, 0, divergence, layout, torch.float32) for side in (kernel, eager)
    )
    got[layout.student.start + 3, 0] = wanted[layout.student.start + 3, 0]  # the id of a NaN maximum means nothing
    no_columns = [
        side.local_record(student[:, :0], teacher[:, :0], labels, 0, divergence, layout, torch.float32)
        for side in (kernel, eager)
    ]
    one = torch.randn(2, 700, generator=torch.Generator().manual_seed(0)).to(device)
    layout = Layout(divergence, False, 3.0)
    same = kernel.local_record(one, one.clone(), None, 0, divergence, layout, torch.float32)
    return {
        "nan and inf logits": torch.allclose(got, wanted, rtol=1e-5, equal_nan=True),
        "no columns": torch.equal(*no_columns),
        "equal models": same[layout.sums][1:].eq(0.0).all().item(),
    }


RAMP, PEAK = 60.0, 40.0


def hard_pairs(columns, generator):
    """Logits with maxima that rise late or often, [7, columns] each."""
    student, teacher = 2 * torch.randn(2, 7, columns, generator=generator)
    ramp = torch.linspace(-RAMP, RAMP, columns)
    student[0, -1] = PEAK  # in the last, ragged tile
    teacher[1, columns // 2] = PEAK
    student[2] += ramp
    teacher[2] += ramp
    student[3] += ramp
    teacher[3] -= ramp
    student[4, 0] = teacher[4, 0] = PEAK  # at once, and nothing comes near it
    student[5] += 300.0
    teacher[5] -= 200.0
    student[6] = teacher[6] = teacher[6] + ramp
    return student, teacher


def hard(kernel, divergence, temperature, columns=2100, parts=1, device="cpu"):
    """Errors of the loss on `hard_pairs` against fp64, in units of 1e-6 + 1e-5 of it; over uneven shards, one empty."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (logits.to(device) for logits in hard_pairs(columns, generator))
    labels = torch.randint(0, columns, (7,), generator=generator).to(device)
    layout = Layout(divergence, True, temperature)
    bounds = [0, columns] if parts == 1 else [0, columns // 2 + 1, columns - 1, columns - 1, columns]

    def of(side, dtype):
        shards = [slice(start, end) for start, end in itertools.pairwise(bounds)]
        pairs = [(student[:, shard].to(dtype), teacher[:, shard].to(dtype)) for shard in shards]
        records = [
            side.local_record(*pair, labels, shard.start, divergence, layout, dtype)
            for pair, shard in zip(pairs, shards, strict=True)
        ]
        whole = conclude(merge(torch.stack(records), divergence, layout), divergence, layout)
        if whole.value is not None:
            return whole, whole.value
        scalars = torch.stack([whole.q.maximum, whole.q.log_z, whole.p.maximum, whole.p.log_z])
        second = [
            side.local_second_record(*pair, divergence, temperature, dtype, scalars, True, False) for pair in pairs
        ]
        return whole, torch.stack(second).sum(dim=0)[0]

    (got, value), (wanted, exact) = of(kernel, torch.float32), of(eager, torch.float64)
    for one, other in ((got.q, wanted.q), (got.p, wanted.p)):
        assert torch.equal(one.maximum, other.maximum) and torch.equal(one.top, other.top)
        assert torch.equal(one.target, other.target)
    assert value[6] == 0.0 and all(numbers[6].isfinite() for numbers in got.metrics)
    worst = {"value": ((value - exact).abs() / (1e-6 + 1e-5 * exact.abs())).max().item()}
    for one, other in ((got.q, wanted.q), (got.p, wanted.p)):
        worst["log_z"] = max(worst.get("log_z", 0.0), (one.log_z - other.log_z).abs().max().item() / 1e-6)
    for name, one, other in zip(("kl", "entropy p", "entropy q"), got.metrics, wanted.metrics, strict=True):
        worst[name] = ((one - other).abs() / (1e-6 + 1e-5 * other.abs())).max().item()
    return worst


def vectors(kernel, device):
    """Errors of fp32 losses and gradients against the 60-digit values of vectors.json, relative to their limits."""
    import test_divergences as exact

    kernels.use(kernel)
    found = {}
    for (row, divergence), name in zip(exact.ROWS, exact.ROW_IDS, strict=True):
        student, teacher = (
            torch.tensor(logits, dtype=torch.float32, device=device) for logits in exact.PAIRS[row["pair"]]
        )
        value, gradient = (of.double().cpu() for of in exact.fast(student, teacher, divergence))
        loss, slope = (torch.tensor(row[key], dtype=torch.float64) for key in ("loss", "grad"))
        largest = slope.abs().amax(dim=-1, keepdim=True)
        of_loss = ((value - loss).abs() / (1e-6 + 1e-5 * loss)).max().item()
        found[name] = [of_loss, ((gradient - slope).abs() / (1e-5 * largest)).max().item()]
    return found
