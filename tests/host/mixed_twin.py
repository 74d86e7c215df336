"""Runs a step of distillation on one rank, and compares its gradients with those of a dense form of mixed sequences.

python mixed_twin.py FILE ARGUMENTS OF abkd_megatron. FILE gets the loss of the step and that of the dense form. The
dense form gives both models mixed embeddings as `decoder_input` and takes the divergence of whole logits in fp64.
"""

import json
import sys
from pathlib import Path

import torch
from megatron.core.utils import unwrap_model


def main() -> int:
    from megatron.training import get_args, training

    from abkd_megatron.__main__ import main as command_line
    from abkd_megatron.hosts import add_teacher

    attach, attached, batches = add_teacher.attach, [], []

    def attach_and_keep(student: list[torch.nn.Module], *args: object, **kwargs: object):
        unwrap_model(student[0]).register_forward_pre_hook(
            lambda _, args, kwargs: batches.append((args, kwargs)), with_kwargs=True
        )
        attached.append(attach(student, *args, **kwargs))
        return attached[0]

    def compare(model: list[torch.nn.Module], *_: object, **__: object) -> None:
        (attachment,), student, teacher = attached, unwrap_model(model[0]), attached[0].teacher.model
        mix, seed = attachment.objective.mix, get_args().seed
        attachment.detach()

        def logits(of: torch.nn.Module, ids: torch.Tensor, rest: tuple, draw) -> torch.Tensor:
            whole = of.embedding(input_ids=ids, position_ids=rest[0])
            mixed = [
                share * whole[:, own] + (1 - share) * whole[:, draw.partners[own]]
                for own, share in enumerate(draw.shares)
            ]
            return of(None, *rest, decoder_input=torch.stack(mixed, dim=1))

        total, num_batches = 0.0, len(batches)
        for number, ((ids, *rest), kwargs) in enumerate(list(batches)):
            draw = mix.draw(seed, 0, number, len(ids))
            with torch.no_grad():
                theirs = logits(teacher, ids, tuple(rest), draw)
            ours = logits(student, ids, tuple(rest), draw)
            size = get_args().vocab_size
            log_p, log_q = (it[..., :size].double().log_softmax(dim=-1) for it in (theirs, ours))
            loss = (log_p.exp() * (log_p - log_q)).sum(dim=-1)
            mask = kwargs["loss_mask"]
            total = total + (loss * mask).sum() / mask.sum() / num_batches
        named = dict(student.named_parameters())
        gradients = torch.autograd.grad(total, list(named.values()))
        norm = torch.cat([it.flatten() for it in gradients]).norm()
        found = {
            name: ((gradient - named[name].main_grad).norm() / norm).item()
            for name, gradient in zip(named, gradients, strict=True)
        }
        Path(sys.argv[1]).write_text(json.dumps({"loss": total.item(), "gradients": found, "batches": num_batches}))
        sys.exit(0)

    add_teacher.attach, training.finalize_model_grads = attach_and_keep, compare
    return command_line(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
