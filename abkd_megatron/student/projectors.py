"""Projectors of hidden losses: parameters of the student that map its hidden states to the teacher's hidden size.

Legend: s sequence, b micro-batch, h and H the student's and the teacher's hidden size.
"""

import zlib
from collections.abc import Collection, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from abkd_megatron.errors import ConfigError
from abkd_megatron.losses.hidden import HiddenLoss
from abkd_megatron.teacher.model import Model

PROJECTORS = "distillation_projectors"
"""Name of the student's submodule, and prefix of the projectors' names in its checkpoint."""


class Projectors(torch.nn.ModuleDict):
    """The projectors of one model chunk by `HiddenLoss.pair`: bias-free Linear layers h -> H.

    They are replicated over the tensor-parallel group.

    Args:
        tp_group: the student's tensor-parallel group.
        absent: as in `add_projectors`.
    """

    def __init__(self, tp_group: dist.ProcessGroup, absent: Collection[str]) -> None:
        super().__init__()
        self._tp_group = tp_group
        self._absent = set(absent)

    def project(self, pair: str, hidden_states: Tensor) -> Tensor:
        """Project [s, b, h] -> [s, b, H]. It calls the module, because DDP's hooks may wait for its parameter."""
        self._absent.clear()  # loading is over
        projected: Tensor = self[pair](hidden_states)
        return projected

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return the sharded state dict, without the projectors that the initial checkpoint does not have."""
        here = self.state_dict(prefix="", keep_vars=True)
        asked = {name: weight for name, weight in here.items() if name.partition(".")[0] not in self._absent}
        sharded: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            asked,
            prefix,
            {},
            sharded_offsets,
            tp_group=self._tp_group,
            dp_cp_group=(metadata or {}).get("dp_cp_group"),
        )
        return sharded

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name, weight in self.state_dict().items():
            if name.partition(".")[0] in self._absent:
                state_dict.setdefault(prefix + name, weight)
        super()._load_from_state_dict(state_dict, prefix, *args)


def add_projectors(
    student: Sequence[Model],
    losses: Sequence[HiddenLoss],
    teacher_hidden_size: int,
    *,
    tp_group: dist.ProcessGroup,
    absent: Collection[str] = (),
    seed: int = 0,
) -> None:
    """Add projectors to the student before Megatron wraps it; for a hook in `GPTModelConfig.pre_wrap_hooks`.

    They are ordinary parameters of the student: Megatron's optimizer trains them and its checkpoint contains them as
    ``distillation_projectors.{student layer}-{teacher layer}.weight``, [H, h]. `Attachment.detach` removes them.
    Initial values are normal with standard deviation h^-1/2. They depend only on `seed` and the pair of layers, and do
    not advance the random generators of torch or Megatron.

    Args:
        student: this rank's model chunks, not yet wrapped.
        losses: all hidden losses of the objective. Losses without a projector and losses of other ranks' layers are
            skipped.
        teacher_hidden_size: H.
        tp_group: the student's tensor-parallel group.
        absent: `HiddenLoss.pair` of projectors that the initial checkpoint does not have; they keep their initial
            values when it is loaded. All projectors are saved.
        seed: of the initial values.

    Raises:
        ConfigError: the student has projectors already, or is built on the meta device.

    Collectives: none.
    """
    for chunk in student:
        if hasattr(chunk, PROJECTORS):
            raise ConfigError("this student has projectors already; call add_projectors() once, with all hidden losses")
        layers, config = layer_numbers(chunk), chunk.config
        here = [loss for loss in losses if loss.projector and loss.student_layer in layers]
        if not here:
            continue
        projectors, like = Projectors(tp_group, absent), next(chunk.parameters())
        if like.is_meta:
            raise ConfigError("projectors are initialized when they are added; remove init-model-with-meta-device")
        for loss in here:
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {loss.pair}".encode()))
            weight = torch.randn((teacher_hidden_size, config.hidden_size), generator=generator, device="cpu")
            linear = torch.nn.Linear(config.hidden_size, teacher_hidden_size, bias=False, device="meta")
            linear.weight = torch.nn.Parameter((weight / config.hidden_size**0.5).to(like.device, config.params_dtype))
            # Each rank then has a part of the sequence. Megatron sums the gradients of such parameters over the ranks.
            linear.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
            projectors[loss.pair] = linear
        chunk.add_module(PROJECTORS, projectors)


def check_projector(chunk: Model, loss: HiddenLoss, teacher_hidden_size: int) -> None:
    """Reject a model chunk without the projector of a hidden loss, or with another shape.

    Args:
        chunk: the student's, with the layer of `loss`.
        loss: with a projector.
        teacher_hidden_size: H.

    Raises:
        ConfigError: with what to call.
    """
    projectors = getattr(chunk, PROJECTORS, {})
    if loss.pair not in projectors:
        raise ConfigError(
            f"{loss.name} has a projector, which the student lacks: Megatron must see it before it wraps the model; "
            "call add_projectors() in a pre_wrap_hook"
        )
    shape, wanted = tuple(projectors[loss.pair].weight.shape), (teacher_hidden_size, chunk.config.hidden_size)
    if shape != wanted:
        raise ConfigError(f"{loss.name}: expected a projector of {wanted}, got {shape}; call add_projectors() with it")


def layer_numbers(model: Model) -> list[int]:
    """Return the numbers of a model chunk's layers, counted over the whole model from 1."""
    return [layer.layer_number for layer in model.decoder.layers]
