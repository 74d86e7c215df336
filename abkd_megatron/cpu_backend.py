"""CPU backend that lets Megatron train without a GPU, for tests, demos and debugging.

Megatron calls torch.cuda for devices, streams and random states. `install` redirects these calls to the CPU: tensors
requested on CUDA are created in main memory, streams and events do nothing, and the GPU random generator is the CPU's.
It changes torch for the whole process. It is therefore opt-in (`device: cpu`) and rejected on machines with a GPU.

To run any script on it, unmodified: `python -m abkd_megatron.cpu_backend SCRIPT [ARGUMENTS]`.
"""

import copy
import importlib.util
import os
import runpy
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

# Megatron arguments for a CPU: no fused kernels, no data-loader workers.
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
    """Redirect CUDA devices to the CPU, and return from `Tensor.type()` the CUDA name that Megatron checks for."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.pin_memory:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(args[0]).replace("torch.", "torch.cuda.", 1)
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
    """Stream or event of a device without a queue: all work is already complete."""

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
    """Redirect Megatron's use of the GPU to the CPU, for the lifetime of this process.

    Raises:
        HostError: if there is a GPU.
    """
    global _installed
    if _installed:
        return
    if torch.cuda.is_available():
        raise HostError(
            "device: cpu was requested, but this machine has a GPU, which it would hide from the whole process. "
            "Use `device: cuda`, or hide the GPU with CUDA_VISIBLE_DEVICES=''"
        )
    _installed = True

    # First, because importing Megatron makes torch.compile inspect torch.cuda, which must not be patched yet.
    import megatron.core.tensor_parallel.random as megatron_random
    import megatron.training  # noqa: F401

    # Required by Megatron for tensor parallelism; no effect without a GPU.
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
        "default_generators": defaultdict(lambda: generator),  # indexed by current_device
        "_lazy_init": nothing,
        "_lazy_call": lambda call, **_: call(),
        "Stream": _Idle,
        "Event": _Idle,
        "stream": lambda *_: nullcontext(),
        "current_stream": lambda *_: stream,
        "default_stream": lambda *_: stream,
        "set_stream": nothing,
        "is_current_stream_capturing": lambda: False,  # for torch's optimizers up to 2.11; later ones, see below
        "synchronize": nothing,
        "empty_cache": nothing,
        "memory_allocated": zero,
        "max_memory_allocated": zero,
        "memory_reserved": zero,
        "max_memory_reserved": zero,
        "reset_peak_memory_stats": nothing,
        "memory_stats": lambda *_: defaultdict(int),  # any key
        "mem_get_info": lambda *_: (0, 0),
        "device_memory_used": zero,
        **dict.fromkeys(("utilization", "temperature", "power_draw", "clock_rate"), zero),
        "check_error": nothing,
        "cudart": lambda: SimpleNamespace(cudaProfilerStart=lambda: 0, cudaProfilerStop=lambda: 0),
    }.items():
        setattr(torch.cuda, name, _copy_of(answer))
    # Newer torch optimizers query this for graph capture when a GPU seems available.
    torch.accelerator.current_stream = lambda *_: stream  # type: ignore[assignment]
    for name in ("Float", "Double", "Half", "BFloat16", "Int", "Long", "Byte", "Bool"):
        setattr(torch.cuda, f"{name}Tensor", getattr(torch, f"{name}Tensor"))
    for name in ("range_push", "range_pop", "mark"):
        setattr(torch.cuda.nvtx, name, _copy_of(nothing))
    for name, answer in {
        "get_rng_state": get_rng_state,
        "set_rng_state": set_rng_state,
        "manual_seed": manual_seed,
        # torch.manual_seed seeds the CPU, then calls this for the GPUs.
        "manual_seed_all": nothing,
    }.items():
        own = _copy_of(answer)
        setattr(torch.cuda, name, own)
        setattr(torch.cuda.random, name, own)
    # Its arguments are parsed before a mode is asked, and a stream here is none of torch's.
    torch.Tensor.record_stream = _copy_of(nothing)  # type: ignore[method-assign]
    _CudaMeansCpu().__enter__()
    # Megatron decorated its small fusions with torch.compile, which cannot trace through this mode.
    torch.compiler.set_stance("force_eager")

    use_compiled_helpers()
    # This module imported the names from torch.cuda before they were patched.
    megatron_random._lazy_call = torch.cuda._lazy_call
    megatron_random._lazy_init = torch.cuda._lazy_init
    _let_meshes_be_of_cpus()
    _let_split_sizes_be_tensors()
    _fix_resumed_adam()
    _let_torch_norms_be_sequence_parallel()
    _keep_data_loaders_from_the_generator()


def _let_meshes_be_of_cpus() -> None:
    """Make meshes of CPUs where Megatron FSDP asks for GPUs, since a mesh takes its device from its type by name."""
    from torch.distributed.device_mesh import DeviceMesh

    make = DeviceMesh.__init__

    def make_of_cpus(self: Any, device_type: str, *args: Any, **kwargs: Any) -> None:
        make(self, "cpu" if device_type == "cuda" else device_type, *args, **kwargs)

    DeviceMesh.__init__ = make_of_cpus  # type: ignore[method-assign]


def _let_split_sizes_be_tensors() -> None:
    """Convert split sizes of an all-to-all to lists, which Megatron does only if they are on a GPU."""
    exchange = torch.distributed.all_to_all_single

    def exchange_by_lists(*args: Any, **kwargs: Any) -> Any:
        for name in ("output_split_sizes", "input_split_sizes"):
            if isinstance(kwargs.get(name), torch.Tensor):
                kwargs[name] = kwargs[name].tolist()
        return exchange(*args, **kwargs)

    torch.distributed.all_to_all_single = exchange_by_lists


def use_compiled_helpers() -> None:
    """Keep Megatron from running `make` for its dataset helper where a wheel brings the compiled one; also on GPUs.

    The wheel has no Makefile, and Megatron ends the process if `make` fails. A source checkout has one, which keeps the
    helper up to date.
    """
    if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is None:
        return
    import megatron.core.datasets.utils

    if Path(megatron.core.datasets.utils.__file__).with_name("Makefile").exists():
        return
    megatron.core.datasets.utils.compile_helpers = lambda: None


def _copy_of(answer: Any) -> Any:
    """Copy a function, because torch.compile rejects a table that has one function under two names."""
    if not isinstance(answer, FunctionType):
        return answer
    own = FunctionType(answer.__code__, answer.__globals__, answer.__name__, answer.__defaults__, answer.__closure__)
    own.__kwdefaults__ = answer.__kwdefaults__
    return own


def is_installed() -> bool:
    """Return True if the CPU backend is installed in this process."""
    return _installed


def init_process_group(timeout: timedelta) -> None:
    """Initialize torch.distributed over gloo from torchrun's environment, before Megatron does."""
    store = None
    if "MASTER_PORT" not in os.environ:  # not under torchrun: one rank
        address = os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        # The store takes a free port itself: one that is chosen here first could be taken by another job meanwhile.
        store = torch.distributed.TCPStore(address, 0, world_size=1, is_master=True)  # type: ignore[attr-defined]
        os.environ["MASTER_PORT"] = str(store.port)
    torch.distributed.init_process_group(
        "gloo",
        store=store,
        rank=int(os.environ.get("RANK", "0")),
        world_size=int(os.environ.get("WORLD_SIZE", "1")),
        timeout=timeout,
    )


def _let_torch_norms_be_sequence_parallel() -> None:
    """Allow sequence parallelism with torch's norms, which are used here instead of TransformerEngine's and apex's.

    Megatron rejects it, because torch's norms do not mark their parameters for the all-reduce of gradients over
    tensor-parallel ranks. This sets the mark.
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
    """Keep data-loader iterators from advancing the random generator, which here is also the GPU's.

    Each iterator draws a seed for its workers when created, only on ranks that read data, and again after a resume.
    Dropout outside attention, which must agree on all tensor-parallel ranks, would then differ between them.
    """
    from torch.utils.data import DataLoader

    iterate = DataLoader.__iter__

    def iterate_apart(self: DataLoader) -> Any:
        with torch.random.fork_rng(devices=()):
            return iterate(self)

    DataLoader.__iter__ = iterate_apart  # type: ignore[method-assign]


def _fix_resumed_adam() -> None:
    """Make torch's Adam, which is used here instead of TransformerEngine's and apex's, resume exactly.

    Works around four faults of megatron-core 0.19's DistributedOptimizer without TransformerEngine and apex:

    - Describing the state to load asserts a step counter, which does not exist before the first step.
    - In fp32 it copies into parameters while autograd is enabled.
    - After loading, all parameters share one `step` tensor. torch's Adam advances it in place once per parameter, so
      the bias correction is wrong from the second step on.
    - The fully reshardable format has no `step`, but its copy is attempted.
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
        set_states(self, model_param, {"step": None, **tensors})  # only tensors are copied

    DistributedOptimizer._set_main_param_and_optimizer_states = set_without_step
    DistributedOptimizer.sharded_state_dict = sharded_with_state
    DistributedOptimizer.load_state_dict = load_with_own_steps


def main(argv: Sequence[str] | None = None) -> int:
    """Run a Megatron training script on CPU: ``python -m abkd_megatron.cpu_backend SCRIPT [ARGUMENTS]``.

    Initializes torch.distributed over gloo and prepends the Megatron arguments that a CPU needs.

    Args:
        argv: the script and its arguments; None takes the process's.

    Returns:
        2 if the script does not exist; otherwise 0 when the script returns.

    Raises:
        HostError: if there is a GPU.

    Collectives: from initializing torch.distributed.
    """
    script, *arguments = (sys.argv[1:] if argv is None else argv) or [""]
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
    minutes = from_argv(arguments, options).get("distributed-timeout-minutes", 10)
    init_process_group(timedelta(minutes=float(str(minutes))))
    sys.argv = [script, *to_argv(MEGATRON_DEFAULTS, options), *arguments]
    sys.path.insert(0, str(Path(script).resolve().parent))  # as Python does for a script
    runpy.run_path(script, run_name="__main__")
    return 0


if __name__ == "__main__":
    # Import the module under its own name, where others find the installed state.
    from abkd_megatron import cpu_backend

    sys.exit(cpu_backend.main())
