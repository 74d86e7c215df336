"""Head, kernel and chunk size of a run, decided once when the models are built, equal on all ranks."""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import ColumnParallelLinear
from torch import Tensor

from abkd_megatron import kernels
from abkd_megatron.errors import ConfigError
from abkd_megatron.losses.objective import Objective
from abkd_megatron.student.quantizers import active_quantizers, unquantized_class
from abkd_megatron.vocab_parallel import VocabShard, vocab_parallel_divergence
from abkd_megatron.vocab_parallel.execution import Execution
from abkd_megatron.vocab_parallel.fused_head import automatic_chunk_tokens, bytes_per_token

logger = logging.getLogger(__name__)

# Module of the hooks with which Megatron's DDP waits for gathered parameters (--overlap-param-gather). They only use
# the module's own parameters, so the fused head can run them in place of the layer's forward.
_RUNNABLE_HOOKS = "megatron.core.distributed"


@dataclass(frozen=True)
class Plan:
    """Head, kernel and chunks of this rank, on the student's last pipeline stage.

    It is decided once: tensor-parallel ranks with different free memory would otherwise choose different chunks, issue
    different collectives and deadlock, and a resumed run could sum in another order.
    """

    choice: str
    """One of `kernels.CHOICES`, in use while the loss is computed."""
    kernel: str
    """The one of `kernels.NAMES` that it selects for the trained divergence."""
    chunk_tokens: int | None
    """Tokens per chunk of the fused head; None where both models' logits are materialized."""
    why: str
    """Sizes, and the reason for materialized logits; for the log."""

    def record(self) -> dict[str, Any]:
        """Return the plan as text and numbers, for the run's record."""
        return asdict(self)


def propose_plan(
    student: torch.nn.Module,
    teachers: Sequence[torch.nn.Module],
    weight: Tensor,
    objective: Objective,
    execution: Execution,
    shard: VocabShard,
    *,
    tokens: int | None,
) -> Plan:
    """Decide how this rank computes the loss, and compute a small one with the chosen kernel.

    Call it after `torch.cuda.set_device`, with the models on their device, and pass the result to `agree`.

    Args:
        student: the student's output layer.
        teachers: output layer of each teacher; none for a cache.
        weight: [V/TP, h], the weight of the student's output layer.
        objective: what is trained.
        execution: the requested head, kernel and chunk size.
        shard: of the student's vocabulary.
        tokens: s * b of a micro-batch on this rank, by which ``head: auto`` estimates what a fused head saves. None:
            fused where possible.

    Raises:
        ConfigError: ``head: fused`` is not possible, or the kernel is not available.
    """
    reasons = ["as chosen"] if execution.head == "materialized" else []
    reasons += obstacles(student, teachers, objective, shard.size)
    check_fused(execution, reasons)
    with kernels.using(execution.kernel) as choice:
        name = try_kernel(objective, weight)
    of_token = bytes_per_token(weight, shard) // (1 if teachers else 2)
    chunk_tokens = execution.chunk_tokens or automatic_chunk_tokens(weight.device, of_token)
    whole = f"{weight.shape[0]} logits of {'both models' if teachers else 'the student'}"
    if tokens is not None:
        # Approximate: in a packed row it depends on the lengths, and the head must not change with those.
        every = objective.tokens.n if objective.tokens is not None and objective.tokens.n is not None else 1
        compared = tokens // every if teachers else 0
        both = "both models" if every == 1 else f"the student and about {compared} of the teacher"
        both = both if teachers else "the student"
        size = _mib((tokens + compared) * weight.shape[0] * weight.dtype.itemsize)
        whole = f"{tokens} x {weight.shape[0]} logits of {both}, {size}"
        if execution.head == "auto" and not reasons:
            chunks = chunk_tokens * of_token
            reasons = nothing_to_gain(weight, tokens, chunk_tokens, chunks, execution.gradient_in_place, compared)
    if reasons:
        return Plan(choice, name, None, f"{whole} ({reasons[0]})")
    chunk = f"{chunk_tokens} tokens, {_mib(chunk_tokens * of_token)}"
    return Plan(choice, name, chunk_tokens, f"chunks of {chunk}, in place of {whole}")


def agree(proposed: Plan | None) -> Plan | None:
    """Merge the proposals of the last pipeline stage's ranks into one plan, log it, and return it on every rank.

    Args:
        proposed: this rank's plan; None on the other stages.

    Returns:
        Materialized logits if any rank proposes them, else the smallest chunk. None if no rank proposes a plan.

    Raises:
        ConfigError: on every rank, if their kernels differ.

    Collectives: one all_gather_object over the whole job.
    """
    found: list[Plan | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, proposed)
    plans = [plan for plan in found if plan is not None]
    if not plans:
        return None
    if len(names := {plan.kernel for plan in plans}) > 1:
        raise ConfigError(
            f"expected one kernel on all ranks of the last pipeline stage, got {', '.join(sorted(names))}: their nodes "
            "differ in what is installed; set distillation.kernel, or install the same packages"
        )
    plan = min(plans, key=lambda plan: plan.chunk_tokens or 0)
    if proposed is not None:
        logger.info("LM head %s: %s", "fused with the loss" if plan.chunk_tokens else "materialized", plan.why)
    return plan


def check_fused(execution: Execution, reasons: Sequence[str]) -> None:
    """Reject ``head: fused`` where it is not possible.

    Args:
        execution: with the requested head.
        reasons: the result of `obstacles`.

    Raises:
        ConfigError: naming the first reason.
    """
    if execution.head == "fused" and reasons:
        raise ConfigError(f"head: fused is not possible ({reasons[0]}); give head: materialized, or auto")


def try_kernel(objective: Objective, like: Tensor) -> str:
    """Compute a small loss, so that the kernel is built, or fails, before the first step.

    Args:
        objective: with the divergence.
        like: a tensor with the device and dtype of the logits.

    Returns:
        The kernel's name.
    """
    logits = torch.zeros(1, 8, device=like.device, dtype=like.dtype)
    vocab_parallel_divergence(logits.clone().requires_grad_(), logits, objective.effective_divergence).sum().backward()
    return kernels.select(objective.effective_divergence, logits, logits).name


def obstacle(layer: torch.nn.Module) -> str | None:
    """Return why the fused head cannot replace this output layer, or None."""
    if named := active_quantizers(layer):
        return f"the output layer is quantized by ModelOpt ({', '.join(named)})"
    if unquantized_class(layer) is not ColumnParallelLinear:
        return f"the output layer is a {type(layer).__name__}, not Megatron's ColumnParallelLinear"
    config: Any = layer.config
    found = {
        "has a bias": layer.bias is not None,
        "gathers its output": layer.gather_output,
        "defers its weight gradient (defer-embedding-wgrad-compute)": config.defer_embedding_wgrad_compute,
        "offloads activations": config._cpu_offloading_context is not None,
        "shares its weight over another group": layer.gtp_remat_size != 1,
        # An attribute from megatron-core 0.20 on.
        "has logits of another type": getattr(layer, "output_dtype", None) not in (None, config.params_dtype),
        "has hooks that would not run": has_other_hooks(layer),
    }
    return next((f"the output layer {what}" for what, holds in found.items() if holds), None)


def has_other_hooks(layer: torch.nn.Module) -> bool:
    """Return whether a module has hooks that `run_pre_forward_hooks` does not run."""
    if any(map(bool, (layer._forward_hooks, layer._backward_hooks, layer._backward_pre_hooks))):
        return True
    hooks = layer._forward_pre_hooks.values()
    return any(not getattr(hook, "__module__", "").startswith(_RUNNABLE_HOOKS) for hook in hooks)


def run_pre_forward_hooks(layer: torch.nn.Module) -> None:
    """Run the hooks of Megatron's DDP before a weight is used without its module's forward.

    Raises:
        RuntimeError: other hooks were registered since the plan was made, or quantizers were turned on.
    """
    if named := active_quantizers(layer):
        raise RuntimeError(
            f"expected an output layer without quantizers, as when the teacher was attached, got {', '.join(named)} of "
            "ModelOpt: the fused head does not call the layer; quantize the student before `attach`, or leave out "
            "*output_layer*"
        )
    if has_other_hooks(layer):
        raise RuntimeError(
            "expected no new hooks on the output layer after the teacher was attached: the fused head does not call "
            "the layer; register them before, or set head: materialized"
        )
    for hook in list(layer._forward_pre_hooks.values()):
        hook(layer, ())


def obstacles(
    student: torch.nn.Module, teachers: Sequence[torch.nn.Module], objective: Objective, vocab_size: int
) -> list[str]:
    """Return why these output layers cannot be fused with this loss; empty if they can. No teacher: a cache."""
    layers = (("student", student), *(("teacher", teacher) for teacher in teachers))
    found = [f"{name}: {why}" for name, layer in layers if (why := obstacle(layer))]
    return found + obstacles_of(objective, vocab_size)


def obstacles_of(objective: Objective, vocab_size: int) -> list[str]:
    """Return why no head can be fused with this loss; empty if one can."""
    found = []
    if objective.only_watches:
        found.append("kd_weight 0 trains on Megatron's own cross entropy, which takes logits")
    if objective.logit_losses:
        found.append(
            f"{', '.join(objective.names_of_logit_losses)}: not a sum over the vocabulary, so logits are needed"
        )
    if objective.cross_tokenizer is not None:
        found.append("cross_tokenizer: the weight of a token's gradient is known only after all tokens of its chunk")
    if objective.shares_part_of(vocab_size):
        found.append(
            f"shared_vocab {objective.shared_vocab} of the student's {vocab_size} tokens: divergence and cross entropy "
            "use different columns"
        )
    return found


def nothing_to_gain(
    weight: Tensor,
    num_tokens: int,
    chunk_tokens: int,
    of_chunks: int,
    gradient_in_place: bool,
    num_compared: int | None = None,
) -> list[str]:
    """Return why a fused head would not save memory; empty if it would. It holds the weight's gradient in fp32.

    Args:
        weight: [V/TP, h] of the student's output layer.
        num_tokens: tokens per micro-batch.
        chunk_tokens: tokens per chunk.
        of_chunks: bytes of the chunks in flight.
        gradient_in_place: whether backward overwrites materialized logits.
        num_compared: tokens with teacher logits; None for all.
    """
    size = weight.dtype.itemsize
    of_student = (1 if gradient_in_place else 2) * num_tokens
    logits = (of_student + (num_tokens if num_compared is None else num_compared)) * weight.shape[0] * size
    gradient = weight.numel() * (4 + size * (size < 4))  # and a chunk's product where it is not added in place
    if num_tokens <= chunk_tokens:
        return [f"a chunk would be {chunk_tokens} tokens"]
    if of_chunks + gradient >= logits:
        return [f"fused would take {_mib(of_chunks)} and {_mib(gradient)} for the weight's gradient"]
    return []


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.0f} MiB"
