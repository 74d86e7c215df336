"""The losses within what torch wraps around tensors: what works gives the same numbers, what cannot raises by name."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import abkd_megatron
from abkd_megatron import AlphaBeta, ToDi, kernels, vocab_parallel_divergence
from abkd_megatron.errors import AbkdError, ConfigError, HostError
from abkd_megatron.kernels import cpp
from abkd_megatron.losses import JensenShannon, registry
from abkd_megatron.losses.reference import reference_divergence
from abkd_megatron.tensors import Function, has_memory
from abkd_megatron.vocab_parallel import (
    VocabShard,
    vocab_parallel_distillation,
    vocab_parallel_distillation_head,
    vocab_parallel_logit_loss,
)
from abkd_megatron.vocab_parallel.diagnostics import diagnose

N, V, H = 6, 40, 5
DIVERGENCES = [AlphaBeta(0.2, 0.7), ToDi(), JensenShannon()]  # one and two rounds, native and eager
needs_compiler = pytest.mark.skipif(not cpp.compiler(), reason="needs a C++ compiler")


def drawn(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), device="cpu").to(dtype)


MASK = torch.ones(N)
LABELS, SHARD = torch.arange(N), VocabShard.megatron(V)
LOGIT_LOSSES = {
    name: registry.build(name, {"top_k": 5} if name == "clipped_kl" else {}) for name in registry.LOGIT_LOSSES
}


def losses(constant=lambda tensor: tensor, student=lambda tensor: tensor, tokens=N):
    """By name, a function to a loss per token and what it is differentiated in, of tensors that are made so."""
    made = {}
    logits = student(drawn(N, V)[:tokens]).requires_grad_()
    teacher, labels, weights = (
        constant(2 * drawn(N, V)[:tokens]),
        constant(LABELS[:tokens]),
        constant(MASK[:tokens]),
    )
    hidden, weight = student(drawn(N, H)[:tokens]).requires_grad_(), student(drawn(V, H)).requires_grad_()
    of_teacher = constant(drawn(N, H + 1)[:tokens]), constant(drawn(V, H + 1))
    for divergence in DIVERGENCES:

        def plain(divergence=divergence):
            return vocab_parallel_divergence(logits, teacher, divergence)

        def distilled(divergence=divergence):
            terms = vocab_parallel_distillation(logits, teacher, divergence, labels, SHARD)
            return terms.divergence + terms.cross_entropy

        def fused(divergence=divergence, **options):
            return vocab_parallel_distillation_head(
                hidden, weight, *of_teacher, divergence, labels, SHARD, chunk_tokens=4, **options
            )[0]

        def fused_in_forward(fused=fused):
            return fused(token_weights=weights)

        made[f"{divergence}"] = plain, (logits,)
        made[f"{divergence} and labels"] = distilled, (logits,)
        made[f"{divergence} fused"] = fused, (hidden, weight)
        made[f"{divergence} fused, in forward"] = fused_in_forward, (hidden, weight)
    for name, loss in LOGIT_LOSSES.items():
        made[name] = (
            (lambda loss=loss: vocab_parallel_logit_loss(logits, teacher, loss, SHARD, drawn=labels)),
            (logits,),
        )
    return made


def values(made):
    found = {}
    for name, (call, inputs) in made.items():
        loss = call()
        found[name] = [loss.detach(), *torch.autograd.grad(loss.sum(), inputs)]
    return found


WANTED = values(losses())


def assert_as_wanted(found, **tolerance):
    assert found.keys() == WANTED.keys()
    for name, tensors in found.items():
        for got, wanted in zip(tensors, WANTED[name], strict=True):
            torch.testing.assert_close(
                got.to(wanted.dtype), wanted, msg=lambda text, name=name: f"{name}: {text}", **tolerance
            )


def test_inference_tensors_are_constants():
    def constant(tensor):
        with torch.inference_mode():
            return tensor.clone()

    assert constant(torch.ones(1)).is_inference()
    assert_as_wanted(values(losses(constant)), rtol=0, atol=0)
    selected = constant(LABELS > 2)
    student = drawn(N, V).requires_grad_()
    terms = vocab_parallel_distillation(
        student, constant(drawn(N, V))[selected], ToDi(), LABELS, SHARD, selected=selected
    )
    terms.divergence.sum().backward()
    counted = constant(LABELS > 2)
    vocab_parallel_logit_loss(
        student, constant(drawn(N, V)), LOGIT_LOSSES["akl"], SHARD, counted=counted
    ).sum().backward()


def test_a_trunk_in_inference_mode_trains_its_head():
    with torch.inference_mode():
        hidden = drawn(N, H)
    weight = drawn(V, H).requires_grad_()
    for token_weights in (None, torch.ones(N)):
        loss, _ = vocab_parallel_distillation_head(
            hidden, weight, hidden, drawn(V, H), ToDi(), LABELS, SHARD, token_weights=token_weights
        )
        assert torch.autograd.grad(loss.sum(), weight)[0].abs().sum() > 0


def test_hidden_losses_take_constants_of_inference_mode():
    hidden = pytest.importorskip("abkd_megatron.student.hidden", exc_type=ImportError)
    with torch.inference_mode():
        teacher = drawn(N, H)
    for kind in ("mse", "cosine"):
        student = (2 * drawn(N, H) + 1).requires_grad_()
        loss = hidden.hidden_distance(kind, student, teacher)
        (gradient,) = torch.autograd.grad(loss.sum(), student, create_graph=True)
        with pytest.raises(ConfigError, match="differentiated once"):
            gradient.square().sum().backward()
        empty = torch.empty(0, H, requires_grad=True)
        hidden.hidden_distance(kind, empty, teacher[:0]).sum().backward()
        assert empty.grad.shape == (0, H)


@pytest.mark.parametrize("name", WANTED)
def test_a_second_derivative_raises(name):
    call, inputs = losses()[name]
    gradients = torch.autograd.grad(call().sum(), inputs, create_graph=True)
    for gradient, wanted in zip(gradients, WANTED[name][1:], strict=True):
        assert torch.equal(gradient.detach(), wanted)
    for gradient in gradients:
        with pytest.raises(ConfigError, match="differentiated once"):
            gradient.square().sum().backward(retain_graph=True)
        # One input at a time, whatever else is differentiated along with it.
        for it in inputs:
            with pytest.raises(ConfigError, match="differentiated once"):
                torch.autograd.grad(it.sum() + gradient.square().sum(), it, retain_graph=True)
    call().sum().backward(create_graph=True)  # unless it is differentiated


def test_every_autograd_function_raises_at_the_second_derivative():
    package = Path(abkd_megatron.__file__).parent
    bare = {
        "_Twice",  # what raises
        "_Add",  # right at any order
        # Of the estimate, which counts.
        *("_NormFunction", "_AttentionFunction", "_MambaFunction", "_DeltaFunction", "_ConvolutionFunction"),
        "_L2NormFunction",
    }
    for source in package.rglob("*.py"):
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.ClassDef) and any(
                ast.unparse(base) == "torch.autograd.Function" for base in node.bases
            ):
                assert node.name in {*bare, "Function"}, (
                    f"{source}: derive {node.name} from abkd_megatron.tensors.Function"
                )
    assert all(function.title for function in Function.__subclasses__())


@pytest.mark.parametrize("tokens", [0, 1])
def test_few_tokens(tokens):
    for name, tensors in values(losses(tokens=tokens)).items():
        assert tensors[0].shape == (tokens,), name
        for gradient, wanted in zip(tensors[1:], WANTED[name][1:], strict=True):
            assert gradient.shape[1:] == wanted.shape[1:] and gradient.isfinite().all()
            if tokens == 0:
                assert not gradient.any()


def test_no_tokens_in_other_shapes():
    for shape in ((0, 3), (3, 0)):
        student, labels = torch.empty(*shape, V, requires_grad=True), torch.empty(shape, dtype=torch.int64)
        selected = torch.empty(shape, dtype=torch.bool)
        terms = vocab_parallel_distillation(student, torch.empty(0, V), ToDi(), labels, SHARD, selected=selected)
        assert terms.divergence.shape == shape and all(it.shape == shape for it in terms.metrics.values())
        hidden = torch.empty(*shape, H, requires_grad=True)
        for options in ({}, {"token_weights": torch.ones(shape)}, {"selected": selected}):
            loss, terms = vocab_parallel_distillation_head(
                hidden, drawn(V, H), hidden.detach(), drawn(V, H), ToDi(), labels, SHARD, **options
            )
            loss.sum().backward()
            assert loss.shape == shape and terms.cross_entropy.shape == shape and hidden.grad.shape == hidden.shape
        nothing = torch.empty(shape)
        found = diagnose(
            student, student.detach(), lambda it: it.sum(-1), accuracy=nothing, confidence=nothing, shard=SHARD
        )
        assert all(it.shape == shape for it in found.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast(dtype):
    def of(tensor):
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    wanted = values(losses(of, of))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = values(losses(of, of))
    for name, tensors in found.items():
        for got, expected in zip(tensors, wanted[name], strict=True):
            assert got.dtype == expected.dtype and torch.equal(got, expected), name


@pytest.mark.parametrize("weights", [None, torch.ones(N)])
def test_hidden_states_of_autocast_go_with_a_weight_of_fp32(weights):
    trunk, weight = torch.nn.Linear(H, H), drawn(V, H).requires_grad_()

    def loss(weight):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = trunk(drawn(N, H))
            assert hidden.dtype == torch.bfloat16
            return vocab_parallel_distillation_head(
                hidden, weight, hidden, drawn(V, H), ToDi(), LABELS, SHARD, token_weights=weights
            )[0]

    inputs = (weight, *trunk.parameters())
    found = torch.autograd.grad(loss(weight).sum(), inputs)
    wanted = torch.autograd.grad(loss(weight.bfloat16()).sum(), inputs)
    for got, expected in zip(found, wanted, strict=True):
        assert got.dtype == torch.float32 and torch.equal(got, expected)


# What has no memory of its own, or is not where it seems to be.


def test_fake_tensors_are_eager():
    with FakeTensorMode():
        for divergence in DIVERGENCES:
            student, teacher = torch.randn(N, V, requires_grad=True), torch.randn(N, V)
            terms = vocab_parallel_distillation(student, teacher, divergence, torch.arange(N), SHARD)
            terms.divergence.sum().backward()
            assert terms.divergence.shape == (N,) and student.grad.shape == (N, V)


@needs_compiler
@pytest.mark.parametrize("divergence", DIVERGENCES[:2], ids=str)
def test_native_code_takes_what_has_memory(divergence):
    student, teacher = drawn(N, V), drawn(N, V + 1)[:, 1:]
    passes = kernels.get("cpp")
    layout = abkd_megatron.kernels.record.Layout(divergence, True, 1.0)

    def record(student=student, teacher=teacher, labels=LABELS):
        return passes.local_record(student, teacher, labels, 0, divergence, layout, torch.float32)

    wanted = record()
    assert torch.equal(record(labels=LABELS.int()), wanted)
    assert torch.equal(record(labels=LABELS.repeat_interleave(2)[::2]), wanted)
    with FakeTensorMode():
        fake = torch.randn(N, V)
    freed = drawn(N, V)
    freed.untyped_storage().resize_(0)
    short = drawn(N, V).as_strided((N, V), (V, 1))
    short.untyped_storage().resize_(16)
    for bad in (fake, torch.randn(N, V, device="meta"), freed, short, torch._neg_view(drawn(N, V))):
        assert not has_memory(bad)
        for how in ({"student": bad}, {"teacher": bad}):
            with pytest.raises(HostError, match="cpp kernel"):
                record(**how)
    for how in (
        {"teacher": drawn(N, V - 1)},
        {"teacher": drawn(N + 1, V)},
        {"labels": LABELS[:-1]},
        {"student": drawn(V, N).t()},
        {"student": drawn(N, V).half()},
    ):
        with pytest.raises(ConfigError, match="cpp kernel"):
            record(**how)

    scalars, ones = torch.zeros(6, N, dtype=torch.float64), torch.ones(N)

    def gradient(out, scalars=scalars, of_divergence=ones, of_cross_entropy=ones):
        passes.local_gradient(
            *(out, student, teacher, LABELS, 0, divergence, 1.0, torch.float32),
            *(scalars, of_divergence, of_cross_entropy),
        )
        return out

    assert gradient(torch.full((N, V), torch.nan)).isfinite().all()
    for how in (
        {"out": torch.empty(N, V - 1)},
        {"out": torch.empty(N, V).double()},
        {"out": torch.empty(V, N).t()},
        {"out": torch.empty(N, V), "scalars": scalars[:5]},
        {"out": torch.empty(N, V), "of_divergence": ones[:2]},
    ):
        with pytest.raises(ConfigError, match="cpp kernel"):
            gradient(**how)
    with pytest.raises(HostError, match="cpp kernel"):
        gradient(torch.empty(N, V, device="meta"))


def test_a_default_device_is_not_where_numbers_go():
    with torch.device("meta"):
        found = values(losses())
    assert_as_wanted(found, rtol=0, atol=0)


class Own(torch.Tensor):
    """A subclass with memory of its own."""


@pytest.mark.parametrize("kernel", ["auto", "eager"])
def test_lazy_negations_and_strides(kernel):
    with kernels.using(kernel):
        for divergence in DIVERGENCES:
            student, teacher = drawn(N, V), drawn(N, V + 1)[:, 1:]
            wanted = student.clone().requires_grad_()
            vocab_parallel_divergence(wanted, teacher, divergence).sum().backward()
            for form in (
                lambda it: torch._neg_view(-it),
                lambda it: torch.complex(it, -it).conj().imag,
                lambda it: it.t().contiguous().t(),
                lambda it: it.repeat_interleave(2, dim=1)[:, ::2],
                torch.nn.Parameter,
                lambda it: it.as_subclass(Own),
            ):
                leaf = form(student).detach().requires_grad_()
                vocab_parallel_divergence(leaf, form(teacher), divergence).sum().backward()
                assert torch.equal(leaf.grad.as_subclass(torch.Tensor), wanted.grad)
            leaf = student.clone().requires_grad_()
            logits = torch._neg_view(-leaf)
            vocab_parallel_divergence(logits, teacher, divergence, gradient_in_place=True).sum().backward()
            assert torch.equal(leaf.grad, wanted.grad)


def test_a_dtensor_is_refused(tmp_path):
    code = """
import torch, torch.distributed as dist
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
from abkd_megatron import AlphaBeta, vocab_parallel_divergence
dist.init_process_group("gloo", init_method="file://" + FILE, rank=0, world_size=1)
student = distribute_tensor(torch.randn(4, 8), init_device_mesh("cpu", (1,)), [Shard(1)]).requires_grad_()
try:
    vocab_parallel_divergence(student, student.detach(), AlphaBeta(0.2, 0.7))
except ValueError as error:
    print(error)
vocab_parallel_divergence(student.to_local(), student.detach().to_local(), AlphaBeta(0.2, 0.7)).sum().backward()
print(type(student.grad).__name__)
dist.destroy_process_group()
"""
    done = subprocess.run(
        [sys.executable, "-c", code.replace("FILE", repr(str(tmp_path / "store")))],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(abkd_megatron.__file__).parent.parent,
    )
    assert done.returncode == 0, done.stderr
    assert "to_local()" in done.stdout and done.stdout.split()[-1] == "DTensor"


# Transforms.

TEACHER = 2 * drawn(N, V)


def divergence_of(student):
    return vocab_parallel_divergence(student, TEACHER, AlphaBeta(0.2, 0.7))


def scalar(student):
    return divergence_of(student).sum()


class Module(torch.nn.Module):
    def forward(self, student):
        return divergence_of(student)


TRANSFORMS = {
    "grad": lambda it: torch.func.grad(scalar)(it),
    "vmap": lambda it: torch.vmap(lambda row: vocab_parallel_divergence(row, row, ToDi()))(it),
    "jvp": lambda it: torch.func.jvp(scalar, (it,), (it,)),
    "hessian": lambda it: torch.func.hessian(scalar)(it),
    "functionalize": lambda it: torch.func.functionalize(scalar)(it),
    "export": lambda it: torch.export.export(Module(), (it,)),
    "export, strict": lambda it: torch.export.export(Module(), (it,), strict=True),
    "jit": lambda it: torch.jit.trace(scalar, (it,)),
    "fullgraph": lambda it: torch.compile(scalar, fullgraph=True, backend="eager")(it),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_raise_by_name(name):
    with pytest.raises(Exception, match="vocab_parallel_divergence") as raised:
        TRANSFORMS[name](drawn(N, V))
    assert isinstance(raised.value, AbkdError) or "fullgraph=True" in str(raised.value)


def test_forward_mode_raises_by_name():
    with forward_ad.dual_level(), pytest.raises(ConfigError, match="forward-mode"):
        divergence_of(forward_ad.make_dual(drawn(N, V), drawn(N, V)))


def test_compile_breaks_its_graph():
    student = drawn(N, V).requires_grad_()
    compiled = torch.compile(lambda it: scalar(it * 2.0) * 3.0, backend="eager")
    (got,) = torch.autograd.grad(compiled(student), student)
    (wanted,) = torch.autograd.grad(scalar(student * 2.0) * 3.0, student)
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_a_trace_has_all_operations(divergence):
    """Native code would not be in it."""
    first, second, teacher = drawn(N, V), 3 * drawn(N, V), drawn(N, V)
    traced = make_fx(lambda it: vocab_parallel_divergence(it, teacher, divergence))(first)
    torch.testing.assert_close(traced(second), vocab_parallel_divergence(second, teacher, divergence))
    if kernels.get("cpp") and cpp.compiler() and divergence is DIVERGENCES[0]:
        with kernels.using("cpp"), pytest.raises(HostError, match="tracing"):
            make_fx(lambda it: vocab_parallel_divergence(it, teacher, divergence))(first)


def test_the_reference_takes_inference_tensors_and_second_derivatives():
    with torch.inference_mode():
        teacher = drawn(N, V)
    student = (2 * drawn(N, V)).requires_grad_()
    (gradient,) = torch.autograd.grad(
        reference_divergence(AlphaBeta(0.2, 0.7), student, teacher).sum(), student, create_graph=True
    )
    assert torch.autograd.grad(gradient.square().sum(), student)[0].abs().sum() > 0
