"""Divergence of multi-token predictions: what the student predicts ahead, against what the teacher predicts there.

Head k = 1 .. D of the student predicts at position t the token after t + k. The teacher predicts that token at t + k,
so its hidden states are shifted by k:

    mtp_weight / D * sum over k and t of mask(t + k) * D(teacher at t + k || head k at t)

divided by the number of counted tokens of the step, as the main loss is. Positions whose shifted one is beyond the end
of their sequence have no term. Megatron's own cross entropy of these heads stays (mtp-loss-scaling-factor).

Legend: s sequence, b micro-batch, h hidden size, D heads.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.multi_token_prediction import roll_tensor
from torch import Tensor

from abkd_megatron.losses.objective import Objective
from abkd_megatron.student.added import add_loss
from abkd_megatron.student.head import compute_loss
from abkd_megatron.teacher.model import Model
from abkd_megatron.teacher.output_layer import OutputLayer


class AheadLosses:
    """Takes the hidden states of a model's multi-token prediction as they pass, and computes their divergence.

    Args:
        model: the student's last stage.

    Attributes:
        report: {name: (weight, sum over counted tokens)} of the last micro-batch.
    """

    def __init__(self, model: Model) -> None:
        self._config = model.config
        self._hidden_states: Tensor | None = None
        self.report: dict[str, tuple[float, Tensor]] = {}
        self.hook = model.mtp.register_forward_hook(self._note)

    def _note(self, block: torch.nn.Module, args: tuple, output: Tensor) -> None:
        self._hidden_states = output

    def add(
        self,
        student: OutputLayer,
        teacher: OutputLayer,
        objective: Objective,
        packed: PackedSeqParams | None,
        of_main: Mapping[str, Any],
    ) -> OutputLayer:
        """Compute the losses of the micro-batch whose hidden states have passed.

        Args:
            student: of the main prediction.
            teacher: of the same tokens.
            objective: its divergence, temperature and `mtp_weight` are used.
            packed: boundaries of sequences, if they are packed.
            of_main: the keywords of `compute_loss` for the main prediction.

        Returns:
            The student with hidden states whose backward also backpropagates these losses.

        Collectives: per head those of `compute_loss`, and with context parallelism messages between neighbors. With
        sequence parallelism one all-gather of the teacher's hidden states. Megatron reads the boundaries of packed
        sequences on the host, which waits for the device, as it does for its own losses of these heads.
        """
        assert self._hidden_states is not None
        of_heads = self._hidden_states.chunk(1 + (depth := self._config.mtp_num_layers))[1:]
        self._hidden_states, self.report = None, {}
        tp_group, cp_group = of_main["tp_group"], of_main["cp_group"]
        labels, mask = of_main["labels"].transpose(0, 1), of_main["loss_mask"]
        mask = mask.transpose(0, 1).float() if mask is not None else torch.ones_like(labels, dtype=torch.float32)
        count = mask.sum().to(torch.int)
        ahead = replace(objective, kd_weight=1.0, lm_weight=0.0, hidden_losses=(), logit_losses=(), mtp_weight=0.0)
        weight = student.weight.detach() if self._config.mtp_detach_heads else student.tied_weight
        is_split = bool(getattr(teacher.layer, "sequence_parallel", False))
        of_teacher = teacher.whole_hidden_states(tp_group).detach().permute(1, 2, 0)  # the last one is rolled
        whole = torch.zeros((), device=mask.device)
        for number, hidden_states in enumerate(of_heads, 1):
            of_teacher, mask, labels = (
                roll_tensor(it, cp_group=cp_group, packed_seq_params=packed)[0] for it in (of_teacher, mask, labels)
            )
            shifted = of_teacher.permute(2, 0, 1)
            if is_split:
                shifted = shifted.chunk(tp_group.size())[tp_group.rank()]
            of_tokens = mask.transpose(0, 1)
            given = {**of_main, "labels": labels.transpose(0, 1), "loss_mask": of_tokens}
            loss = compute_loss(
                replace(student, hidden_states=hidden_states, tied_weight=weight),
                replace(teacher, hidden_states=shifted.contiguous()),
                ahead,
                **{**given, "kd_weights": None, "lm_weights": None},
            )
            total = torch.where(of_tokens == 0, 0.0, loss.total * of_tokens).sum()
            of_head = objective.mtp_weight / depth
            self.report[f"mtp {number} kd loss"] = of_head, total.detach()
            whole = whole + of_head * total
        if not torch.is_grad_enabled():
            return student
        return replace(student, hidden_states=add_loss(student.hidden_states, whole, self._config, count))
