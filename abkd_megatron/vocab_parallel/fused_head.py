"""Distillation from hidden states: LM heads and loss fused, one chunk of tokens at a time.

No [tokens, V/TP] tensor of either model is materialized. Each chunk computes both models' logits, the losses, the
student's gradient in place of its logits, and from it the gradients of hidden states and weight. The exchange of a
chunk's records overlaps with the next chunk's matrix products.

Gradients are computed in one of two ways. With known token weights they are computed in forward, up to one factor that
backward applies; the matrix products then cost the same as with materialized logits. Otherwise backward recomputes the
logits, with 1.6 times the products if student and teacher have the same width. fp16 always recomputes: the loss scale,
without which small gradients underflow, is known only in backward.

Legend: N tokens, h and H hidden size of student and teacher, W width of a rank's logits.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from abkd_megatron.errors import ConfigError
from abkd_megatron.losses.base import Divergence
from abkd_megatron.tensors import check_context, check_tensor, constant
from abkd_megatron.validation import finite_number, flag, positive_number, whole_number
from abkd_megatron.vocab_parallel.head_function import Head, apply_head
from abkd_megatron.vocab_parallel.head_gradients import token_weight_check
from abkd_megatron.vocab_parallel.logits import (
    STUDENT_ONLY,
    DistillationTerms,
    check_divergence,
    check_selection,
    check_shard,
    rows_of,
)
from abkd_megatron.vocab_parallel.mixed_passes import MixedPasses
from abkd_megatron.vocab_parallel.passes import Passes
from abkd_megatron.vocab_parallel.record_passes import RecordPasses
from abkd_megatron.vocab_parallel.shard import VocabShard
from abkd_megatron.vocab_parallel.teacher_records import TeacherRecords, check_recorded


def vocab_parallel_distillation_head(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    divergence: Divergence,
    labels: Tensor,
    shard: VocabShard,
    *,
    kd_weight: float | Tensor = 1.0,
    lm_weight: float | Tensor = 1.0,
    temperature: float = 1.0,
    token_weights: Tensor | None = None,
    student_scale: float = 1.0,
    teacher_scale: float = 1.0,
    more_teachers: Sequence[tuple[Tensor, Tensor, float]] = (),
    records: tuple[TeacherRecords, Tensor] | None = None,
    chunk_tokens: int | None = None,
    into_main_grad: bool = False,
    selected: Tensor | None = None,
    select: Callable[[Mapping[str, Tensor]], Tensor] | None = None,
) -> tuple[Tensor, DistillationTerms]:
    """Compute kd_weight * D + lm_weight * CE per token, with logits = scale * hidden @ weight^T not materialized.

    Args:
        student_hidden: [..., h], identical on every rank.
        student_weight: [W, h], this rank's rows of the LM head, in the hidden states' dtype.
        teacher_hidden: [..., H] of the same tokens; never receives a gradient.
        teacher_weight: [W, H], rows of the same token ids; never receives a gradient.
        divergence: see `vocab_parallel_distillation`, also for `labels`, `shard` and `temperature`.
        labels: [...].
        shard: columns of the logits.
        kd_weight: of the divergence; a number, or [...] floats. A term of weight 0 adds nothing, even if it is NaN.
        lm_weight: of the student's cross entropy; as `kd_weight`.
        temperature: T > 0, for the divergence only.
        token_weights: [...], the weight of each token's loss up to one common factor, such as a loss mask. Gradients
            are then computed in forward, unless the hidden states are fp16. None recomputes the logits in backward, for
            any weights.
        student_scale: multiplies the student's logits.
        teacher_scale: multiplies the teacher's logits.
        more_teachers: hidden states [..., H], weight [W, H] and scale of further teachers, whose logits are added to
            the teacher's. H may differ. For tokens that have different teachers, pass hidden states that are 0 at the
            tokens of the others.
        records: of all N tokens, made at `temperature`, with entropies and the labels' log-probabilities, and [...]
            bool, identical on every rank: the tokens that they are used for in place of logits, see
            `vocab_parallel_record_distillation`. At those, hidden states have to be finite, and at the others the
            records a distribution. Not with `selected`.
        chunk_tokens: tokens per chunk, identical on all ranks. None for `automatic_chunk_tokens`, which requires GPUs
            of one type.
        into_main_grad: add the weight's gradient to its `main_grad`, if it has one, in that dtype, like Megatron's
            gradient accumulation fusion. Sets `grad_added_to_main_grad`; autograd's gradient is then a placeholder.
        selected: [...] bool, identical on every rank: tokens to compare. At the others all results but the cross
            entropy are 0, and no teacher logits are computed. Pass it on the CPU; one on the GPU needs a
            synchronization. None selects all.
        select: maps metrics {name: [n]} of the compared tokens to [n] bool, deterministically. The divergence of
            tokens that are not selected is 0. None selects all.

    Returns:
        The loss, [...] fp32 (fp64 if the logits are), identical on every rank, once differentiable in `student_hidden`
        and `student_weight`. The gradient of the hidden states is this rank's part: sum it over `shard.group`. And the
        DistillationTerms of vocab_parallel_distillation, detached; with `records` see `merged_terms`.

    Raises:
        ConfigError: for shapes that do not match or chunk_tokens < 1, and as vocab_parallel_distillation.
        RuntimeError: in backward, if the tokens were not weighted by `token_weights`, or at a second backward through
            gradients computed in forward. On a GPU only the first call checks the weights in backward. Later, wrong
            weights make all gradients NaN, and a later call of this function raises.

    Collectives: per chunk, as vocab_parallel_distillation, and with `records` as vocab_parallel_record_distillation.

    With `selected`, chunks of the selected tokens come first, then chunks of the others. Under torch.autocast products
    are in the hidden states' dtype; if the weight has another, both are cast to autocast's.

    Memory: two [chunk_tokens, W] of logits, four in a group of several ranks; the gradients of hidden states and
    weight, from forward on with token_weights, else from backward on, the weight's in at least fp32 (on CPU, a bf16
    weight also needs a chunk's logits and hidden states in fp32); 10 fp64 numbers per token. With `selected`, a
    reordered copy of the hidden states. With `records`, one more [chunk_tokens, W], and what they take.
    """
    owner = "vocab_parallel_distillation_head"
    check_context(owner)
    check_divergence(divergence)
    temperature = positive_number(owner, "temperature", temperature, "1.0 leaves the logits as they are")
    student, parameter = checked_student(owner, student_hidden, student_weight, labels, shard, into_main_grad)
    given = ((teacher_hidden, teacher_weight, teacher_scale), *more_teachers)
    teachers = [checked_pair("teacher", hidden, weight, labels, student[1]) for hidden, weight, _ in given]
    options = checked_options(owner, labels, kd_weight, lm_weight, student_scale, token_weights, select)
    scales = tuple(finite_number(owner, "teacher_scale", scale) for *_, scale in given)
    if chunk_tokens is None:
        chunk_tokens = automatic_chunk_tokens(student_weight.device, bytes_per_token(student_weight, shard))
    of_logits = Passes.of(student[1], teachers[0][1], divergence, shard, temperature, has_labels=True)
    passes: Passes | MixedPasses = of_logits
    of_records: dict[str, Any] = {}
    if records is not None:
        of_records = _checked_records(records, labels, divergence, selected)
        recorded = RecordPasses.of(student[1], of_records["records"], divergence, shard, temperature, disposable=False)
        passes = MixedPasses(of_logits, recorded)
    head = Head(
        **options,
        **of_records,
        passes=passes,
        teacher_scales=scales,
        chunk_tokens=whole_number(owner, "chunk_tokens", chunk_tokens, least=1),
        num_compared=labels.numel(),
        parameter=parameter,
    )
    of_tokens = [constant(hidden).reshape(labels.numel(), hidden.shape[-1]) for hidden, _ in teachers]
    order = None
    if selected is not None:
        chosen, others = rows_of(selected, labels)
        order, of_tokens = torch.cat([chosen, others]), [hidden[chosen] for hidden in of_tokens]
        student_only = Passes.of(student[1], student[1], STUDENT_ONLY, shard, 1.0, has_labels=True)
        head = replace(head, student_only=student_only, num_compared=len(chosen))
    constants = [(hidden, constant(weight)) for hidden, (_, weight) in zip(of_tokens, teachers, strict=True)]
    return apply_head(head, student, constants, labels, token_weights, order)


def _checked_records(
    given: tuple[TeacherRecords, Tensor], labels: Tensor, divergence: Divergence, selected: Tensor | None
) -> dict[str, Any]:
    """Return the fields of a Head that has teacher's logits and records."""
    records, recorded = given
    check_selection(recorded, labels)
    if selected is not None or records.entropy is None or records.label_log_prob is None:
        raise ConfigError(
            "expected records of a teacher's entropy and the labels' log-probabilities, and no `selected`, got others; "
            "give kd_weight 0 to tokens that are not selected"
        )
    check_recorded(divergence, records.num_draws)
    return {"records": records.check(labels), "recorded": constant(recorded).reshape(-1)}


def checked_student(
    owner: str, hidden: Tensor, weight: Tensor, labels: Tensor, shard: VocabShard, into_main_grad: bool
) -> tuple[tuple[Tensor, Tensor], Any]:
    """Return the student's hidden states and weight, as under autocast, and the weight if it has a `main_grad`."""
    check_tensor("a student's weight", weight)
    check_tensor("labels", labels, dtype=torch.int64, like=weight)
    check_shard(shard)
    parameter = weight if flag(owner, "into_main_grad", into_main_grad) and hasattr(weight, "main_grad") else None
    student = checked_pair("student", hidden, weight, labels, weight)
    shard.check_width("logits of the weights", weight.shape[0])
    return student, parameter


def checked_pair(name: str, hidden: Tensor, weight: Tensor, labels: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return a model's hidden states [..., h] and weight, as under autocast; the student's weight, `like`, has [W, h].

    Raises:
        ConfigError: for shapes or dtypes that do not match.
    """
    hidden, weight = _as_under_autocast(hidden, weight)
    check_tensor(f"{name} hidden states", hidden, like=like)
    check_tensor(f"a {name}'s weight", weight, like=like)
    width = like.shape[0]
    fits = hidden.dim() > 0 and hidden.shape[:-1] == labels.shape and weight.shape == (width, hidden.shape[-1])
    if not (fits and hidden.dtype == weight.dtype):
        raise ConfigError(
            f"expected {name} hidden states [{', '.join(map(str, labels.shape))}, h] and a weight [{width}, h] of "
            f"one dtype, got {list(hidden.shape)} {hidden.dtype} and {list(weight.shape)} {weight.dtype}: pass the "
            "decoder's output and the output layer's weight"
        )
    return hidden, weight


def checked_options(
    owner: str,
    labels: Tensor,
    kd_weight: float | Tensor,
    lm_weight: float | Tensor,
    student_scale: float,
    token_weights: Tensor | None,
    select: Callable[[Mapping[str, Tensor]], Tensor] | None,
) -> dict[str, Any]:
    """Return the fields of a Head that do not depend on the teacher; check `token_weights`."""
    if token_weights is not None:
        is_mask = isinstance(token_weights, Tensor) and not (
            token_weights.is_floating_point() or token_weights.is_complex()
        )
        dtype = token_weights.dtype if is_mask else None
        check_tensor("token weights", token_weights, dtype=dtype, like=labels)
        if token_weights.shape != labels.shape:
            raise ConfigError(
                f"expected token weights of the labels' shape {list(labels.shape)}, got {list(token_weights.shape)}: "
                "give one number per token, or None"
            )
    token_weight_check.raise_if_known()
    return {
        "kd_weight": _term_weight(owner, "kd_weight", kd_weight, labels),
        "lm_weight": _term_weight(owner, "lm_weight", lm_weight, labels),
        "student_scale": finite_number(owner, "student_scale", student_scale),
        "select": select,
    }


def _term_weight(owner: str, name: str, weight: float | Tensor, labels: Tensor) -> float | Tensor:
    """Check the weight of a term; one per token becomes [N]."""
    if not isinstance(weight, Tensor):
        return finite_number(owner, name, weight)
    check_tensor(f"a {name}", weight, like=labels)
    if weight.shape != labels.shape:
        raise ConfigError(
            f"expected a {name} of the labels' shape {list(labels.shape)}, got {list(weight.shape)}: give a number, or "
            "one per token"
        )
    return constant(weight).reshape(-1)


def _as_under_autocast(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Cast both to autocast's dtype if it is enabled and their dtypes differ, like torch's linear layers."""
    if not (isinstance(hidden, Tensor) and isinstance(weight, Tensor)) or hidden.dtype == weight.dtype:
        return hidden, weight
    device = weight.device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return hidden, weight
    dtype = torch.get_autocast_dtype(device)
    return hidden.to(dtype), weight.to(dtype)


def bytes_per_token(weight: Tensor, shard: VocabShard) -> int:
    """Return the bytes of both models' logits per token of a chunk, for an LM head weight [W, h].

    In a group of several ranks two chunks are alive at a time.
    """
    return 2 * weight.shape[0] * weight.dtype.itemsize * (2 if shard.num_ranks > 1 else 1)


def automatic_chunk_tokens(device: torch.device, of_token: int) -> int:
    """Return the tokens per chunk: a power of 2 whose logits, `of_token` bytes per token, fit a share of the memory.

    On GPU at most 2048 tokens, which saturate the tensor cores, and a 64th of the memory. On CPU at most 512 tokens and
    64 MiB, for the caches. Free memory is not considered: it differs between ranks, which must agree on the chunk size,
    and between a run and its resume.
    """
    most, least, room = 512, 16, 2**26
    if device.type == "cuda":
        most, least, room = 2048, 128, torch.cuda.mem_get_info(device)[1] // 64
    fitting = room // max(of_token, 1)
    return max(least, min(most, 2 ** (fitting.bit_length() - 1) if fitting else least))
