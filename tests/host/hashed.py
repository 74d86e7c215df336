"""`abkd_megatron distill` that also says what the teacher's weights were: python hashed.py distill CONFIG.

On each rank, before the first optimizer step and after every one: a line "TEACHER", the step, and a hash of all bytes
of the teacher's share there, parameters and buffers.
"""

import gc
import sys

from stock import digest


def main() -> int:
    from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

    from abkd_megatron.__main__ import main as command_line

    step = 0

    def say(*_: object) -> None:
        from abkd_megatron.student.attach import Attachment

        (attachment,) = [it for it in gc.get_objects() if type(it) is Attachment]
        print(f"\nTEACHER {step} {digest(attachment.teacher.model)}", flush=True)

    def before(*_: object) -> None:
        if step == 0:
            say()

    def after(*_: object) -> None:
        nonlocal step
        step += 1
        say()

    register_optimizer_step_pre_hook(before)
    register_optimizer_step_post_hook(after)
    return command_line(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
