"""Students that are sharded over ranks or compiled, given to attach(): what it says, in a line of JSON."""

import json
from datetime import timedelta
from functools import partial


def main() -> None:
    from abkd_megatron import cpu_backend

    cpu_backend.install()
    cpu_backend.init_process_group(timedelta(minutes=3))

    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.distributed import TorchFullyShardedDataParallel
    from megatron.core.distributed.fsdp.mcore_fsdp_adapter import FullyShardedDataParallel
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from router_bias import VOCAB, model_config
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from abkd_megatron import AlphaBeta
    from abkd_megatron.errors import ConfigError
    from abkd_megatron.losses.objective import Objective
    from abkd_megatron.student.attach import attach
    from abkd_megatron.teacher.build import Teacher

    parallel_state.initialize_model_parallel()
    groups = ProcessGroupCollection.use_mpu_process_groups()
    model_parallel_cuda_manual_seed(1)
    mesh = init_device_mesh("cpu", (1,))

    def wrap(kind, model):
        # The constructors want a GPU; what they make of the model is not looked at.
        wrapped = kind.__new__(kind)
        super(kind, wrapped).__init__(model.config, model)
        return wrapped

    def one_layer(model):
        fully_shard(model.decoder.layers[0], mesh=mesh)
        return model

    def compiled_in_place(model):
        model.compile()
        return model

    wrappers = {
        "Megatron": partial(wrap, FullyShardedDataParallel),
        "torch, by Megatron": partial(wrap, TorchFullyShardedDataParallel),
        "torch": partial(fully_shard, mesh=mesh),
        "torch, a layer": one_layer,
        "compiled": torch.compile,
        "compiled in place": compiled_in_place,
    }
    found = {}

    def built():
        config = model_config()
        (model,) = config.get_builder_cls()(config).build_distributed_models(groups, wrap_with_ddp=False)
        return model.module

    teacher, objective = Teacher.of(built(), groups), Objective(AlphaBeta(0.2, 0.7))
    for name, wrapper in wrappers.items():
        try:
            attach(wrapper(built()), teacher, objective, vocab_size=VOCAB, pg_collection=groups)
        except ConfigError as error:
            found[name] = str(error)
    print("FOUND " + json.dumps(found), flush=True)
    dist.barrier()


if __name__ == "__main__":
    main()
