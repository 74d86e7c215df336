"""What this package takes of Megatron Bridge, by name and signature, read from Bridge's source without importing it.

The source is the installed Bridge's, or else that of the newest wheel which the extra `bridge` allows, downloaded
without its dependencies (2 MB): Bridge imports TransformerEngine, and no test machine needs that to read it. Without a
network it is skipped. What only running shows is in `tests/host/test_bridge.py`.
"""

import ast
import importlib.util
import re
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from abkd_megatron.errors import HostError

ROOT = Path(__file__).resolve().parents[2]
USER = ROOT / "abkd_megatron" / "hosts" / "bridge.py"


@dataclass(frozen=True)
class Call:
    """A function or a method (`module:Class.method`), and how it is called."""

    target: str
    positional: tuple[str, ...] = ()
    """What we give by position, as Bridge names it."""
    keywords: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.target


TRAINING, MODELS = "megatron.bridge.training", "megatron.bridge.models"
AUTO = f"{MODELS}.conversion.auto_bridge:AutoBridge"
PROVIDER = f"{MODELS}.model_provider:ModelProviderMixin"

CALLS = [
    Call(f"{TRAINING}.pretrain:pretrain", ("config", "forward_step_func", "callbacks")),
    Call(f"{TRAINING}.gpt_step:forward_step", ("state", "data_iterator", "model")),
    Call(f"{TRAINING}.utils.train_utils:needs_global_state_injection", ("forward_step_func",)),
    Call(f"{TRAINING}.utils.train_utils:maybe_inject_state", ("forward_step_func", "state"), ("needs_injection",)),
    Call(f"{TRAINING}.model_load_save:load_model_config", ("checkpoint_path",)),
    Call("megatron.bridge.utils.instantiate_utils:register_allowed_target_prefix", ("prefix",)),
    Call(f"{AUTO}.from_hf_pretrained", ("cls", "path")),
    Call(f"{AUTO}.to_megatron_provider", ("self",)),
    Call(f"{AUTO}.export_ckpt", ("self", "megatron_path", "hf_path"), ("show_progress", "strict")),
    Call(f"{PROVIDER}.register_post_wrap_hook", ("self", "hook")),
    Call(f"{PROVIDER}.apply_overrides_and_finalize", ("self",), ("dtype", "overrides")),
    Call(
        f"{PROVIDER}.provide_distributed_model",
        ("self",),
        ("wrap_with_ddp", "mixed_precision_wrapper", "pg_collection", "use_cpu_initialization"),
    ),
    Call("megatron.bridge.recipes.llama.h100.llama3:llama32_1b_pretrain_1gpu_h100_bf16_config"),
    Call("megatron.bridge.recipes.llama.h100.llama3:llama31_8b_pretrain_2gpu_h100_bf16_config"),
    Call("megatron.bridge.recipes.qwen.h100.qwen3:qwen3_1p7b_pretrain_1gpu_h100_bf16_config"),
    Call("megatron.bridge.recipes.nemotronh.h100.nemotron_3_nano_4b:nemotron_3_nano_4b_pretrain_8gpu_h100_bf16_config"),
]

# Classes, the fields or attributes of theirs that are read, and those that only a base in Megatron has.
FIELDS = {
    f"{TRAINING}.config:ConfigContainer": (
        *("rerun_state_machine", "train", "model", "dataset", "tokenizer", "checkpoint", "dist", "peft", "rng"),
    ),
    f"{TRAINING}.config:RNGConfig": (),  # `seed` is Megatron-LM's
    f"{TRAINING}.config:DistributedInitConfig": ("eval_context_parallel_size",),
    f"{TRAINING}.config:RerunStateMachineConfig": (),
    f"{TRAINING}.state:GlobalState": ("cfg", "train_state"),
    f"{TRAINING}.state:TrainState": ("step", "consumed_train_samples"),
    f"{TRAINING}.config:TokenizerConfig": (),
    f"{MODELS}.gpt_provider:GPTModelProvider": (
        *("vocab_size", "should_pad_vocab", "make_vocab_size_divisible_by", "seq_length", "num_moe_experts"),
        *("virtual_pipeline_model_parallel_size", "transformer_layer_spec"),
    ),
    f"{MODELS}.hybrid.hybrid_provider:HybridModelProvider": (
        *("vocab_size", "should_pad_vocab", "make_vocab_size_divisible_by", "seq_length", "hybrid_stack_spec"),
        *("hybrid_layer_pattern", "mtp_hybrid_override_pattern"),
    ),
}

# What our recipes call is another name of these.
ALIASES = {
    "megatron.bridge.recipes.llama.llama3": ("llama32_1b_pretrain_config", "llama31_8b_pretrain_config"),
    "megatron.bridge.recipes.qwen.qwen3": ("qwen3_1p7b_pretrain_config",),
    "megatron.bridge.recipes.nemotronh.nemotron_3_nano_4b": ("nemotron_3_nano_4b_pretrain_config",),
}


@pytest.fixture(scope="session")
def bridge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that holds `megatron/bridge`."""
    found = importlib.util.find_spec("megatron")
    for place in found.submodule_search_locations or () if found else ():
        if (Path(place) / "bridge" / "__init__.py").is_file():
            return Path(place).parent
    wanted = re.search(r'"bridge": \["(megatron-bridge[^"]*)"\]', (ROOT / "setup.py").read_text())
    assert wanted
    folder = tmp_path_factory.mktemp("bridge")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--ignore-requires-python"]
    got = subprocess.run([*pip, "--dest", folder, wanted[1]], capture_output=True, text=True, timeout=120)
    if got.returncode:
        pytest.skip(f"Megatron Bridge is neither installed nor to be had by pip: {got.stderr.strip()[-300:]}")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def module(bridge: Path, name: str) -> ast.Module:
    path = bridge.joinpath(*name.split("."))
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    if not source.is_file():
        pytest.fail(f"Megatron Bridge has no {name}; {USER.name} uses it")
    return ast.parse(source.read_text())


def find(bridge: Path, target: str) -> ast.AST:
    """A definition, or a name that the module imports."""
    name, _, path = target.partition(":")
    at: ast.AST = module(bridge, name)
    for part in path.split("."):
        for node in ast.iter_child_nodes(at):
            names = [getattr(node, "name", "")]
            if isinstance(node, ast.ImportFrom):
                names = [alias.asname or alias.name for alias in node.names]
            if part in names:
                at = node
                break
        else:
            pytest.fail(f"Megatron Bridge: {target} is gone; {USER.name} uses it")
    return at


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_it_can_be_called_as_we_do(bridge: Path, call: Call) -> None:
    found = find(bridge, call.target)
    assert isinstance(found, ast.FunctionDef), f"Megatron Bridge: {call.target} is no function; {USER.name} calls it"
    given = found.args
    first = [it.arg for it in (*given.posonlyargs, *given.args)]
    told = f"Megatron Bridge: {call.target}({', '.join(first)}); {USER.name}"
    count = len(call.positional)
    assert tuple(first[:count]) == call.positional, f"{told} gives {call.positional} by position"
    left = {*first[count:], *(it.arg for it in given.kwonlyargs)}
    assert left >= set(call.keywords) or given.kwarg, f"{told} gives {call.keywords} by name"
    without_default = first[count : len(first) - len(given.defaults)]
    without_default += [it.arg for it, of in zip(given.kwonlyargs, given.kw_defaults, strict=True) if of is None]
    missing = set(without_default) - set(call.keywords)
    assert not missing, f"{told} does not give {missing}"


@pytest.mark.parametrize(("target", "names"), FIELDS.items(), ids=lambda it: it if isinstance(it, str) else "")
def test_it_has_what_we_look_at(bridge: Path, target: str, names: tuple[str, ...]) -> None:
    found = find(bridge, target)
    has = {node.target.id for node in ast.walk(found) if isinstance(node, ast.AnnAssign) and hasattr(node.target, "id")}
    has |= {node.name for node in ast.walk(found) if isinstance(node, ast.FunctionDef)}
    missing = [name for name in names if name not in has]
    assert not missing, f"Megatron Bridge: {target} has no {missing}; {USER.name} uses them"


def test_a_step_that_takes_no_schedule_plan_is_given_the_state(bridge: Path) -> None:
    """By the name of its first parameter or its annotation; ours has both."""
    found = find(bridge, f"{TRAINING}.utils.train_utils:needs_global_state_injection")
    assert "'state'" in ast.unparse(found) and "GlobalState" in ast.unparse(found)
    step = next(
        node
        for node in ast.walk(ast.parse(USER.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name == "__call__"
    )
    assert [it.arg for it in step.args.args] == ["self", "state", "data_iterator", "model"]


def test_bridges_own_step_takes_batches_and_calls_the_model_as_we_count_on(bridge: Path) -> None:
    """The loss mask is noted in the batch that `next` gives, and the model is called with labels by name."""
    text = ast.unparse(find(bridge, f"{TRAINING}.gpt_step:get_batch_from_iterator"))
    assert "next(data_iterator)" in text and "'loss_mask'" in text
    text = ast.unparse(find(bridge, f"{TRAINING}.gpt_step:_forward_step_common"))
    assert "'labels': labels" in text and "model(**forward_args)" in text


def test_all_that_is_imported_has_a_contract(bridge: Path) -> None:
    known = [it.replace(":", ".") for it in (*(call.target for call in CALLS), *FIELDS)] + list(ALIASES)
    names = {
        f"{node.module}.{alias.name}"
        for node in ast.walk(ast.parse(USER.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("megatron.bridge")
        for alias in node.names
    }
    assert len(names) >= 10
    elsewhere = {"megatron.bridge.AutoBridge": AUTO.replace(":", ".")}
    for name in names:
        name = elsewhere.get(name, name)
        assert any(it == name or it.startswith(f"{name}.") for it in known), f"{USER.name} imports {name}: add it"
    for name, functions in ALIASES.items():
        for function in functions:
            find(bridge, f"{name}:{function}")
            assert f".{function}()" in USER.read_text()


def test_without_bridge_that_is_said() -> None:
    pytest.importorskip("megatron.training")
    if importlib.util.find_spec("megatron.bridge") is not None:
        pytest.skip("Megatron Bridge is installed")
    with pytest.raises(HostError, match=r"Bridge 0\.6 .*'megatron\.bridge'"):
        importlib.import_module("abkd_megatron.hosts.bridge")
