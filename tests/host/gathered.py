"""Models that gather their logits over tensor-parallel ranks, given to attach(): what it says, in a line of JSON."""

import itertools
import json
from datetime import timedelta


def main() -> None:
    from abkd_megatron import cpu_backend

    cpu_backend.install()
    cpu_backend.init_process_group(timedelta(minutes=3))

    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from router_bias import VOCAB, model_config

    from abkd_megatron import AlphaBeta
    from abkd_megatron.errors import ConfigError
    from abkd_megatron.losses import Pearson
    from abkd_megatron.losses.objective import Objective
    from abkd_megatron.student.attach import attach
    from abkd_megatron.teacher.build import Teacher
    from abkd_megatron.vocab_parallel import (
        VocabShard,
        vocab_parallel_distillation,
        vocab_parallel_distillation_head,
        vocab_parallel_logit_loss,
    )

    ranks = dist.get_world_size()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=ranks)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    model_parallel_cuda_manual_seed(1)

    def model(gathers):
        config = model_config()
        config.transformer.tensor_model_parallel_size = ranks
        config.parallel_output = not gathers
        (built,) = config.get_builder_cls()(config).build_distributed_models(groups, wrap_with_ddp=False)
        return built.module

    found = {}
    for student, teacher in itertools.product((False, True), repeat=2):
        try:
            attachment = attach(
                model(student),
                Teacher.of(model(teacher), groups),
                Objective(AlphaBeta(0.2, 0.7)),
                vocab_size=VOCAB,
                pg_collection=groups,
            )
        except ConfigError as error:
            found[f"{student} {teacher}"] = str(error)
        else:
            found[f"{student} {teacher}"] = attachment.detach()
    # The functions below it, on logits of all columns and of some.
    part, divergence, labels = VOCAB // ranks, AlphaBeta(0.2, 0.7), torch.arange(4)
    first = part * groups.tp.rank()
    shards = (
        VocabShard.megatron(part, groups.tp, VOCAB),
        VocabShard(first, first + part, VOCAB, groups.tp),
    )
    rejected = []
    for width, shard in itertools.product((VOCAB, part - 1), shards):
        if width == VOCAB and ranks == 1:
            continue
        logits, weight, hidden = torch.randn(4, width), torch.randn(width, 3), torch.randn(4, 3)
        for call in (
            lambda shard=shard, it=logits: vocab_parallel_distillation(it, it, divergence, labels, shard),
            lambda shard=shard, it=logits: vocab_parallel_logit_loss(it, it, Pearson(), shard),
            lambda shard=shard, it=(hidden, weight) * 2: vocab_parallel_distillation_head(
                *it, divergence, labels, shard
            ),
        ):
            try:
                call()
            except ConfigError as error:
                rejected.append(str(error))
    found["rejected"] = rejected
    # Columns that are said to be padding are.
    padded = VocabShard(first, first + part, VOCAB, groups.tp, width=VOCAB)
    whole = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(0))
    own = torch.nn.functional.pad(whole[:, first : first + part], (0, VOCAB - part), value=torch.nan)
    alone = vocab_parallel_distillation(whole, 2 * whole, divergence, labels, VocabShard.megatron(VOCAB))
    terms = vocab_parallel_distillation(own, 2 * own, divergence, labels, padded)
    torch.testing.assert_close(terms.divergence, alone.divergence)
    print("FOUND " + json.dumps(found), flush=True)
    dist.barrier()


if __name__ == "__main__":
    main()
