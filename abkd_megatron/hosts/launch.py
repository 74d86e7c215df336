"""This process as a rank of a job: launcher variables, device, log, and packages that must not be there."""

import importlib.util
import logging
import os
import sys
import warnings

from abkd_megatron.errors import HostError


def log_to_stdout() -> None:
    """Log to stdout from the last rank, which also prints Megatron's log; the other ranks only warn.

    Megatron gives the root logger a handler on every rank, through which they do.
    """
    logger = logging.getLogger("abkd_megatron")
    last = int(os.environ.get("RANK", "0")) == int(os.environ.get("WORLD_SIZE", "1")) - 1
    if last:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("abkd_megatron: %(message)s"))
        logger.handlers = [handler]
    logger.setLevel(logging.INFO if last else logging.WARNING)
    logger.propagate = not last


def check_launcher() -> None:
    """Check the variables of torchrun and similar launchers.

    Raises:
        HostError: one of them is not a number, is missing, or is out of range.
    """
    given = {name: os.environ[name] for name in ("RANK", "WORLD_SIZE") if name in os.environ}
    shown = ", ".join(f"{name}={value}" for name, value in given.items())
    remedy = "start ranks by torchrun, or unset both for a job of one process"
    if not all(value.isdecimal() for value in given.values()):
        raise HostError(f"expected whole numbers in RANK and WORLD_SIZE, got {shown}; {remedy}")
    world_size = int(given.get("WORLD_SIZE", 1))
    if world_size > 1 and "RANK" not in given:
        raise HostError(f"expected RANK together with WORLD_SIZE={world_size}, got none; {remedy}")
    if not int(given.get("RANK", 0)) < world_size:
        raise HostError(f"expected RANK below WORLD_SIZE, got {shown or 'neither'}; {remedy}")
    if world_size > 1 and "MASTER_PORT" not in os.environ:
        raise HostError(f"expected MASTER_ADDR and MASTER_PORT together with {shown}, got none; {remedy}")


def require_gpu() -> None:
    """Reject a job with ``device: cuda`` on a machine without a GPU.

    Raises:
        HostError: torch finds no GPU.
    """
    import torch

    if not torch.cuda.is_available():
        raise HostError(
            "expected an NVIDIA GPU, found none; set `device: cpu` to train a small model on the CPU, or install a "
            "CUDA build of torch"
        )


def silence_fallback_warnings() -> None:
    """Silence Megatron's warnings about TransformerEngine and apex on a machine without a GPU."""
    import torch

    if not torch.cuda.is_available():
        warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.")


def unrelated_apex() -> bool:
    """Return whether the installed `apex` is not NVIDIA's. Megatron imports any package of that name.

    Looking for a module within it imports it.
    """
    try:
        return bool(importlib.util.find_spec("apex") and not importlib.util.find_spec("apex.multi_tensor_apply"))
    except Exception:  # an apex that cannot even be imported
        return True


def reject_unrelated_apex() -> None:
    """Reject PyPI's `apex`, which Megatron would import in place of NVIDIA's.

    Raises:
        HostError: it is installed.
    """
    if unrelated_apex():
        raise HostError(
            "the installed `apex` is not NVIDIA's but an unrelated package from PyPI, which Megatron would import by "
            "mistake; remove it with `pip uninstall apex`"
        )
