"""The stand-in that lets the real Megatron train where there is no GPU: for tests, demos and debugging.

Megatron asks torch.cuda for devices, streams and random states all over its code. `install` answers those questions
with the CPU: every tensor that asks for CUDA lands in main memory, streams and events do nothing, and the GPU's random
generator is the CPU's. It changes torch for the whole process, so it is opt-in (`device: cpu`), happens once, and
refuses to start beside a GPU.

A script of one's own runs on it as it stands: `python -m abkd_megatron.cpu_backend SCRIPT [ARGUMENTS]`.
"""

import copy
import importlib.util
import os
import runpy
import socket
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from abkd_megatron.errors import HostError

_installed = False

# What Megatron's command line needs on a CPU: every fused kernel off, and no work for processes that do not exist.
MEGATRON_DEFAULTS: Mapping[str, Any] = {
    "transformer-impl": "local",
    "distributed-backend": "gloo",
    "use-cpu-initialization": True,
    "no-gradient-accumulation-fusion": True,
    "no-masked-softmax-fusion": True,
    "no-bias-swiglu-fusion": True,
    "no-bias-gelu-fusion": True,
    "no-bias-dropout-fusion": True,
    "no-rope-fusion": True,
    "no-persist-layer-norm": True,
    "disable-jit-fuser": True,
    "no-create-attention-mask-in-dataloader": True,
    "attention-dropout": 0.0,
    "hidden-dropout": 0.0,
    "num-workers": 0,
}


class _CudaMeansCpu(TorchFunctionMode):
    """Rewrites every request for a CUDA device to the CPU, and `Tensor.type()` to the name Megatron checks for."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.pin_memory:
            return args[0]
        if func is torch.Tensor.record_stream:
            return None
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(args[0]).replace("torch.", "torch.cuda.", 1)
        if func is torch.distributed.all_to_all_single:
            # Megatron turns split sizes into numbers where they are on a GPU; here they never were.
            for name in ("output_split_sizes", "input_split_sizes"):
                if isinstance(kwargs.get(name), torch.Tensor):
                    kwargs[name] = kwargs[name].tolist()
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = torch.device("cpu")
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        if any(_is_cuda(arg) for arg in args):
            args = tuple(torch.device("cpu") if _is_cuda(arg) else arg for arg in args)
        return func(*args, **kwargs)


def _is_cuda(value: object) -> bool:
    if isinstance(value, str):
        return value == "cuda" or value.startswith("cuda:")
    return isinstance(value, torch.device) and value.type == "cuda"


class _Idle:
    """A stream or an event of a device that has no queue: everything it is asked for has already happened."""

    cuda_stream = 0

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return 0, 0

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __enter__(self) -> "_Idle":
        return self

    def __exit__(self, *exc: object) -> None:
        return None

    def query(self) -> bool:
        return True

    def is_capturing(self) -> bool:
        return False

    def elapsed_time(self, other: object) -> float:
        return 0.0

    def record(self, *args: object) -> None: ...
    def synchronize(self) -> None: ...
    def wait(self, *args: object) -> None: ...
    def wait_event(self, *args: object) -> None: ...
    def wait_stream(self, *args: object) -> None: ...
    def record_event(self, event: object = None) -> object:
        return event if event is not None else _Idle()


def install() -> None:
    """Answer Megatron's questions about the GPU with the CPU, in this process, for the rest of its life.

    Raises:
        HostError: beside a real GPU.
    """
    global _installed
    if _installed:
        return
    if torch.cuda.is_available():
        raise HostError(
            "device: cpu was asked for, but this machine has a GPU; the stand-in would hide it from the whole process. "
            "Use `device: cuda`, or hide the GPU yourself with CUDA_VISIBLE_DEVICES=''"
        )
    _installed = True

    # First, because importing Megatron makes torch.compile look at torch.cuda, which must still be the real one.
    import megatron.core.datasets.utils
    import megatron.core.tensor_parallel.random as megatron_random
    import megatron.training

    # Megatron insists on it for tensor parallelism; without a GPU it means nothing.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    cpu, generator, stream = torch.device("cpu"), torch.default_generator, _Idle()

    def get_rng_state(device: object = None) -> torch.Tensor:
        return generator.get_state()

    def set_rng_state(state: torch.Tensor, device: object = None) -> None:
        generator.set_state(state)

    def manual_seed(seed: int) -> None:
        generator.manual_seed(seed)

    def nothing(*args: object, **kwargs: object) -> None:
        return None

    def zero(*args: object, **kwargs: object) -> int:
        return 0

    for name, answer in {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: cpu,
        "set_device": nothing,
        "get_device_name": lambda *_: "cpu",
        "get_device_capability": lambda *_: (8, 0),
        "get_device_properties": lambda *_: SimpleNamespace(
            name="cpu", major=8, minor=0, total_memory=0, multi_processor_count=1
        ),
        "is_bf16_supported": lambda *_, **__: True,
        "default_generators": defaultdict(lambda: generator),  # asked with whatever current_device says
        "_lazy_init": nothing,
        "_lazy_call": lambda call, **_: call(),
        "Stream": _Idle,
        "Event": _Idle,
        "stream": lambda *_: nullcontext(),
        "current_stream": lambda *_: stream,
        "default_stream": lambda *_: stream,
        "set_stream": nothing,
        "is_current_stream_capturing": lambda: False,  # torch's optimizers ask here up to 2.11, and below after it
        "synchronize": nothing,
        "empty_cache": nothing,
        "memory_allocated": zero,
        "max_memory_allocated": zero,
        "memory_reserved": zero,
        "max_memory_reserved": zero,
        "reset_peak_memory_stats": nothing,
        "memory_stats": lambda *_: defaultdict(int),  # whichever number is asked for
        "mem_get_info": lambda *_: (0, 0),
        "device_memory_used": zero,
        **dict.fromkeys(("utilization", "temperature", "power_draw", "clock_rate"), zero),
        "check_error": nothing,
        "cudart": lambda: SimpleNamespace(cudaProfilerStart=lambda: 0, cudaProfilerStop=lambda: 0),
    }.items():
        setattr(torch.cuda, name, _of_its_own(answer))
    # torch's newer optimizers ask here whether a graph is being captured, once they believe in a GPU.
    torch.accelerator.current_stream = lambda *_: stream  # type: ignore[assignment]
    for name in ("Float", "Double", "Half", "BFloat16", "Int", "Long", "Byte", "Bool"):
        setattr(torch.cuda, f"{name}Tensor", getattr(torch, f"{name}Tensor"))
    for name in ("range_push", "range_pop", "mark"):
        setattr(torch.cuda.nvtx, name, _of_its_own(nothing))
    for name, answer in {
        "get_rng_state": get_rng_state,
        "set_rng_state": set_rng_state,
        "manual_seed": manual_seed,
        # torch.manual_seed seeds the CPU itself and then calls this for the GPUs: there is none left to seed.
        "manual_seed_all": nothing,
    }.items():
        own = _of_its_own(answer)
        setattr(torch.cuda, name, own)
        setattr(torch.cuda.random, name, own)
    _CudaMeansCpu().__enter__()
    # Megatron compiled its small fusions when it was imported; the compiler cannot look through this stand-in.
    torch.compiler.set_stance("force_eager")

    # Runs `make` where the wheel, which ships the compiled helper, has no Makefile; a checkout has one to run.
    if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is not None:
        megatron.core.datasets.utils.compile_helpers = nothing
    # This module copied the names out of torch.cuda when it was imported.
    megatron_random._lazy_call = torch.cuda._lazy_call
    megatron_random._lazy_init = torch.cuda._lazy_init
    _fix_resumed_adam()
    _let_torch_norms_be_sequence_parallel()
    _keep_data_loaders_from_the_generator()


def _of_its_own(answer: Any) -> Any:
    """A function that is nobody else's: torch.compile refuses a table in which one stands under two names."""
    if not isinstance(answer, FunctionType):
        return answer
    own = FunctionType(answer.__code__, answer.__globals__, answer.__name__, answer.__defaults__, answer.__closure__)
    own.__kwdefaults__ = answer.__kwdefaults__
    return own


def is_installed() -> bool:
    """Whether this process has the stand-in for a GPU."""
    return _installed


def init_process_group(timeout: timedelta) -> None:
    """Start torch.distributed over gloo, as torchrun's environment says; Megatron then finds it started."""
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    if "MASTER_PORT" not in os.environ:  # not by torchrun: one rank, and there may be another such job here
        with socket.socket() as probe:
            probe.bind((os.environ["MASTER_ADDR"], 0))
            os.environ["MASTER_PORT"] = str(probe.getsockname()[1])
    torch.distributed.init_process_group(
        "gloo",
        rank=int(os.environ.get("RANK", "0")),
        world_size=int(os.environ.get("WORLD_SIZE", "1")),
        timeout=timeout,
    )


def _let_torch_norms_be_sequence_parallel() -> None:
    """Let torch's norms, which step in here for TransformerEngine's and apex's, work on a part of the sequence.

    Megatron refuses that, since torch would not tell it to sum their gradients over the tensor-parallel ranks: the mark
    on their parameters, which the other norms set by themselves, does.
    """
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    make = WrappedTorchNorm.__new__

    def make_marked(cls: type, config: Any, *args: Any, **kwargs: Any) -> torch.nn.Module:
        as_if_whole = copy.copy(config)
        as_if_whole.sequence_parallel = False
        norm: torch.nn.Module = make(cls, as_if_whole, *args, **kwargs)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return norm

    WrappedTorchNorm.__new__ = make_marked


def _keep_data_loaders_from_the_generator() -> None:
    """Let an iterator of a data loader leave the random generator as it was, which here is the GPU's, too.

    It draws a seed for its workers when it is made, on the ranks that read data alone and again after resuming. Dropout
    outside of attention, which has to be the same on all tensor-parallel ranks, would then differ between them.
    """
    from torch.utils.data import DataLoader

    iterate = DataLoader.__iter__

    def iterate_apart(self: DataLoader) -> Any:
        with torch.random.fork_rng(devices=()):
            return iterate(self)

    DataLoader.__iter__ = iterate_apart  # type: ignore[method-assign]


def _fix_resumed_adam() -> None:
    """Let torch's Adam, which steps in here for TransformerEngine's and apex's, be resumed exactly.

    Four faults of megatron-core 0.19's DistributedOptimizer without either of the two: it asserts that there is a step
    counter when it describes what it wants to load, and before the first step there is none; in fp32 it copies into
    parameters while autograd watches; it leaves the parameters one `step` tensor between them, which torch's Adam
    advances in place, once a parameter, so that from the second step on the bias correction is silently wrong; and the
    fully reshardable format holds no `step` to copy, though one is looked for.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    sharded_state_dict, load_state_dict = DistributedOptimizer.sharded_state_dict, DistributedOptimizer.load_state_dict
    set_states = DistributedOptimizer._set_main_param_and_optimizer_states

    def sharded_with_state(self: Any, model: Any, is_loading: bool = False, *args: Any, **kwargs: Any) -> Any:
        if is_loading and not self.optimizer.state:
            self.init_state_fn(self.optimizer, self.config)
            for state in self.optimizer.state.values():
                state["step"] = torch.zeros(())
        return sharded_state_dict(self, model, is_loading, *args, **kwargs)

    @torch.no_grad()
    def load_with_own_steps(self: Any, state_dict: dict) -> None:
        load_state_dict(self, state_dict)
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                self.optimizer.state[parameter]["step"] = torch.tensor(float(group["step"]))

    def set_without_step(self: Any, model_param: Any, tensors: dict[str, Any]) -> None:
        set_states(self, model_param, {"step": None, **tensors})  # what is no tensor is not copied

    DistributedOptimizer._set_main_param_and_optimizer_states = set_without_step
    DistributedOptimizer.sharded_state_dict = sharded_with_state
    DistributedOptimizer.load_state_dict = load_with_own_steps


def main(argv: Sequence[str] | None = None) -> int:
    """Run a Megatron training script on CPU: ``python -m abkd_megatron.cpu_backend SCRIPT [ARGUMENTS]``.

    The script finds torch.distributed started over gloo, and on its command line what Megatron needs on a CPU in front
    of its own arguments.

    Args:
        argv: the script and its arguments; None takes the process's.

    Returns:
        2 where no script is named; otherwise the script ends as it likes.

    Raises:
        HostError: beside a real GPU.

    Collectives: those of starting torch.distributed.
    """
    script, *words = (sys.argv[1:] if argv is None else argv) or [""]
    if not Path(script).is_file():
        print(
            f"usage: python -m abkd_megatron.cpu_backend SCRIPT [ARGUMENTS]; no such script: {script!r}",
            file=sys.stderr,
        )
        return 2
    install()
    from abkd_megatron.config.load import from_argv, to_argv
    from abkd_megatron.config.megatron_args import megatron_options

    options = megatron_options()
    minutes = from_argv(words, options).get("distributed-timeout-minutes", 10)
    init_process_group(timedelta(minutes=float(str(minutes))))
    sys.argv = [script, *to_argv(MEGATRON_DEFAULTS, options), *words]
    sys.path.insert(0, str(Path(script).resolve().parent))  # as Python itself does for a script
    runpy.run_path(script, run_name="__main__")
    return 0


if __name__ == "__main__":
    # This module once more, under its own name, where others find what it has installed.
    from abkd_megatron import cpu_backend

    sys.exit(cpu_backend.main())
