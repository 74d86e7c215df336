"""Megatron's language models that can be student or teacher, and their output without their own head.

The only module that imports their classes. Megatron-Core 0.19 deprecates GPTModel in favor of HybridModel.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from megatron.core.dist_checkpointing.gpt_checkpoint_interop import (
    gpt_compatible_layer_maps,
    retarget_sharded_state_dict_to_gpt_checkpoint,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.transformer.multi_token_prediction import process_mtp_loss
from torch import Tensor

from abkd_megatron.errors import CheckpointError, HostError
from abkd_megatron.losses.mixed_sequences import Draw

Model: TypeAlias = GPTModel | HybridModel  # noqa: UP040 (isinstance takes no `type`)

ContextOf = Callable[[tuple[Any, ...], dict[str, Any]], Any]

# Arguments of a forward that GPTModel passes on to its `output_processor`.
_PASSED_ON = (
    *("input_ids", "position_ids", "attention_mask", "decoder_input", "labels", "loss_mask", "packed_seq_params"),
    *("inference_context", "runtime_gather_output"),
)


def takes_output_processor(model: torch.nn.Module) -> bool:
    """Return whether the model's forward takes an `output_processor`, as GPTModel's does."""
    return "output_processor" in inspect.signature(model.forward).parameters


def pattern_of_model(model: torch.nn.Module) -> str | None:
    """Return the layer pattern of a HybridModel, None for a GPTModel."""
    return model.hybrid_layer_pattern if isinstance(model, HybridModel) else None


@contextmanager
def without_head(model: Model) -> Iterator[None]:
    """Let the model's forward return its last hidden states, [s, b, h], after the final norm.

    For a model without multi-token prediction.
    """
    kept, model.post_process = model.post_process, False
    try:
        yield
    finally:
        model.post_process = kept


@contextmanager
def mixed_embeddings(model: Model, draw: Draw | None) -> Iterator[None]:
    """Let a model mix the sequences that it embeds.

    Args:
        model: one without an embedding is left as it is.
        draw: None to mix nothing.
    """
    if draw is None or not model.pre_process:
        yield
        return
    hook = model.embedding.register_forward_hook(lambda _module, _args, output: draw.mix(output))
    try:
        yield
    finally:
        hook.remove()


def process_output(model: Model, context_of: ContextOf, process: Callable[..., Tensor]) -> list[Any]:
    """Let `process` compute a model's output from its last hidden states, in place of the model's own head.

    `process` is called with keywords, as GPTModel calls its `output_processor`. A forward that takes none, as
    HybridModel's, ends with the hidden states, and a forward hook calls `process`.

    Args:
        model: with an output layer.
        context_of: called before every forward with its arguments, positional and by keyword. What it returns is given
            to `process` as `context`; None leaves that forward as it is.
        process: returns the output of the forward.

    Returns:
        Handles of hooks. Without them the model is what it was before. So it is after an error in a forward.

    Raises:
        HostError: in a forward, if it has ended without a call of `process`.
    """
    return _OutputProcessor(model, context_of, process).hooks


class _OutputProcessor:
    def __init__(self, model: Model, context_of: ContextOf, process: Callable[..., Tensor]) -> None:
        self._context_of, self._process = context_of, process
        self._signature = inspect.signature(model.forward)
        self._is_native = takes_output_processor(model)
        self._context: Any = None
        self._post_process = model.post_process
        self.hooks = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            # First of all, since no other hook may see hidden states as the output; and also after an error, which must
            # not leave the model without its head.
            model.register_forward_hook(self._after, with_kwargs=True, prepend=True, always_call=True),
        ]

    def _before(self, model: Model, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        self._context = None
        self._context = context = self._context_of(args, kwargs)
        if context is None:
            return None
        if self._is_native:
            return args, {**kwargs, "output_processor": self._run, "output_processor_context": context}
        self._post_process, model.post_process = model.post_process, False
        return None

    def _run(self, **given: Any) -> Tensor:
        self._context = None
        return self._process(**given)

    def _after(self, model: Model, args: tuple, kwargs: dict[str, Any], output: Tensor | None) -> Tensor | None:
        if self._context is None:  # nothing was asked, or it is done
            return None
        if not self._is_native:
            model.post_process = self._post_process
        if output is None:  # the forward has raised
            self._context = None
            return None
        if self._is_native:
            self._context = None
            raise HostError(_not_run(model, "takes an output_processor and did not call it"))
        batch = self._signature.bind_partial(*args, **kwargs).arguments
        try:
            return self._run(**_given(model, output, batch), context=self._context)
        finally:
            self._context = None


def _given(model: Model, hidden_states: Tensor, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return what GPTModel gives its `output_processor`, after the losses of multi-token prediction."""
    config = model.config
    if hidden_states.dim() != 3 or hidden_states.shape[-1] != config.hidden_size:
        shape = list(hidden_states.shape)
        raise HostError(_not_run(model, f"returned {shape} without post_process, not [s, b, {config.hidden_size}]"))
    passed_on = {name: batch.get(name) for name in _PASSED_ON}
    tied = model.share_embeddings_and_output_weights
    output_weight = model.shared_embedding_or_output_weight() if tied else None
    # As in the forward. compute_mtp_loss is an argument from megatron-core 0.20 on.
    if config.mtp_num_layers is not None and model.mtp_process and batch.get("compute_mtp_loss", True):
        hidden_states = process_mtp_loss(
            hidden_states=hidden_states,
            labels=passed_on["labels"],
            loss_mask=passed_on["loss_mask"],
            output_layer=model.output_layer,
            output_weight=output_weight,
            runtime_gather_output=passed_on["runtime_gather_output"],
            is_training=model.training,
            compute_language_model_loss=model.compute_language_model_loss,
            config=config,
            cp_group=model.pg_collection.cp,
            tp_group=model.tp_group,
            packed_seq_params=passed_on["packed_seq_params"],
            scale_logits_fn=model._scale_logits if config.use_mup else None,
            input_ids=passed_on["input_ids"],
        )
    return {
        "hidden_states": hidden_states,
        "output_layer": model.output_layer,
        "output_weight": output_weight,
        "compute_language_model_loss": model.compute_language_model_loss,
        "scale_logits": model._scale_logits,
        "config": config,
        **passed_on,
    }


def _not_run(model: Model, why: str) -> str:
    return (
        f"the distillation loss was not computed: the forward of {type(model).__name__} {why}; install a megatron-core "
        "release that this package supports, or use one of its model classes unchanged"
    )


def read_gpt_checkpoint(wanted: dict[str, Any], pattern: str) -> None:
    """Make a HybridModel's sharded state dict ask for the tensors of a GPTModel's checkpoint.

    Args:
        wanted: of the model; changed in place.
        pattern: the model's layer pattern, as `check_gpt_source` accepts it.
    """
    retarget_sharded_state_dict_to_gpt_checkpoint(wanted, gpt_compatible_layer_maps(pattern))


def check_gpt_source(pattern: str, who: str) -> int:
    """Reject a layer pattern for which the checkpoint of a GPTModel does not have the weights.

    Args:
        pattern: of a HybridModel.
        who: "student" or "teacher". Mamba layers of a student may start with new weights.

    Returns:
        The number of layers of the GPTModel: each is two layers of the pattern, attention and MLP or experts.

    Raises:
        CheckpointError: in Megatron's words, or naming a teacher's layers that have no source.
    """
    try:
        maps = gpt_compatible_layer_maps(pattern)
    except ValueError as error:
        raise CheckpointError(
            f"{who}: a GPTModel's checkpoint does not have the layers of this model: {error} Change "
            "hybrid-layer-pattern, or load a HybridModel's checkpoint"
        ) from error
    if who == "teacher" and maps.fresh_init:
        raise CheckpointError(
            f"teacher: hybrid-layer-pattern {pattern} has Mamba layers, for which a GPTModel's checkpoint has no "
            "weights; give teacher.load a HybridModel's checkpoint, or a pattern of * and - or E"
        )
    return maps.num_gpt_layers
