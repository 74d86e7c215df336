"""A job that trains by the recipe for custom loops in docs/training.md: `recipe_job.py TEACHER [ARGUMENTS]`."""

import re
import sys
from datetime import timedelta
from pathlib import Path

from stock import teacher_config

PAGE = Path(__file__).resolve().parents[2] / "docs/training.md"


def recipe(teacher: str) -> str:
    """Return the page's code with this teacher."""
    (text,) = re.findall(r"<!-- recipe -->\n```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert text.count('"checkpoints/teacher"') == 1
    return text.replace('"checkpoints/teacher"', repr(teacher))


def main() -> None:
    """Define what the recipe takes from its script, run it, and train."""
    teacher = sys.argv.pop(1)
    from abkd_megatron import cpu_backend

    cpu_backend.install()
    cpu_backend.init_process_group(timedelta(minutes=3))

    from megatron.core.enums import ModelType
    from megatron.training import get_tensorboard_writer, pretrain
    from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args

    from abkd_megatron.hosts import batches

    def get_batch(data_iterator):
        batch = batches.get_batch(data_iterator, None)
        return tuple(batch[name] for name in ("tokens", "labels", "loss_mask", "position_ids"))

    args = parse_and_validate_args()
    config = gpt_config_from_args(args)
    names = {
        "teacher_config": teacher_config(args),
        "vocab_size": 400,
        "get_batch": get_batch,
        "model_config": config,
    }
    exec(compile(recipe(teacher), "docs/training.md", "exec"), names)
    pretrain(
        pretrain_cfg_container_from_args(args, config),
        batches.train_valid_test_datasets_provider,
        ModelType.encoder_or_decoder,
        names["forward_step"],
    )
    if writer := get_tensorboard_writer():
        writer.flush()


if __name__ == "__main__":
    main()
