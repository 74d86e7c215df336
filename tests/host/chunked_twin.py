"""Runs a step of distillation on one rank, and compares loss and gradients with a dense form of chunk likelihoods.

python chunked_twin.py FILE ARGUMENTS OF abkd_megatron. FILE gets the losses of the step, of the dense form, and the
distance of the gradients. The dense form decodes each row into bytes, tokenizes it again for the teacher, finds the
chunks token by token, and takes whole logits in fp64.
"""

import itertools
import json
import sys
from pathlib import Path

import torch
from megatron.core.utils import unwrap_model


def main() -> int:
    from megatron.training import get_args, get_tokenizer, training

    from abkd_megatron.__main__ import main as command_line
    from abkd_megatron.hosts import add_teacher

    attach, attached, batches, theirs = add_teacher.attach, [], [], []
    aligner_of = add_teacher.aligner_of

    def aligner_kept(tokenizer: object, args: object):
        theirs.append(args)
        return aligner_of(tokenizer, args)

    def attach_and_keep(student: list[torch.nn.Module], *args: object, **kwargs: object):
        unwrap_model(student[0]).register_forward_pre_hook(
            lambda _, args, kwargs: batches.append((args, kwargs)), with_kwargs=True
        )
        attached.append(attach(student, *args, **kwargs))
        attached[0].observers.append(Logged())
        return attached[0]

    def compare(model: list[torch.nn.Module], *_: object, **__: object) -> None:
        from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

        (attachment,), student = attached, unwrap_model(model[0])
        objective, teacher = attachment.objective, attachment.teacher.model
        logged = attachment.observers[0].sums
        attachment.detach()
        ours, other = get_tokenizer(), build_tokenizer(theirs[0])
        tau, total, count, of_divergence = objective.cross_tokenizer.temperature, 0.0, 0.0, 0.0
        for (ids, positions, mask_of_attention), kwargs in list(batches):
            labels, mask = kwargs["labels"], kwargs["loss_mask"]
            logits = student(ids, positions, mask_of_attention)[..., : get_args().vocab_size].double()
            log_q = logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
            total = total - objective.lm_weight * (log_q * mask).sum()
            count += mask.sum().item()
            for row, log_q_row in zip(torch.cat([ids[:, :1], labels], dim=1).tolist(), log_q, strict=True):
                mine, given, parts = chunks_of(row, ours, other)
                with torch.no_grad():
                    whole = torch.tensor([given])
                    found = teacher(whole[:, :-1], torch.arange(len(given) - 1).unsqueeze(0), None)
                    log_p = found[0, :, : other.vocab_size].double().log_softmax(-1)
                    log_p = log_p.gather(-1, whole[0, 1:].unsqueeze(-1)).squeeze(-1)
                for of_student, of_teacher in parts:
                    x, y = log_p[of_teacher].sum() / tau, log_q_row[of_student].sum() / tau
                    p, q = x.exp(), y.exp()
                    kl = p * (x - y) + (1 - p) * ((1 - p).log() - (1 - q).log())
                    of_divergence = of_divergence + tau * kl
                assert mine == row
        total = (total + objective.kd_weight * of_divergence) / count
        named = dict(student.named_parameters())
        gradients = torch.autograd.grad(total, list(named.values()))
        norm = torch.cat([it.flatten() for it in gradients]).norm()
        found = {
            name: ((gradient - named[name].main_grad).norm() / norm).item()
            for name, gradient in zip(named, gradients, strict=True)
        }
        result = {"kd loss": of_divergence.item() / count, "total loss": total.item(), "gradients": found}
        result["logged"] = {name: (value / number).item() for name, (value, number) in logged.items()}
        Path(sys.argv[1]).write_text(json.dumps(result))
        sys.exit(0)

    add_teacher.attach, add_teacher.aligner_of = attach_and_keep, aligner_kept
    training.finalize_model_grads = compare
    return command_line(sys.argv[2:])


class Logged:
    """The sums that are logged of a step, and what they are divided by."""

    def __init__(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}

    def begin(self, is_first: bool) -> None:
        pass

    def note_losses(self, logged: dict[str, torch.Tensor]) -> None:
        names = ("kd loss", "total loss")
        self.sums = {name: self.sums.get(name, 0) + logged[name].double() for name in names}


def chunks_of(row: list[int], ours, other) -> tuple[list[int], list[int], list[tuple[list[int], list[int]]]]:
    """The row, the teacher's tokens, and the places of each chunk's labels in both.

    For SentencePiece models that give every text back and rows that begin and end with a whole character.
    """
    pieces = [bytes_of(ours, token) if token != ours.eod else None for token in row]
    given: list[int] = []
    ends: list[dict[tuple[int, int], int]] = [{}, {}]  # {(document, bytes so far): tokens so far}
    document = [0, 0]
    texts: list[bytes] = [b""]
    place = 0
    for number, piece in enumerate(pieces, 1):
        if piece is None:
            document[0], place = document[0] + 1, 0
            texts.append(b"")
        else:
            place += len(piece)
            texts[-1] += piece
        ends[0][document[0], place] = number
    for number, text in enumerate(texts):
        place = 0
        for token in other.tokenize(text.decode()):
            given.append(token)
            place += len(bytes_of(other, token))
            ends[1][number, place] = len(given)
        if number + 1 < len(texts):
            given.append(other.eod)
            ends[1][number + 1, 0] = len(given)
    common = sorted(ends[0].keys() & ends[1].keys())
    parts = []
    for before, after in itertools.pairwise(common):
        # The label of token i is at place i - 1.
        parts.append(tuple(list(range(of[before] - 1, of[after] - 1)) for of in ends))
    return row, given, parts


def bytes_of(tokenizer, token: int) -> bytes:
    model = tokenizer._tokenizer.tokenizer
    piece = model.id_to_piece(token)
    return bytes([int(piece[3:5], 16)]) if model.is_byte(token) else piece.replace("\u2581", " ").encode()


if __name__ == "__main__":
    sys.exit(main())
