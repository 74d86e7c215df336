"""Type-checks the autograd functions of vocab_parallel and logit_losses on the tensor-parallel axis, with `spmd_types`.

Each tensor has one type on that axis: R (the same on every rank; the ranks' gradients have to be summed), I (the same
on every rank, and so is its gradient), V (each rank has its own) or P (the ranks' values have to be summed). The
checker intercepts every torch call, derives the result's type and raises SpmdTypeError where operands do not go
together. The process group is a fake one: nothing is sent, and numbers mean nothing.

Autograd functions are opaque to `spmd_types`: their `apply` is one call, and a declared signature would be believed.
`Bodies` runs the real `forward` and `backward` with the checker on instead, also where autograd calls them.

Checked in the real code, with the eager kernel, in groups that gather records and in larger ones that reduce them:
  - losses and metrics are the same on every rank, so nothing is returned before it is reduced;
  - no collective gets an operand of a wrong type, such as a gradient that is already complete;
  - for a loss gradient that is the same on every rank (I), each input's gradient has the type that autograd owes it: V
    for logits and weights; for hidden states (R) a term of a sum, which is the caller's to form (P);
  - no logit loss differentiates through a sum over the ranks into one rank's columns.

Declared here, not checked:
  - outputs of type R are I. Their backward is then checked for I; for R it does not type-check, see
    `test_loss_gradient_is_not_partial`;
  - V may stand for P, as in `spmd_types`. That the hidden states' gradient is a term of a sum follows from the sharded
    vocabulary, which `test_hidden_gradient_is_partial` checks, for the matrix products alone;
  - the operand of an all-reduce is P. `spmd_types` takes a maximum for a sum;
  - the input of `_Total` is P;
  - torch's own backward formulas.

Not seen: the C++ and Triton kernels, Python numbers other than the shard's `start`, branches that differ between ranks
(such as that of a shard of padding alone), ranks that do not take part in a collective, work that is not waited for,
and wrong values of a right type, such as a factor. tests/distributed compares numbers.
"""

import contextlib
import math
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from abkd_megatron import AlphaBeta, ToDi, kernels
from abkd_megatron.losses import Divergence, JensenShannon, TotalVariation, columns
from abkd_megatron.losses.base import LogitLoss
from abkd_megatron.losses.columns import Columns
from abkd_megatron.losses.extra import sinkhorn
from abkd_megatron.losses.extra.clipped import ClippedKL
from abkd_megatron.losses.registry import LOGIT_LOSSES
from abkd_megatron.vocab_parallel import (
    TeacherRecords,
    VocabShard,
    head_function,
    head_gradients,
    logit_loss,
    logits,
    passes,
    records,
    vocab_parallel_distillation,
    vocab_parallel_distillation_head,
    vocab_parallel_divergence,
    vocab_parallel_logit_loss,
    vocab_parallel_record_distillation,
    vocab_parallel_record_distillation_head,
)

try:  # spmd_types asks for no version of torch, and imports parts of it that the oldest ones here do not have
    import spmd_types as spmd
    import spmd_types.checker as checker
    from torch.testing._internal.distributed.fake_pg import FakeStore
except ImportError as error:
    pytest.skip(f"spmd_types: {error}", allow_module_level=True)

I, P, R, V, S = spmd.I, spmd.P, spmd.R, spmd.V, spmd.S  # noqa: E741

TOKENS, WIDTH, HIDDEN, TEACHER_HIDDEN = (3, 4), 8, 5, 7

_ALLOCATIONS = (torch.empty_like, torch.Tensor.new_empty)
_GATHERS = (dist.all_gather_into_tensor, getattr(dist, "all_gather_single", None))


class Bodies(TorchFunctionMode):
    """Runs autograd functions with the checker on. Enter it inside `checker.typecheck()`.

    It also does what spmd_types 0.3.1 does not: a write into a part of a tensor (`tensor[...] = value`, an in-place
    operation on a view, `out=`) changes the type of the whole, and an allocated buffer has the type of what is first
    written into it, not of the tensor that it was allocated like.

    Args:
        group: the tensor-parallel group; the mesh has no other axis.
        same: the type of outputs that are the same on every rank.
    """

    def __init__(self, group: dist.ProcessGroup, same: Any = I) -> None:
        super().__init__()
        self.group, self.axis, self.same = group, spmd.normalize_axis(group), same
        self.backwards: set[type] = set()
        """The functions whose backward was checked."""
        self._views: dict[int, list[weakref.ref]] = {}
        self._unwritten: set[int] = set()
        self._checker = torch.overrides._get_current_function_mode()

    def type_of(self, tensor: Tensor) -> Any:
        return spmd.get_local_type(tensor).get(self.axis)

    def stamp(self, tensor: Tensor, to: Any) -> Tensor:
        before = self.type_of(tensor)
        if before is None:
            return spmd.assert_type(tensor, {self.group: to})
        return spmd.mutate_type(tensor, self.group, src=before, dst=to)

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        function, name = getattr(func, "__self__", None), getattr(func, "__name__", "")
        if name == "apply" and isinstance(function, type) and issubclass(function, torch.autograd.Function):
            return self._apply(function, args)
        if func is torch.autograd.grad:
            return self._grad(*args, **kwargs)
        if (out := kwargs.pop("out", None)) is not None:
            result = func(*args, **kwargs)
            with spmd.no_typecheck():
                out.copy_(result)
            self._write(out, [self.type_of(result)])
            return out
        if func in _GATHERS and self._address(args[0]) in self._unwritten:
            self._write(args[0], [R])
        elif func is dist.all_reduce:
            spmd.assert_type(args[0], {self.group: P})
        tensors = [it for it in tree_leaves((args, kwargs)) if isinstance(it, Tensor)]
        result = func(*args, **kwargs)
        if func is torch.Tensor.__setitem__:
            self._write(tensors[0], [self.type_of(it) for it in tensors[1:]] or [R])
        elif func is dist.all_reduce:
            self._write(tensors[0], [R], all_of_it=True)
        elif tensors and result is tensors[0]:  # in place
            self._write(tensors[0], [self.type_of(tensors[0])])
        for tensor in (*tensors, *(it for it in tree_leaves(result) if isinstance(it, Tensor))):
            self._remember(tensor)
        if func in _ALLOCATIONS:
            self._unwritten.add(self._address(result))
        return result

    def _write(self, tensor: Tensor, kinds: list[Any], all_of_it: bool = False) -> None:
        """Give the tensor's memory the type it has after values of these types were written to it, or all of it."""
        views, address = self._remember(tensor), self._address(tensor)
        together = set(kinds)
        overwritten = all_of_it and tensor.numel() == max(view.numel() for view in views)
        if not overwritten and address not in self._unwritten:
            together |= {self.type_of(view) for view in views}
        together.discard(None)
        self._unwritten.discard(address)
        if P in together and len(together) > 1:
            raise spmd.SpmdTypeError(f"expected values of one type in a tensor with partial ones, got {together}")
        for view in views:
            if self.type_of(view) is not None:
                self.stamp(view, next(kind for kind in (P, V, R, I) if kind in together))

    def _remember(self, tensor: Tensor) -> list[Tensor]:
        """The live tensors in the same memory, this one included."""
        address = self._address(tensor)
        views = [view for ref in self._views.get(address, []) if (view := ref()) is not None]
        if not views:
            self._unwritten.discard(address)
        if address == 0 or all(view is not tensor for view in views):
            views = [tensor] if address == 0 else [*views, tensor]
        self._views[address] = [weakref.ref(view) for view in views]
        return views

    @staticmethod
    def _address(tensor: Tensor) -> int:
        with torch._C.DisableTorchFunction():
            return tensor.untyped_storage().data_ptr()

    def _apply(self, function: type, args: tuple[Any, ...]) -> Any:
        needs = tuple(torch.is_grad_enabled() and isinstance(it, Tensor) and it.requires_grad for it in args)
        context = Context(needs)
        with self, torch.no_grad():
            outputs = function.forward(context, *args)  # type: ignore[attr-defined]
        if not any(needs):
            return outputs
        alone = isinstance(outputs, Tensor)
        outputs = (outputs,) if alone else outputs
        kinds = [self.type_of(it) for it in outputs]
        with torch._C.DisableTorchFunction():
            outputs = _Node.apply(self, function, context, outputs, *args)
        for output, kind in zip(outputs, kinds, strict=True):
            self.stamp(output, self.same if kind is R and output.requires_grad else kind)
        return outputs[0] if alone else outputs

    def _grad(self, outputs: Any, inputs: Any, grad_outputs: Any, **_: Any) -> tuple[Tensor | None, ...]:
        """What torch.autograd.grad returns, which has the type that autograd owes each input."""
        outputs, inputs, gradients = ([it] if isinstance(it, Tensor) else it for it in (outputs, inputs, grad_outputs))
        for output, gradient in zip(outputs, gradients, strict=True):
            self._check("a gradient of an output", self.type_of(output).backward_type(), self.type_of(gradient))
        with spmd.no_typecheck():
            results = torch.autograd.grad(outputs, inputs, gradients)
        for it, result in zip(inputs, results, strict=True):
            if result is not None:
                self.stamp(result, self.type_of(it).backward_type())
        return results

    @staticmethod
    def _check(what: str, expected: Any, got: Any) -> None:
        # R and I differ in their gradient, and these have none.
        if got is not expected and (expected, got) != (P, V) and {expected, got} != {R, I}:
            raise spmd.SpmdTypeError(f"{what}: expected {expected!r}, got {got!r}")

    def backward(self, function: Any, context: "Context", kinds: list[Any], args: tuple, gradients: Any) -> list[Any]:
        """What the function's backward returns for gradients of outputs of these types."""
        with checker.typecheck(), self._checker, self, torch.no_grad():  # torch takes the modes off for autograd.grad
            for kind, gradient in zip(kinds, gradients, strict=True):
                if gradient is not None:
                    self.stamp(gradient, kind.backward_type())
            results = function.backward(context, *gradients)
        results = list(results) if isinstance(results, tuple) else [results]
        for position, (it, needed, result) in enumerate(zip(args, context.needs_input_grad, results, strict=True)):
            if needed and result is not None:
                kind = P if function is columns._Total else self.type_of(it)
                what = f"{function.__name__}: the gradient of argument {position}"
                self._check(what, kind.backward_type(), self.type_of(result))
        self.backwards.add(function)
        return results


class Context:
    """What autograd calls `ctx`."""

    def __init__(self, needs_input_grad: tuple[bool, ...]) -> None:
        self.needs_input_grad = needs_input_grad
        self.saved_tensors: tuple[Tensor | None, ...] = ()
        self.without_gradient: tuple[Tensor, ...] = ()
        self.materialize = True

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *tensors: Tensor) -> None:
        self.without_gradient = tensors

    def set_materialize_grads(self, value: bool) -> None:
        self.materialize = value


class _Node(torch.autograd.Function):
    """A function whose forward has run, in autograd's graph."""

    @staticmethod
    def forward(ctx: Any, bodies: Bodies, function: Any, context: Context, outputs: Any, *args: Any) -> Any:
        ctx.set_materialize_grads(context.materialize)
        ctx.mark_non_differentiable(*context.without_gradient)
        ctx.call = bodies, function, context, args
        ctx.kinds = [
            None if any(it is other for other in context.without_gradient) else bodies.type_of(it) for it in outputs
        ]
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        bodies, function, context, args = ctx.call
        kinds = [bodies.same if kind is R else kind for kind in ctx.kinds]
        given = [
            None if gradient is None or kind is None else torch.Tensor.detach(gradient)
            for gradient, kind in zip(gradients, kinds, strict=True)
        ]
        return None, None, None, None, *bodies.backward(function, context, kinds, args, given)


class Shard(VocabShard):
    """One whose `start` the checker knows to differ between ranks."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__(0, WIDTH, WIDTH * group.size(), group)
        object.__setattr__(self, "start", spmd.Scalar(0, {group: V}))

    @property
    def num_columns(self) -> int:
        return WIDTH


@contextlib.contextmanager
def ranks(number: int) -> Iterator[dist.ProcessGroup]:
    torch.manual_seed(0)
    dist.init_process_group("fake", rank=0, world_size=number, store=FakeStore())
    before = kernels.use("eager")
    try:
        mesh = dist.init_device_mesh("cpu", (number,), mesh_dim_names=("tp",))
        with spmd.set_current_mesh(mesh):
            yield mesh.get_group("tp")
    finally:
        kernels.use(before)
        dist.destroy_process_group()


@pytest.fixture(params=[4, 2 * passes.GATHER_UP_TO], ids=["gathers", "reduces"])
def group(request) -> Iterator[dist.ProcessGroup]:
    with ranks(request.param) as group:
        yield group


@pytest.fixture
def bodies(group) -> Iterator[Bodies]:
    with checker.typecheck(), Bodies(group) as bodies:
        yield bodies


def typed(group: dist.ProcessGroup, kind: Any, *shape: int, gradient: bool = False, labels: bool = False) -> Tensor:
    with spmd.no_typecheck():
        tensor = torch.arange(math.prod(shape)).view(shape) % WIDTH if labels else torch.rand(shape) + 0.5
        tensor.requires_grad_(gradient)
    return spmd.assert_type(tensor, {group: kind})


def differentiate(bodies: Bodies, loss: Tensor, inputs: tuple[Tensor, ...], weights: Tensor | None = None) -> None:
    """Check the backward pass of a loss that is the same on every rank; its gradient is proportional to the weights."""
    spmd.assert_type(loss, {bodies.group: bodies.same})
    gradient = typed(bodies.group, bodies.same.backward_type(), *loss.shape)
    if weights is not None:
        with spmd.no_typecheck():
            gradient.copy_(weights)
    assert all(of is not None for of in torch.autograd.grad(loss, inputs, gradient))


def check_engine(bodies: Bodies, divergence: Divergence, compared: bool = True, **options: Any) -> None:
    group = bodies.group
    leaf, teacher = typed(group, V, *TOKENS, WIDTH, gradient=True), typed(group, V, *TOKENS, WIDTH)
    student, labels = leaf * 1.0, typed(group, I, *TOKENS, labels=True)
    if not compared:
        options["selected"] = labels > 3
        teacher = teacher.reshape(-1, WIDTH)[options["selected"].reshape(-1)]
    terms = vocab_parallel_distillation(student, teacher, divergence, labels, Shard(group), **options)
    for value in terms.metrics.values():
        spmd.assert_type(value, {group: R})
    differentiate(bodies, terms.divergence + terms.cross_entropy, (leaf,))
    assert logits._Distillation in bodies.backwards


DIVERGENCES = [AlphaBeta(0.2, 0.7), ToDi(), ToDi(2.0, detach=False), JensenShannon(), TotalVariation()]


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_engine(bodies, divergence, temperature):
    check_engine(bodies, divergence, temperature=temperature)


@pytest.mark.parametrize("divergence", DIVERGENCES[::3], ids=str)
def test_engine_with_selected_tokens(bodies, divergence):
    check_engine(bodies, divergence, compared=False)


def test_engine_in_place(bodies):
    check_engine(bodies, AlphaBeta(0.2, 0.7), gradient_in_place=True)


@pytest.mark.parametrize("divergence", DIVERGENCES[::3], ids=str)
def test_engine_without_labels(bodies, divergence):
    student, teacher = (typed(bodies.group, V, *TOKENS, WIDTH, gradient=gradient) for gradient in (True, False))
    differentiate(bodies, vocab_parallel_divergence(student, teacher, divergence, tp_group=bodies.group), (student,))


def check_head(
    bodies: Bodies,
    divergence: Divergence,
    in_forward: bool = True,
    *,
    hidden: Any = R,
    selected: bool = False,
    select: Callable | None = None,
) -> None:
    group = bodies.group
    student_hidden = typed(group, hidden, *TOKENS, HIDDEN, gradient=True)
    student_weight = typed(group, V, WIDTH, HIDDEN, gradient=True)
    labels = typed(group, I, *TOKENS, labels=True)
    token_weights = typed(group, I, *TOKENS) if in_forward else None
    loss, terms = vocab_parallel_distillation_head(
        student_hidden,
        student_weight,
        typed(group, R, *TOKENS, TEACHER_HIDDEN),
        typed(group, V, WIDTH, TEACHER_HIDDEN),
        divergence,
        labels,
        Shard(group),
        token_weights=token_weights,
        chunk_tokens=5,
        selected=labels > 3 if selected else None,
        select=select,
    )
    for value in (terms.divergence, terms.cross_entropy, *terms.metrics.values()):
        spmd.assert_type(value, {group: R})
    differentiate(bodies, loss, (student_hidden, student_weight), token_weights)
    assert head_function._DistillationHead in bodies.backwards


@pytest.mark.parametrize("divergence", DIVERGENCES[1:4], ids=str)
@pytest.mark.parametrize("in_forward", [True, False], ids=["in forward", "in backward"])
def test_head(bodies, divergence, in_forward):
    check_head(bodies, divergence, in_forward)


@pytest.mark.parametrize("in_forward", [True, False], ids=["in forward", "in backward"])
def test_head_with_selected_tokens(bodies, in_forward):
    check_head(bodies, AlphaBeta(0.2, 0.7), in_forward, selected=True)
    check_head(bodies, AlphaBeta(0.2, 0.7), in_forward, select=lambda metrics: metrics["kl to teacher"] > 0.1)


def typed_records(group: dist.ProcessGroup) -> TeacherRecords:
    with spmd.no_typecheck():
        num_tokens = math.prod(TOKENS)
        ids = torch.arange(3 * num_tokens).view(num_tokens, 3) % WIDTH
        fields = [ids, torch.rand(num_tokens, 3) - 3.0, *torch.rand(3, num_tokens)]
    return TeacherRecords(*(spmd.assert_type(it, {group: R}) for it in fields))


def check_records(bodies: Bodies, divergence: Divergence, temperature: float = 1.0, in_place: bool = False) -> None:
    group = bodies.group
    leaf, labels = typed(group, V, *TOKENS, WIDTH, gradient=True), typed(group, I, *TOKENS, labels=True)
    terms = vocab_parallel_record_distillation(
        leaf * 1.0, typed_records(group), divergence, labels, Shard(group), temperature, in_place
    )
    for value in terms.metrics.values():
        spmd.assert_type(value, {group: R})
    differentiate(bodies, terms.divergence + terms.cross_entropy, (leaf,))
    assert records._RecordDistillation in bodies.backwards


@pytest.mark.parametrize("divergence", [AlphaBeta(0.2, 0.7), JensenShannon()], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_records(bodies, divergence, temperature):
    check_records(bodies, divergence, temperature)
    check_records(bodies, divergence, temperature, in_place=True)


@pytest.mark.parametrize("in_forward", [True, False], ids=["in forward", "in backward"])
def test_head_on_records(bodies, in_forward):
    group = bodies.group
    hidden = typed(group, R, *TOKENS, HIDDEN, gradient=True)
    weight = typed(group, V, WIDTH, HIDDEN, gradient=True)
    token_weights = typed(group, I, *TOKENS) if in_forward else None
    loss, terms = vocab_parallel_record_distillation_head(
        *(hidden, weight, typed_records(group), ToDi(), typed(group, I, *TOKENS, labels=True), Shard(group)),
        token_weights=token_weights,
        chunk_tokens=5,
    )
    for value in (terms.divergence, terms.cross_entropy, *terms.metrics.values()):
        spmd.assert_type(value, {group: R})
    differentiate(bodies, loss, (hidden, weight), token_weights)


def check_logit_loss(bodies: Bodies, loss: LogitLoss, counted: bool = False) -> None:
    student, teacher = (typed(bodies.group, V, *TOKENS, WIDTH, gradient=gradient) for gradient in (True, False))
    which = typed(bodies.group, I, *TOKENS, labels=True) > 3 if counted else None
    drawn = typed(bodies.group, I, *TOKENS, labels=True)
    result = vocab_parallel_logit_loss(student, teacher, loss, Shard(bodies.group), 2.0, which, drawn)
    differentiate(bodies, result, (student,))
    assert logit_loss._LogitLoss in bodies.backwards


LOSSES = {name: make() for name, make in LOGIT_LOSSES.items() if name != "clipped_kl"}
LOSSES |= {"clipped_kl": ClippedKL(top_k=3), "clipped_kl by mass": ClippedKL(mass=0.5)}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("counted", [False, True], ids=["all", "counted"])
def test_logit_loss(bodies, name, counted):
    check_logit_loss(bodies, LOSSES[name], counted)


def test_functions_of_logit_losses_are_checked(bodies):
    for name in ("akl", "logit_mse", "clipped_kl", "sinkhorn"):
        check_logit_loss(bodies, LOSSES[name])
    assert {columns._Total, columns._SoftmaxSums, columns._Pick, sinkhorn._Distances} <= bodies.backwards


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_hidden_gradient_is_partial(group, dtype):
    """With types that know the sharded dimension: the product contracts it, so each rank has a term of the sum."""
    with checker.typecheck(local=False), Bodies(group) as bodies, torch.no_grad():

        def sharded(kind: Any, *shape: int) -> Tensor:
            with spmd.no_typecheck():
                tensor = torch.rand(shape).to(dtype)
            return spmd.assert_type(tensor, {group: kind})

        hidden, weight, labels = sharded(R, 6, HIDDEN), sharded(S(0), WIDTH, HIDDEN), typed(group, I, 6, labels=True)
        operands = head_gradients.Operands(hidden, weight, labels, (hidden, weight))
        gradients = head_gradients.Gradients(operands, True, True)
        gradients.add(slice(0, 6), sharded(S(1), 6, WIDTH))  # one chunk: to the checker no slice of a P is a P
        assert bodies.type_of(gradients.of_hidden) is P
        assert bodies.type_of(gradients.of_weight) is V
        assert spmd.get_partition_spec(gradients.of_weight)[0] is not None  # sharded as the weight is


# Mistakes, each of which makes a loss that differs between ranks or a gradient that is not the loss's.


def refused(match: str) -> Any:
    return pytest.raises(spmd.SpmdTypeError, match=match)


class Unreduced(passes.PendingRecord):
    """An exchange that was forgotten."""

    def __init__(self, of: passes.Passes, record: Tensor, async_op: bool) -> None:
        self.own = record

    def result(self) -> Tensor:
        return self.own


def test_loss_that_is_not_reduced(bodies, monkeypatch):
    monkeypatch.setattr(passes, "PendingRecord", Unreduced)
    with refused("tensor has .*V, expected .*[IR]"):
        check_engine(bodies, AlphaBeta(0.2, 0.7))
    with refused("tensor has .*V, expected .*[IR]"):
        check_head(bodies, AlphaBeta(0.2, 0.7))


def test_second_sum_that_is_not_reduced(bodies, monkeypatch):
    def mistaken(self: passes.PendingSum, record: Tensor, *_: Any, **__: Any) -> None:
        self.records, self.work = record.unsqueeze(0), None

    monkeypatch.setattr(passes.PendingSum, "__init__", mistaken)
    with refused("tensor has .*V, expected .*[IR]"):
        check_engine(bodies, JensenShannon())


def after_writing_gradient(monkeypatch: pytest.MonkeyPatch, mistake: Callable) -> None:
    write = passes.Passes.write_gradient

    def mistaken(self: passes.Passes, out: Tensor, batch: Any, known: Any, *gradients: Tensor | None) -> None:
        write(self, out, batch, known, *gradients)
        mistake(self.shard.group, out, *gradients)

    monkeypatch.setattr(passes.Passes, "write_gradient", mistaken)


def test_gradient_of_logits_that_is_reduced(bodies, monkeypatch):
    """It belongs to a rank's own columns."""
    after_writing_gradient(monkeypatch, lambda group, out, *_: dist.all_reduce(out, group=group))
    with refused("_Distillation: the gradient of argument 0: expected V, got R"):
        check_engine(bodies, AlphaBeta(0.2, 0.7))


def test_gradient_of_loss_that_is_reduced(bodies, monkeypatch):
    """All ranks have it already: the sum is too large by the number of ranks."""
    after_writing_gradient(monkeypatch, lambda group, _, of_loss, *__: dist.all_reduce(of_loss, group=group))
    with refused("tensor has .*I, expected .*P"):
        check_engine(bodies, AlphaBeta(0.2, 0.7))


@pytest.mark.parametrize(
    ("check", "argument"),
    [(check_engine, AlphaBeta(0.2, 0.7)), (check_head, AlphaBeta(0.2, 0.7)), (check_logit_loss, LOSSES["akl"])],
    ids=["engine", "head", "logit loss"],
)
def test_loss_gradient_is_not_partial(group, check, argument):
    """A loss of type R would bring one; the backward passes would have to sum it first."""
    with checker.typecheck(), Bodies(group, same=R) as bodies, refused("Partial type .* (cannot|requires)"):
        check(bodies, argument)


@pytest.mark.parametrize("in_forward", [True, False], ids=["in forward", "in backward"])
def test_hidden_states_whose_gradient_nobody_sums(bodies, in_forward):
    with refused("_DistillationHead: the gradient of argument 0: expected I, got V"):
        check_head(bodies, AlphaBeta(0.2, 0.7), in_forward, hidden=I)


def test_hidden_states_whose_gradient_is_summed_twice(bodies, monkeypatch):
    """By the head, and by its caller."""
    add = head_gradients.Gradients.add

    def mistaken(self: head_gradients.Gradients, chunk: slice, of_logits: Tensor) -> None:
        add(self, chunk, of_logits)
        if chunk.stop == len(self.of_hidden):
            dist.all_reduce(self.of_hidden, group=bodies.group)

    monkeypatch.setattr(head_gradients.Gradients, "add", mistaken)
    with refused("_DistillationHead: the gradient of argument 0: expected P, got R"):
        check_head(bodies, AlphaBeta(0.2, 0.7))


class OwnColumns(LogitLoss):
    num_collectives = 0

    def __call__(self, student: Tensor, teacher: Tensor, columns: Columns, counted: Tensor) -> Tensor:
        return (student - teacher).square().sum(dim=-1, dtype=torch.float64)


class ThroughTotal(LogitLoss):
    """The mean is of all ranks' columns, and its gradient would have to be summed over them."""

    num_collectives = 2

    def __call__(self, student: Tensor, teacher: Tensor, columns: Columns, counted: Tensor) -> Tensor:
        (total,) = columns.sums(student)
        gap = student - (total / columns.size).to(student.dtype).unsqueeze(-1)
        return columns.sums(gap * gap)[0]


def test_logit_loss_of_own_columns(bodies):
    with refused("tensor has .*V, expected .*I"):
        check_logit_loss(bodies, OwnColumns())


def test_logit_loss_that_differentiates_through_a_total(bodies):
    with refused("Invariant type .* cannot mix"):
        check_logit_loss(bodies, ThroughTotal())
