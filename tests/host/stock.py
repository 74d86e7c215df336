"""A user's own Megatron script: stock model, stock loss, own forward step; of this package the CPU and the data.

    python stock.py [MEGATRON ARGUMENTS] trains plainly
    python stock.py --kd-teacher CHECKPOINT [MEGATRON ARGUMENTS] also attaches, watches, checks and detaches a teacher

The second way trains through the same untouched forward step; what it finds goes to stdout as one line of JSON.
"""

import gc
import hashlib
import json
import sys
from datetime import timedelta
from functools import partial


def main() -> None:
    from abkd_megatron import cpu_backend

    cpu_backend.install()
    cpu_backend.init_process_group(timedelta(minutes=3))

    from megatron.core.enums import ModelType
    from megatron.training import get_tensorboard_writer, pretrain
    from megatron.training.argument_utils import (
        gpt_config_from_args,
        hybrid_config_from_args,
        pretrain_cfg_container_from_args,
    )
    from megatron.training.arguments import parse_and_validate_args

    from abkd_megatron.hosts.batches import train_valid_test_datasets_provider

    checkpoint = None
    if "--kd-teacher" in sys.argv:
        at = sys.argv.index("--kd-teacher")
        checkpoint = sys.argv[at + 1]
        del sys.argv[at : at + 2]
    args = parse_and_validate_args()
    config = (hybrid_config_from_args if args.hybrid_layer_pattern else gpt_config_from_args)(args)
    probe = Probe(args, checkpoint) if checkpoint else None
    if probe:
        config.post_wrap_hooks.append(probe.attach)
    pretrain(
        pretrain_cfg_container_from_args(args, config),
        train_valid_test_datasets_provider,
        ModelType.encoder_or_decoder,
        forward_step,
    )
    if writer := get_tensorboard_writer():
        writer.flush()
    if probe:
        print("FACTS " + json.dumps(probe.facts()), flush=True)


def forward_step(data_iterator, model):
    from abkd_megatron.hosts.batches import get_batch

    batch = get_batch(data_iterator, None)
    output = model(batch["tokens"], batch["position_ids"], batch["attention_mask"], labels=batch["labels"])
    return output, partial(loss_func, batch["loss_mask"])


def loss_func(loss_mask, output_tensor):
    """As Megatron's own pretrain_gpt.py has it."""
    import torch

    losses = output_tensor.view(-1).float()
    loss_mask = loss_mask.view(-1).float()
    loss = torch.sum(losses * loss_mask)
    num_tokens = loss_mask.sum().clone().detach().to(torch.int)
    return loss, num_tokens, {"lm loss": torch.cat([loss.clone().detach().view(1), num_tokens.view(1)])}


class Probe:
    """Attaches a teacher as a user's recipe would, and looks for what it must not leave behind."""

    def __init__(self, args, checkpoint):
        self.args, self.checkpoint = args, checkpoint

    def attach(self, chunks):
        from megatron.core.utils import get_attr_wrapped_model, unwrap_model

        from abkd_megatron import AlphaBeta
        from abkd_megatron.errors import AbkdError
        from abkd_megatron.losses.objective import Objective
        from abkd_megatron.student.attach import attach
        from abkd_megatron.teacher.build import Teacher, build_teacher
        from abkd_megatron.teacher.checkpoint import TeacherCheckpoint

        (self.ddp,) = chunks
        (self.student,) = unwrap_model(chunks)
        self.before = self.surface()
        pg_collection = get_attr_wrapped_model(chunks[0], "pg_collection")
        checkpoint = TeacherCheckpoint.open(self.checkpoint)
        teacher = build_teacher(teacher_config(self.args), checkpoint, pg_collection)
        arguments = self.arguments = {"vocab_size": 400, "pg_collection": pg_collection}
        objective = Objective(AlphaBeta(0.2, 0.7))

        def other_teacher(**settings):
            config = teacher_config(self.args)
            for name, value in settings.items():
                setattr(config, name, value)
            (model,) = config.get_builder_cls()(config).build_distributed_models(
                pg_collection, wrap_with_ddp=False, mixed_precision_wrapper=None
            )
            return Teacher.of(model, pg_collection)

        self.refusals = []
        for attempt in (
            lambda: attach(chunks, other_teacher(vocab_size=1024), objective, **arguments),
            lambda: attach(chunks, other_teacher(overlap_moe_expert_parallel_comm=True), objective, **arguments),
            lambda: attach(chunks, teacher, objective, **arguments),
            lambda: attach(chunks, teacher, objective, **arguments),
            lambda: checkpoint.check_tensors(self.student.sharded_state_dict()),
        ):
            try:
                self.handle = attempt() or self.handle
            except AbkdError as error:
                self.refusals.append(str(error))
        self.teacher_at_start = digest(teacher.model)
        return chunks

    def surface(self):
        student = self.student
        return {
            "attributes": sorted(vars(student)),
            "hooks": [len(student._forward_pre_hooks), len(student._forward_hooks)],
            "modules": [name for name, _ in student.named_modules()],
            "state": list(student.state_dict()),
        }

    def facts(self):
        import torch

        teacher = {parameter.data_ptr() for parameter in self.handle.teacher.parameters()}
        optimizers = [thing for thing in gc.get_objects() if isinstance(thing, torch.optim.Optimizer)]
        optimized = {
            parameter.data_ptr()
            for found in optimizers
            for group in found.param_groups
            for parameter in group["params"]
        }
        in_ddp = {parameter.data_ptr() for buffer in self.ddp.buffers for parameter in buffer.params}
        attached = self.surface()
        watched = self.loss()
        self.handle.detach()
        self.handle.detach()
        plain = self.loss()
        return {
            "teacher unchanged": digest(self.handle.teacher.model) == self.teacher_at_start,
            "teacher has gradients": any(
                p.requires_grad or p.grad is not None for p in self.handle.teacher.parameters()
            ),
            "teacher in training mode": any(module.training for module in self.handle.teacher.model.modules()),
            "optimizers": len(optimizers),
            "teacher parameters optimized": len(teacher & optimized),
            "student parameters optimized": len(optimized),
            "teacher parameters in DDP": len(teacher & in_ddp),
            "student parameters in DDP": len(in_ddp),
            "modules and state as before": [
                attached[key] == self.before[key] for key in ("modules", "state", "attributes")
            ],
            "hooks while attached": attached["hooks"],
            "as before once detached": self.surface() == self.before,
            "messages in flight": self.handle.num_in_flight,
            "losses by progress": self.losses_by_progress(),
            "loss changes with the teacher": watched is None or watched != plain,
            "refusals": self.refusals,
        }

    def losses_by_progress(self):
        """With a kd_weight that rises from 0.25 to 1, at three steps; what is said if none was set comes first."""
        from abkd_megatron import AlphaBeta
        from abkd_megatron.errors import AbkdError
        from abkd_megatron.losses.objective import Objective, ScheduledObjective
        from abkd_megatron.losses.schedule import Progress, Schedule
        from abkd_megatron.student.attach import attach

        rising = ScheduledObjective(Objective(AlphaBeta(0.2, 0.7)), {"kd_weight": Schedule.linear(0.25, 1.0, end=10)})
        attachment = attach(self.ddp, self.handle.teacher, rising, **self.arguments)
        found = []
        try:
            found.append(self.loss())
        except AbkdError as error:
            found.append(str(error))
        for iteration in (0, 5, 10):
            attachment.on_step(Progress(iteration))
            found.append(self.loss())
        attachment.detach()
        return found

    def loss(self):
        """The model's own loss on fixed tokens; None where a pipeline stage cannot run alone."""
        import torch

        if not (self.student.pre_process and self.student.post_process):
            return None
        tokens = torch.arange(64).view(2, 32)
        with torch.no_grad():
            return self.student(tokens, tokens % 32, None, labels=tokens + 1).double().sum().item()


def teacher_config(args):
    import copy

    from megatron.training.argument_utils import gpt_config_from_args

    args = copy.copy(args)
    args.num_layers, args.hidden_size, args.ffn_hidden_size, args.kv_channels, args.spec = 4, 48, 96, 12, None
    return gpt_config_from_args(args)


def digest(module):
    state = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if tensor is not None:
            state.update(name.encode() + tensor.detach().contiguous().numpy().tobytes())
    return state.hexdigest()


if __name__ == "__main__":
    main()
