"""Megatron's own output layer against the fused head, on this rank of a tensor-parallel group: a line of JSON.

Four micro-batches accumulate. Of every case: the largest error of losses, terms and gradients over what is allowed.
"""

import dataclasses
import itertools
import json
from datetime import timedelta

SEQUENCE, BATCH, VOCAB, PADDED, HIDDEN, TEACHER_HIDDEN = 8, 3, 250, 256, 16, 24


def main() -> None:
    from abkd_megatron import cpu_backend

    cpu_backend.install()
    cpu_backend.init_process_group(timedelta(minutes=3))

    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=dist.get_world_size())
    model_parallel_cuda_manual_seed(1)
    allowed = {torch.float32: 1e-5, torch.float64: 1e-10}
    cases = itertools.product((False, True), (False, True), (False, True), allowed)
    found = {}
    for sequence_parallel, tied, mup, dtype in cases:
        if sequence_parallel and dist.get_world_size() == 1:
            continue
        case = Case(sequence_parallel, tied, mup, dtype)
        wanted, got, in_main_grad, unmasked = (
            case.run(head, **how)
            for head, how in (
                ("materialized", {}),
                ("fused", {}),
                ("fused", {"main_grad": True}),
                ("fused", {"mask_known": False}),
            )
        )
        for name, other in (("fused", got), ("main grad", in_main_grad), ("mask unknown", unmasked)):
            worst = max(error(other[key], wanted[key]) for key in other) / allowed[dtype]
            found[f"{name}: sp {sequence_parallel}, tied {tied}, mup {mup}, {dtype}"] = worst
        if mup:
            continue
        of_some = case.run("materialized", every=3)
        # Positions 2 and 5; with sequence parallelism a rank's part of as many rows as divide over the ranks.
        ranks = dist.get_world_size()
        rows = -(-2 * BATCH // ranks) * ranks if sequence_parallel else 2 * BATCH
        assert of_some.pop("rows of the teacher") == 4 * rows
        assert wanted.pop("rows of the teacher") == 4 * SEQUENCE * BATCH
        selected = (torch.arange(SEQUENCE) % 3 == 2).unsqueeze(-1)
        composed = {}
        for key, value in wanted.items():
            if key.startswith("cross entropy"):
                composed[key] = value
            if key.startswith("divergence"):
                composed[key] = torch.where(selected, value, 0.0)
                cross_entropy = wanted[key.replace("divergence", "cross entropy")]
                composed[key.replace("divergence", "loss")] = 0.7 * composed[key] + 0.4 * cross_entropy
        of_some_fused = {
            name: case.run("fused", every=3, **how)
            for name, how in (("some, fused", {}), ("some, main grad", {"main_grad": True}))
        }
        pairs = [("some, materialized", of_some, composed)]
        pairs += [(name, other, of_some) for name, other in of_some_fused.items()]
        in_place = case.run("materialized", every=3, in_place=True)
        in_place.pop("rows of the teacher")
        pairs += [("some, in place", in_place, of_some)]
        # At temperature 2 the factor is 4; the divergence itself has none.
        scaled = case.run("materialized", kd_weight=4 * 0.7)
        scaled.pop("rows of the teacher")
        for key in [key for key in scaled if key.startswith("distillation")]:
            scaled[key] = 4 * scaled[key]
        pairs += [(f"squared, {head}", case.run(head, squared=True), scaled) for head in ("materialized", "fused")]
        for name, got, wanted in pairs:
            worst = max(error(got[key], wanted[key]) for key in wanted) / allowed[dtype]
            found[f"{name}: sp {sequence_parallel}, tied {tied}, mup {mup}, {dtype}"] = worst
    print("FOUND " + json.dumps(found), flush=True)
    dist.barrier()


def error(got, wanted) -> float:
    assert got.shape == wanted.shape and got.dtype == wanted.dtype
    return ((got - wanted).abs().amax() / wanted.abs().amax().clamp_min(1e-30)).item()


@dataclasses.dataclass
class Case:
    sequence_parallel: bool
    tied: bool
    mup: bool
    dtype: object

    def layer(self, hidden_size):
        import torch
        from megatron.core.tensor_parallel import ColumnParallelLinear
        from megatron.core.transformer import TransformerConfig

        config = TransformerConfig(
            num_layers=1,
            hidden_size=hidden_size,
            num_attention_heads=4,
            tensor_model_parallel_size=torch.distributed.get_world_size(),
            sequence_parallel=self.sequence_parallel,
            params_dtype=self.dtype,
            use_cpu_initialization=True,
        )
        made = ColumnParallelLinear(
            hidden_size,
            PADDED,
            config=config,
            init_method=torch.nn.init.normal_,
            bias=False,
            gather_output=False,
            skip_weight_param_allocation=self.tied,
        )
        weight = None
        if self.tied:
            rows = PADDED // torch.distributed.get_world_size()
            generator = torch.Generator().manual_seed(hidden_size + torch.distributed.get_rank())
            weight = torch.nn.Parameter(torch.randn(rows, hidden_size, generator=generator, dtype=self.dtype))
        else:
            with torch.no_grad():
                made.weight.mul_(0.5)
        return made, weight

    def run(self, head, main_grad=False, mask_known=True, every=None, in_place=False, kd_weight=0.7, squared=False):
        import torch
        from megatron.core import parallel_state

        from abkd_megatron import AlphaBeta
        from abkd_megatron.losses.objective import Objective
        from abkd_megatron.losses.selection import TokenSelection
        from abkd_megatron.student.head import compute_loss
        from abkd_megatron.teacher.output_layer import OutputLayer
        from abkd_megatron.vocab_parallel import VocabShard

        group = parallel_state.get_tensor_model_parallel_group()
        torch.manual_seed(0)
        (layer, tied), (teacher_layer, teacher_tied) = self.layer(HIDDEN), self.layer(TEACHER_HIDDEN)
        weight = tied if tied is not None else layer.weight
        if main_grad:
            layer.gradient_accumulation_fusion = True
            weight.main_grad = torch.zeros_like(weight)
            weight.grad_added_to_main_grad = False
        tokens = TokenSelection("every", n=every) if every else None
        objective = Objective(
            AlphaBeta(0.2, 0.7),
            temperature=2.0,
            temperature_squared=squared,
            kd_weight=kd_weight,
            lm_weight=0.4,
            tokens=tokens,
        )
        rows = []
        if head == "materialized":  # with a hook there is no other
            teacher_layer.register_forward_hook(lambda *given: rows.append(given[-1][0].shape[:-1].numel()))
        shard = VocabShard.megatron(weight.shape[0], group, VOCAB)
        scale = (lambda logits: logits * 0.25) if self.mup else (lambda logits: logits)
        generator = torch.Generator().manual_seed(1)
        found = {}
        for micro_batch in range(4):
            hidden, teacher_hidden = (
                torch.randn(SEQUENCE, BATCH, size, generator=generator, dtype=torch.float64).to(self.dtype)
                for size in (HIDDEN, TEACHER_HIDDEN)
            )
            labels = torch.randint(VOCAB, (SEQUENCE, BATCH), generator=generator)
            mask = torch.randint(2, (SEQUENCE, BATCH), generator=generator).to(self.dtype)
            if self.sequence_parallel:
                hidden, teacher_hidden = (
                    whole.chunk(group.size())[group.rank()].contiguous() for whole in (hidden, teacher_hidden)
                )
            hidden.requires_grad_()
            loss = compute_loss(
                OutputLayer(hidden * 1, layer, tied, scale),
                OutputLayer(teacher_hidden, teacher_layer, teacher_tied, scale),
                objective,
                labels,
                mask if mask_known else None,
                shard,
                group,
                lambda logits: self.fail(),
                positions=torch.arange(SEQUENCE),
                chunk_tokens=7 if head == "fused" else None,
                gradient_in_place=in_place,
            )
            ((loss.total * mask).sum() / 3).backward()
            found[f"hidden {micro_batch}"] = hidden.grad
            found[f"loss {micro_batch}"] = loss.total.detach()
            found[f"divergence {micro_batch}"] = loss.terms.divergence.detach()
            found[f"distillation {micro_batch}"] = loss.distillation.detach()
            found[f"cross entropy {micro_batch}"] = loss.terms.cross_entropy.detach()
            if main_grad:
                assert weight.grad_added_to_main_grad
                weight.grad = None  # as Megatron's hook does
        found["weight"] = weight.main_grad if main_grad else weight.grad
        if head == "materialized":
            found["rows of the teacher"] = sum(rows)
        return found

    def fail(self):
        raise AssertionError("Megatron's cross entropy was asked for")


if __name__ == "__main__":
    main()
