"""In torch's deterministic mode losses and gradients on a GPU are equal to the bit, also in another process."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from abkd_megatron import AlphaBeta, ToDi, kernels
from abkd_megatron.vocab_parallel import VocabShard, vocab_parallel_distillation, vocab_parallel_distillation_head

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
TOKENS, VOCAB, HIDDEN = 300, 32000, 256


def digest(*tensors):
    """Of their bits."""
    bits = hashlib.sha256()
    for tensor in tensors:
        bits.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return bits.hexdigest()


def of_loss(divergence):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, TOKENS, VOCAB, device="cuda").bfloat16()
    student.requires_grad_()
    labels = torch.arange(TOKENS, device="cuda")
    terms = vocab_parallel_distillation(student, teacher, divergence, labels, VocabShard.megatron(VOCAB))
    loss = terms.divergence + terms.cross_entropy
    return digest(loss, *terms.metrics.values(), *torch.autograd.grad(loss.sum(), student))


def of_head(in_forward):
    torch.manual_seed(0)
    shapes = (TOKENS, HIDDEN), (VOCAB, HIDDEN)
    hidden, weight = (torch.randn(shape, device="cuda").bfloat16().requires_grad_() for shape in shapes)
    of_teacher = (torch.randn(shape, device="cuda").bfloat16() for shape in shapes)
    teacher_hidden, teacher_weight = of_teacher
    mask = torch.ones(TOKENS, device="cuda")
    loss, _ = vocab_parallel_distillation_head(
        hidden,
        weight,
        teacher_hidden,
        teacher_weight,
        AlphaBeta(0.2, 0.7),
        torch.arange(TOKENS, device="cuda"),
        VocabShard.megatron(VOCAB),
        token_weights=mask if in_forward else None,
        chunk_tokens=128,
    )
    return digest(loss, *torch.autograd.grad((loss * mask).sum(), (hidden, weight)))


def digests():
    """Of everything, once with each kernel."""
    found: dict[str, str] = {}
    for name in ("triton", "eager"):
        kernels.use(name)
        found |= {f"{name}, {divergence}": of_loss(divergence) for divergence in (AlphaBeta(0.2, 0.7), ToDi())}
        found |= {f"{name}, head, in forward {how}": of_head(how) for how in (True, False)}
    return found


def test_two_processes_give_the_same_bits():
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    found = []
    for _ in range(2):
        done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-4000:]
        found.append(json.loads(done.stdout.splitlines()[-1]))
    once, (other_once, other_twice) = found[0][0], found[1]
    assert found[0][1] == once, "twice in one process"
    assert other_once == other_twice == once


if __name__ == "__main__":
    torch.use_deterministic_algorithms(True)
    print(json.dumps([digests(), digests()]))
