"""Numerical errors of the losses on difficult logits, compared with fp64: ``python benchmarks/accuracy.py``.

The logits of both models are exactly representable in bf16, so only arithmetic differs. The reference is the dense fp64
definition (losses/reference.py) with autograd. Each case runs with the logits in bf16 and in fp32. Measured per kernel:

- loss: the largest |D - D64| / (1e-6 + 1e-5 D64) over the tokens, for both dtypes; the limit is 1. For fp32 also the
  largest absolute error, and relative to D64. For losses far below 1e-6 only the relative error is meaningful. For the
  smallest not even this one is, because the terms cancel in fp64 too.
- gradient: the largest error relative to the row's largest element, for fp32 only; the limit is 1e-5. In bf16, rounding
  of the result alone costs up to 2^-8.

With equal models, loss and gradient must be exactly 0. For comparison, the table has plain fp32 autograd from both
log-softmaxes.

Values above a limit are marked and listed below the table. For a student that is certain of one token, gradients
h_j - q_j H are far smaller than h and H. This is reported as the reason if the error is at most a few times the effect
of a single fp32 rounding of H. Another reason are gradients so small that the definition loses them in fp64.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from loss import machine
from torch import Tensor

from abkd_megatron import AlphaBeta, ToDi, kernels, vocab_parallel_divergence
from abkd_megatron.losses import (
    Divergence,
    JensenShannon,
    SkewForwardKL,
    SkewReverseKL,
    TotalVariation,
    WeightedSum,
    reference_divergence,
)

Row = dict[str, Any]
Loss = Callable[[Tensor, Tensor, Divergence], Tensor]
"""Loss per token [N] of student and teacher logits [N, V]."""

LOSSES: dict[str, Divergence] = {
    "alpha-beta 0.2, 0.7": AlphaBeta(0.2, 0.7),
    "alpha-beta 0.01, 0.9": AlphaBeta(0.01, 0.9),
    "alpha-beta 0.5, 0.5": AlphaBeta(0.5, 0.5),
    "forward KL": AlphaBeta(1.0, 0.0),
    "reverse KL": AlphaBeta(0.0, 1.0),
    "ToDi": ToDi(),
    "ToDi, not detached": ToDi(detach=False),
    "alpha-beta 1.2, -0.3": AlphaBeta(1.2, -0.3),
    "Jensen-Shannon": JensenShannon(),
    "skew forward KL": SkewForwardKL(),
    "skew reverse KL": SkewReverseKL(),
    "total variation": TotalVariation(),
    "sum of three": WeightedSum([(1.0, AlphaBeta(0.2, 0.7)), (0.5, AlphaBeta(1.0, 0.0)), (2.0, JensenShannon())]),
}
EQUAL = "equal"
OTHER_DEVICE = {"cpu": "triton", "cuda": "cpp"}
"""The kernel that does not run on a device."""
PEER = "autograd, log space"
LIMITS = {"loss": 1.0, "loss, bf16": 1.0, "gradient": 1e-5}
ROUNDING, FEW, OF_DEFINITION = 2.0**-24, 8, 2.0**-49


def cases(tokens: int, vocab: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Return {case: student and teacher logits [N, V] in bf16}."""
    generator = torch.Generator().manual_seed(0)

    def randn(deviation: float) -> Tensor:
        return deviation * torch.randn(tokens, vocab, generator=generator)

    def peak() -> Tensor:
        one = torch.randint(vocab, (tokens, 1), generator=generator)
        return torch.zeros(tokens, vocab).scatter_(-1, one, 30.0)

    same, near = peak(), randn(2)
    peaked = randn(2) + peak()
    pairs = {
        "randn*2": (randn(2), randn(2)),
        "both peaked": (randn(2) + same, randn(2) + same),
        "near": (near + randn(0.02), near),
        "peaked and near": (peaked + randn(0.02), peaked),
        "offset": (randn(2) + 200, randn(2) - 300),
        "randn*20": (randn(20), randn(20)),
        EQUAL: (near, near),
    }
    return {name: (student.bfloat16(), teacher.bfloat16()) for name, (student, teacher) in pairs.items()}


def from_logs(log_q: Tensor, log_p: Tensor, divergence: Divergence) -> Tensor:
    """Return the loss from log-probabilities, in their dtype, for autograd."""
    rho = log_p - log_q
    if isinstance(divergence, ToDi):
        w = torch.sigmoid(divergence.scale * rho)
        w = w.detach() if divergence.detach else w
        return (w * log_p.exp() * rho - (1 - w) * log_q.exp() * rho).sum(-1)
    if not isinstance(divergence, AlphaBeta):  # as defined, from the logs as logits
        return reference_divergence(divergence, log_q, log_p)
    a, b = divergence.alpha, divergence.beta
    if (a, b) == (1, 0):
        return (log_p.exp() * rho).sum(-1)
    if (a, b) == (0, 1):
        return -(log_q.exp() * rho).sum(-1)
    of_p, of_q = torch.exp((a + b) * log_p), torch.exp((a + b) * log_q)
    return -(torch.exp(a * log_p + b * log_q) - a / (a + b) * of_p - b / (a + b) * of_q).sum(-1) / (a * b)


def dense(student: Tensor, teacher: Tensor, divergence: Divergence) -> Tensor:
    """Return the loss by its dense definition."""
    return reference_divergence(divergence, student, teacher)


def autograd_loss(student: Tensor, teacher: Tensor, divergence: Divergence) -> Tensor:
    """Return the peer's loss."""
    return from_logs(student.float().log_softmax(-1), teacher.float().log_softmax(-1), divergence)


def ours(kernel: str) -> Loss:
    """Return a function for this package's losses with a kernel."""

    def loss(student: Tensor, teacher: Tensor, divergence: Divergence) -> Tensor:
        kernels.use(kernel)
        return vocab_parallel_divergence(student, teacher, divergence)

    return loss


def differentiated(loss: Loss, student: Tensor, teacher: Tensor, divergence: Divergence) -> tuple[Tensor, Tensor]:
    """Return loss [N] and gradient [N, V]."""
    leaf = student.clone().requires_grad_()
    value = loss(leaf, teacher, divergence)
    return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]


class Exact:
    """Loss and gradient of a pair in fp64, and errors relative to them."""

    def __init__(self, divergence: Divergence, student: Tensor, teacher: Tensor) -> None:
        self.divergence, self.student, self.teacher = divergence, student.float(), teacher.float()
        self.loss, self.gradient = differentiated(dense, student.double(), teacher.double(), divergence)
        if torch.equal(student, teacher):  # the definition cancels to almost 0
            self.loss, self.gradient = torch.zeros_like(self.loss), torch.zeros_like(self.gradient)
        self.largest = self.gradient.abs().amax(-1)

    def of_loss(self, loss: Tensor) -> Tensor:
        """Return the error divided by its limit, [N]."""
        return (loss - self.loss).abs() / (1e-6 + 1e-5 * self.loss)

    def of_gradient(self, gradient: Tensor) -> Tensor:
        """Return the error relative to the row's largest element, [N]; absolute if that is 0."""
        return (gradient - self.gradient).abs().amax(-1) / self.largest.where(self.largest > 0, 1.0)

    def result(self, loss: Loss, limits: dict[str, float]) -> Row:
        """Return the largest errors of a loss over the tokens, and those above a limit."""
        value, gradient = differentiated(loss, self.student, self.teacher, self.divergence)
        with torch.no_grad():
            of_bf16 = self.of_loss(loss(self.student.bfloat16(), self.teacher.bfloat16(), self.divergence))
        errors = {"loss": self.of_loss(value), "loss, bf16": of_bf16, "gradient": self.of_gradient(gradient)}
        absolute = (value - self.loss).abs()
        result: Row = {name: error.max().item() for name, error in errors.items()}  # NaN if any is
        result["absolute"] = absolute.max().item()
        result["relative"] = (absolute / self.loss.clamp_min(1e-300)).max().item()
        above = [name for name, limit in limits.items() if not result[name] <= limit]
        result["above"] = [self.finding(name, int(errors[name].argmax()), result[name]) for name in above]
        return result

    def finding(self, name: str, token: int, error: float) -> Row:
        """Describe an error above its limit: the token, and the reason if it is known."""
        found: Row = {"what": name, "error": error, "token": token, "loss": self.loss[token].item()}
        largest = found["largest gradient"] = self.largest[token].item()
        if name == "gradient" and largest > 0:
            alone = found["rounding H alone"] = self.of_rounded_sum(token) / largest
            if error <= FEW * alone:
                found["why"] = f"rounding H to fp32 alone gives {alone:.1e}"
            elif error * largest <= OF_DEFINITION:
                found["why"] = "terms of order 1 cancel in the definition, in fp64"
        return found

    def of_rounded_sum(self, token: int) -> float:
        """Return the largest effect of one fp32 rounding of H on a row's gradients h_j - q_j H.

        A multiple of q in h changes H only. The h here is 0 for equal models.
        """
        log_q, log_p = (x[token].double().log_softmax(-1) for x in (self.student, self.teacher))
        h = differentiated(from_logs, log_q, log_p, self.divergence)[1]
        h -= differentiated(from_logs, log_q, log_q, self.divergence)[1]
        return (log_q.exp().max() * h.sum().abs()).item() * ROUNDING


def measure(contestants: dict[str, Loss], tokens: int, vocab: int, device: str = "cpu") -> list[Row]:
    """Return one row per case and loss, with the results of every contestant."""
    rows: list[Row] = []
    for case, pair in cases(tokens, vocab).items():
        student, teacher = (logits.to(device) for logits in pair)
        limits = dict.fromkeys(LIMITS, 0.0) if case == EQUAL else LIMITS
        for name, divergence in LOSSES.items():
            exact = Exact(divergence, student, teacher)
            row = {"case": case, "loss": name, "largest loss": exact.loss.max().item()}
            row["largest gradient"] = exact.largest.max().item()
            rows.append({**row, "results": {who: exact.result(loss, limits) for who, loss in contestants.items()}})
    return rows


def cells(result: Row, names: tuple[str, ...]) -> str:
    """Format the numbers of a result, marking those above a limit."""
    above = {found["what"] for found in result["above"]}
    return "".join(f"{result[name]:>13.1e}{'!' if name in above else ' '}" for name in names)


def table(rows: list[Row], contestant: str) -> str:
    """Format the rows of one contestant next to the peer, and list errors above a limit."""
    names, of_peer = ("loss", "loss, bf16", "absolute", "relative", "gradient"), ("loss", "gradient")
    heads = ["largest D64", *names, "largest g64", *(f"peer {name}" for name in of_peer)]
    text = f"{contestant}; peer: {PEER}\n{'':38}" + "".join(f"{head:>13} " for head in heads)
    listed = ""
    for row in rows:
        result, title = row["results"][contestant], f"{row['case']:16} {row['loss']:20}"
        text += f"\n{title} {row['largest loss']:>13.1e} {cells(result, names)}{row['largest gradient']:>13.1e} "
        text += cells(row["results"][PEER], of_peer)
        for found in result["above"]:
            listed += f"\n  {title} {found['what']} {found['error']:.1e} of token {found['token']}"
            listed += f" (D64 {found['loss']:.1e}, largest g64 {found['largest gradient']:.1e})"
            listed += f": {found.get('why', 'no reason found')}"
    return f"{text}\nloss <= 1 and gradient <= 1e-5, equal models 0; above (!):{listed or ' none'}\n"


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--kernels", nargs="+", choices=kernels.NAMES, help="default: all of the device")
    parser.add_argument("--tokens", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=131072)
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "accuracy.json")
    given = parser.parse_args()
    given.kernels = given.kernels or [name for name in kernels.NAMES if name != OTHER_DEVICE[given.device]]

    where = machine() | ({"GPU": torch.cuda.get_device_name()} if given.device == "cuda" else {})
    report: Row = {"machine": where, "tokens": given.tokens, "vocab": given.vocab, "limits": LIMITS}
    contestants = {name: ours(name) for name in given.kernels} | {PEER: autograd_loss}
    report["rows"] = measure(contestants, given.tokens, given.vocab, given.device)
    for name in given.kernels:
        print(table(report["rows"], name), flush=True)
    given.json.parent.mkdir(parents=True, exist_ok=True)
    given.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
