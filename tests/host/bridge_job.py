"""One job of Megatron Bridge on CPU ranks; `test_bridge.py` starts it: CASE FOLDER [OVERRIDES of the container].

The models in FOLDER/hf are tiny and random; folders there named like models of the Hub serve Bridge's own recipes.
Prints one line on the last rank: FACTS, and what was found as JSON.
"""

import importlib.machinery
import json
import os
import re
import sys
import types
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

VOCABULARY = 256
SNAPSHOT = "0" * 40
LOCAL_SPEC = "megatron.bridge.models.gpt_provider.local_layer_spec"
LOCAL_HYBRID_SPEC = "abkd_megatron.local_hybrid_spec.local_hybrid_stack_spec"
# Name, name on the Hub, hidden size and layers. Mamba would need packages.
HYBRIDS = (
    ("hybrid-student", "nvidia/NVIDIA-Nemotron-3-Nano-4B-BF16", 32, "*-*-"),
    ("hybrid-teacher", "nvidia/NVIDIA-Nemotron-Nano-9B-v2", 48, "*-*-*-"),
)

# How Megatron computes on a CPU: every fused kernel off.
ON_CPU: dict[str, Any] = {
    "transformer_impl": "local",
    "gradient_accumulation_fusion": False,
    "masked_softmax_fusion": False,
    "bias_activation_fusion": False,
    "bias_dropout_fusion": False,
    "apply_rope_fusion": False,
    "persist_layer_norm": False,
    "attention_dropout": 0.0,
}
OF_PROVIDER = {**ON_CPU, "cross_entropy_loss_fusion": False}
# Bridge sets them for models without experts, too.
OF_HYBRID = {
    **OF_PROVIDER,
    **dict.fromkeys(("moe_permute_fusion", "moe_grouped_gemm", "moe_shared_expert_overlap"), False),
}


def import_bridge() -> None:
    """Bridge imports TransformerEngine for adapters that fuse with it: let that one import find something."""
    import megatron.core.extensions.transformer_engine
    import megatron.training  # first, so that Megatron sees there is none

    names = ("transformer_engine", "transformer_engine.pytorch")
    absent = importlib.util.find_spec(names[0]) is None
    if absent:
        for name in names:
            module = sys.modules[name] = types.ModuleType(name)
            module.__spec__, module.__path__ = importlib.machinery.ModuleSpec(name, None), []
        sys.modules[names[0]].pytorch = sys.modules[names[1]]  # type: ignore[attr-defined]
        sys.modules[names[1]].ops = MagicMock()  # type: ignore[attr-defined]  # named in annotations
    import megatron.bridge

    if absent:
        for name in names:
            del sys.modules[name]
        import megatron.bridge.peft.utils

        megatron.bridge.peft.utils.HAVE_TE = False  # Megatron's stand-ins have every name
    import megatron.bridge.recipes
    import megatron.bridge.training.pretrain


def make_models(folder: Path) -> None:
    """A student and a teacher of Hugging Face, and a cache of the Hub that has them under their recipe's names."""
    import torch
    from safetensors.torch import load_file, save_file
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen3Config
    from transformers.models.nemotron_h import NemotronHConfig, NemotronHForCausalLM

    def snapshot_of(name: str) -> Path:
        cached = folder / "hub" / f"models--{name.replace('/', '--')}"
        (cached / "refs").mkdir(parents=True)
        (cached / "refs" / "main").write_text(SNAPSHOT)
        return cached / "snapshots" / SNAPSHOT

    words = Tokenizer(models.WordLevel({str(word): word for word in range(VOCABULARY)}, unk_token="0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="0", eos_token="1")
    for name, of_hub, hidden, layers in (("student", "Llama-3.2-1B", 32, 2), ("teacher", "Llama-3.2-3B", 48, 4)):
        torch.manual_seed(hidden)
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            tie_word_embeddings=name == "student",
            initializer_range=0.3,  # so that no distribution is near the uniform one
        )
        snapshot = snapshot_of(f"meta-llama/{of_hub}")
        LlamaForCausalLM(config).save_pretrained(snapshot)
        tokenizer.save_pretrained(snapshot)
        (folder / name).symlink_to(snapshot)
    for name, of_hub, hidden, layers in HYBRIDS:
        torch.manual_seed(hidden)
        config = NemotronHConfig(
            vocab_size=VOCABULARY,
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            layers_block_type=[{"*": "attention", "-": "mlp"}[layer] for layer in layers],
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            mamba_num_heads=4,
            mamba_head_dim=hidden // 2,
            n_groups=2,
            max_position_embeddings=64,
            initializer_range=0.3,
        )
        snapshot = snapshot_of(of_hub)
        NemotronHForCausalLM(config).save_pretrained(snapshot)
        weights = load_file(snapshot / "model.safetensors")
        # As the models on the Hub have it; transformers 5.12 reads this name and writes another.
        weights["backbone.embeddings.weight"] = weights.pop("backbone.embedding.weight")
        save_file(weights, snapshot / "model.safetensors", {"format": "pt"})
        tokenizer.save_pretrained(snapshot)
        (folder / name).symlink_to(snapshot)
    # What other recipes build their student from: a config alone.
    others = {
        "meta-llama/Meta-Llama-3.1-8B": LlamaConfig,
        "Qwen/Qwen3-0.6B": Qwen3Config,
        "Qwen/Qwen3-1.7B": Qwen3Config,
    }
    for of_hub, kind in others.items():
        config = kind(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
        config.architectures = [kind.__name__.replace("Config", "ForCausalLM")]
        config.save_pretrained(snapshot_of(of_hub))


def small(config: Any, folder: Path) -> None:
    """What a recipe needs to be a job of seconds on a CPU; the model and the teacher apart."""
    import torch

    config.dataset.seq_length, config.dataset.num_workers = 32, 0
    config.train.train_iters, config.train.global_batch_size, config.train.micro_batch_size = 3, 4, 2
    config.validation.eval_iters, config.validation.eval_interval = 1, 100
    config.scheduler.lr_warmup_iters, config.optimizer.lr = 0, 1e-2
    config.logger.log_interval, config.logger.tensorboard_dir = 1, None
    config.checkpoint.save, config.checkpoint.load, config.checkpoint.save_interval = str(folder / "saved"), None, 3
    config.mixed_precision, config.optimizer.bf16 = None, False
    config.dist.distributed_backend, config.dist.disable_jit_fuser = "gloo", True
    config.dist.distributed_timeout_minutes = 3
    config.ddp.overlap_grad_reduce = config.ddp.overlap_param_gather = config.ddp.average_in_collective = False
    config.comm_overlap = None
    is_hybrid, is_built = (hasattr(config.model, name) for name in ("hybrid_stack_spec", "transformer"))
    of_model = ON_CPU if is_built else OF_HYBRID if is_hybrid else OF_PROVIDER
    given = {**of_model, "use_cpu_initialization": True, "seq_length": 32, "bf16": False}
    for name, value in {**given, "params_dtype": torch.float32, "pipeline_dtype": torch.float32}.items():
        setattr(config.model, name, value)
    if is_hybrid:
        from abkd_megatron.local_hybrid_spec import local_hybrid_stack_spec

        config.model.hybrid_stack_spec = local_hybrid_stack_spec
    elif not is_built:
        from megatron.bridge.models.gpt_provider import local_layer_spec

        config.model.transformer_layer_spec = local_layer_spec


def builder_config(vocab_size: int, pattern: str | None = None, **settings: Any) -> Any:
    """A student in Bridge's newer kind of model config; a hybrid of that pattern if given."""
    import torch
    from megatron.bridge.models.gpt.gpt_builder import GPTModelConfig
    from megatron.bridge.models.hybrid.hybrid_builder import HybridModelConfig
    from megatron.bridge.models.transformer_config import TransformerConfig

    transformer = TransformerConfig(
        num_layers=len(pattern) if pattern else 2,
        hidden_size=32,
        ffn_hidden_size=64,
        num_attention_heads=4,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        init_method_std=0.3,
    )
    given = {"vocab_size": vocab_size, "seq_length": 32, "position_embedding_type": "rope", **settings}
    if pattern:
        config = HybridModelConfig(transformer=transformer, hybrid_layer_pattern=pattern, **given)
    else:
        config = GPTModelConfig(transformer=transformer, **given)
    config.transformer.seq_length = 32  # where Bridge 0.6.2 looks for it when it warms functions up
    return config


class Recording:
    """A forward step of a user's own: Bridge's, on batches of which every third token does not count."""

    def __init__(self) -> None:
        self.training: list[dict[str, Any]] = []
        self.validation: list[dict[str, Any]] = []

    def __call__(self, state: Any, data_iterator: Any, model: Any) -> Any:
        from megatron.bridge.training.gpt_step import forward_step

        def batches() -> Any:
            while True:
                batch = next(data_iterator)
                batch["loss_mask"][:, ::3] = 0
                names = ("tokens", "labels", "position_ids", "loss_mask")
                seen = {name: batch[name].clone() for name in names}
                (self.training if model.training else self.validation).append(seen)
                yield batch

        return forward_step(state, batches() if data_iterator is not None else None, model)


def dense_twin(
    folder: Path,
    micro_batches: list[dict[str, Any]],
    temperature: float,
    names: tuple[str, str] = ("student", "teacher"),
) -> dict[str, float]:
    """The first step's numbers, by Hugging Face's models and the specification of the loss."""
    import torch
    from transformers import AutoModelForCausalLM

    from abkd_megatron.losses.reference import reference_alpha_beta

    student, teacher = (
        AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float64).eval() for name in names
    )
    sums = dict.fromkeys(("lm loss", "kd loss", "teacher lm loss"), 0.0)
    total, count = torch.zeros((), dtype=torch.float64), 0.0
    for batch in micro_batches:
        mask, labels = batch["loss_mask"].double(), batch["labels"].unsqueeze(-1)
        q, p = (model(batch["tokens"], use_cache=False).logits for model in (student, teacher))
        losses = {
            "lm loss": -q.log_softmax(-1).gather(-1, labels).squeeze(-1),
            "kd loss": reference_alpha_beta(q, p.detach(), 0.5, 0.7, temperature),
            "teacher lm loss": -p.log_softmax(-1).gather(-1, labels).squeeze(-1),
        }
        # By default Megatron divides each micro-batch by its own count and averages; here all have the same.
        count += mask.sum().item()
        for name, value in losses.items():
            sums[name] += (value * mask).sum().item()
        total = total + ((losses["lm loss"] + losses["kd loss"]) * mask).sum()
    (total / count).backward()
    norm = torch.stack([it.grad.norm() for it in student.parameters()]).norm().item()
    return {"grad norm": norm, **{name: value / count for name, value in sums.items()}}


def train(
    config: Any, forward_step: Any, after: Callable[[Any], None] | None = None, teacher: bool = True
) -> dict[str, Any]:
    """Train, and call `after` with the student while Megatron's groups are still there; returns what was reported."""
    facts: dict[str, Any] = {}
    from megatron.bridge.training.callbacks import Callback
    from megatron.bridge.training.pretrain import pretrain

    from abkd_megatron.hosts import bridge

    class Watching(Callback):
        def on_train_step_end(self, context: Any) -> None:
            found = {name: float(value) for name, value in context.loss_dict.items()}
            facts.setdefault("steps", []).append({**found, "grad norm": float(context.grad_norm)})

        def on_train_end(self, context: Any) -> None:
            facts["keys"] = sorted(context.model[0].state_dict())
            if after is not None:
                after(context.model)

        def on_eval_end(self, context: Any) -> None:
            facts["validation"] = {name: float(value) for name, value in context.total_loss_dict.items()}

    (bridge.distill if teacher else pretrain)(config, forward_step, [Watching()])
    return facts


def recipe(folder: Path, overrides: list[str], names: tuple[str, str] = ("student", "teacher")) -> Any:
    """The student of Hugging Face in a recipe of Bridge's, with its teacher."""
    from megatron.bridge import AutoBridge
    from megatron.bridge.recipes.common import _pretrain_common
    from megatron.bridge.training.utils.omegaconf_utils import process_config_with_overrides

    from abkd_megatron.hosts import bridge

    plain = _pretrain_common()
    plain.model = AutoBridge.from_hf_pretrained(str(folder / names[0])).to_megatron_provider()
    plain.tokenizer.tokenizer_type, plain.tokenizer.use_tokenizer_vocab_size = "NullTokenizer", False
    plain.tokenizer.vocab_size = VOCABULARY - 1
    small(plain, folder)
    theirs = {**OF_PROVIDER, "transformer_layer_spec": LOCAL_SPEC}
    if names[1].startswith("hybrid"):
        theirs = {**OF_HYBRID, "hybrid_stack_spec": LOCAL_HYBRID_SPEC}
    teacher = {"hf": str(folder / names[1]), "overrides": theirs}
    config = bridge.DistillConfigContainer.of(plain, bridge.TeacherConfig(**teacher))
    # The teachers here are untrained.
    untrained = "distillation.skip_preflight=[teacher_loss]"
    given = ["distillation.temperature=2", "distillation.alpha=0.5", untrained, *overrides]
    return process_config_with_overrides(config, cli_overrides=given)


def hf(folder: Path, overrides: list[str]) -> dict[str, Any]:
    """A provider and a teacher of Hugging Face; beside a dense twin, on one rank."""
    import torch

    config, step = recipe(folder, overrides), Recording()
    if torch.distributed.get_world_size() > 1:
        config.checkpoint.save = None
        return train(config, step)
    facts = train(config, step, lambda student: keep(folder, student[0], step.training[:2]))
    facts["twin"] = dense_twin(folder, step.training[:2], 2.0)
    write_cache(folder, [*step.training, *step.validation])
    return facts


def write_cache(folder: Path, batches: list[dict[str, Any]]) -> None:
    """All log-probabilities of Hugging Face's teacher at temperature 2 for the samples of these batches."""
    import torch
    from transformers import AutoModelForCausalLM

    from abkd_megatron.cache.key import sample_key
    from abkd_megatron.cache.manifest import Identity
    from abkd_megatron.cache.store import CacheWriter
    from abkd_megatron.vocab_parallel import VocabShard
    from abkd_megatron.vocab_parallel.truncate import truncate

    identity = Identity(
        teacher="0",
        teacher_path=str(folder / "teacher"),
        teacher_iteration=None,
        tokenizer="NullTokenizer",
        vocab_size=VOCABULARY,
        seq_length=32,
        reset_attention_mask=False,
        temperature=2.0,
        top_k=VOCABULARY,
        precision="fp32",
    )
    teacher = AutoModelForCausalLM.from_pretrained(folder / "teacher", dtype=torch.float64).eval()
    shard = VocabShard(0, VOCABULARY, VOCABULARY)
    with CacheWriter(folder / "cache", identity) as writer, torch.no_grad():
        for batch in batches:
            logits = teacher(batch["tokens"], use_cache=False).logits
            for row, of_sample in enumerate(logits):
                records = truncate(of_sample, batch["labels"][row], shard, VOCABULARY, 2.0)
                key = sample_key({name: it[row] for name, it in batch.items()})
                writer.add(key, identity.layout.pack(records).numpy())


def cached(folder: Path, overrides: list[str]) -> dict[str, Any]:
    """The student of `hf` with the cache that it wrote, in place of the teacher."""
    given = ["teacher.hf=null", "teacher.overrides={}", f"distillation.cache={folder / 'cache'}"]
    config = recipe(folder, [*given, *overrides])
    config.checkpoint.save = None
    return train(config, Recording())


def hybrid(folder: Path, overrides: list[str]) -> dict[str, Any]:
    """Providers of HybridModels: both of Nemotron's family, then one of Llama's; the first names the models."""
    import torch

    student, teacher, *more = overrides
    config, step = recipe(folder, more, (student, teacher)), Recording()
    config.checkpoint.save = None
    facts = train(config, step)
    if torch.distributed.get_world_size() == 1:
        facts["twin"] = dense_twin(folder, step.training[:2], 2.0, (student, teacher))
    return facts


def watched(folder: Path, overrides: list[str], teacher: bool = True) -> dict[str, Any]:
    """That student, and nothing is kept."""
    config = recipe(folder, overrides)
    config.checkpoint.save = None
    return train(config, Recording(), teacher=teacher)


def plain(folder: Path, overrides: list[str]) -> dict[str, Any]:
    """The same in Bridge alone."""
    return watched(folder, overrides, teacher=False)


def adapter(folder: Path, overrides: list[str]) -> dict[str, Any]:
    """The student with LoRA, and the model that it began as for its teacher; the first word names the run.

    The run "copied" has the teacher's weights twice.
    """
    from megatron.bridge.peft.lora import LoRA
    from megatron.core.utils import unwrap_model

    from abkd_megatron.hosts import bridge

    name, *more = overrides
    config = recipe(folder, more, ("student", "student"))
    config.peft, config.checkpoint.pretrained_checkpoint = LoRA(dim=4, alpha=8), str(folder / "student")
    config.scheduler.lr_decay_iters = 4
    config.checkpoint.save_interval = 2
    config.checkpoint.save = config.checkpoint.load = str(folder / name)
    made, share = [], bridge.share_frozen_weights

    def noted(teacher: Any, student: Any) -> Any:
        made.append(teacher)
        return (0, 0) if name == "copied" else share(teacher, student)

    bridge.share_frozen_weights = noted
    facts: dict[str, Any] = {}

    def after(student: list[Any]) -> None:
        own = {name.replace(".to_wrap.", "."): it for name, it in unwrap_model(student[0]).named_parameters()}
        facts["own"] = [name for name, it in made[0].named_parameters() if it.data_ptr() != own[name].data_ptr()]
        facts["trained"] = [name for name, it in own.items() if it.requires_grad]

    facts |= train(config, Recording(), after)
    return facts


def keep(folder: Path, student: Any, batches: list[dict[str, Any]]) -> None:
    """The student's logits, to compare with; the teacher and a quantized student in checkpoints of Bridge's."""
    import torch
    from bridge_quantized import save_quantized
    from megatron.bridge.training.model_load_save import save_megatron_model

    tokens = batches[0]["tokens"]
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    with torch.no_grad():
        torch.save((tokens, student.eval()(tokens, positions, None)), folder / "logits.pt")
    student.train()
    save_megatron_model(model_of(folder / "teacher"), folder / "teacher-of-bridge")
    save_quantized(model_of(folder / "student"), batches, folder)


def model_of(path: Path) -> Any:
    """A model of Hugging Face as Bridge builds it, within the groups of a job."""
    import torch
    from megatron.bridge import AutoBridge
    from megatron.bridge.models.gpt_provider import local_layer_spec

    provider = AutoBridge.from_hf_pretrained(str(path)).to_megatron_provider()
    given = {**OF_PROVIDER, "transformer_layer_spec": local_layer_spec}
    provider.apply_overrides_and_finalize(dtype=torch.float32, overrides=given)
    return provider.provide_distributed_model(wrap_with_ddp=False, use_cpu_initialization=True)


def quantized(folder: Path, overrides: list[str]) -> dict[str, Any]:
    """The student that ModelOpt has quantized, and the model before that for its teacher."""
    from bridge_quantized import num_quantizers

    config = recipe(folder, overrides, ("student", "student"))
    config.model.restore_modelopt_state = True
    config.checkpoint.pretrained_checkpoint, config.checkpoint.save = str(folder / "quantized"), None
    facts: dict[str, Any] = {}
    facts |= train(config, Recording(), lambda student: facts.update(quantizers=num_quantizers(student[0])))
    return {**facts, "kl": json.loads((folder / "quantized.json").read_text())}


def builder(folder: Path, overrides: list[str]) -> dict[str, Any]:
    """A student that a builder builds, of a pattern if given, and a teacher's torch_dist checkpoint of Bridge's."""
    config = recipe(folder, [])
    config.model = builder_config(VOCABULARY, *overrides)
    small(config, folder / "-".join(["builder", *map(str, map(len, overrides))]))
    config.teacher.hf, config.teacher.load = None, str(folder / "teacher-of-bridge")
    config.teacher.overrides = {}
    return train(config, Recording())


def megatron_lm(folder: Path, overrides: list[str]) -> dict[str, Any]:
    """The same with a teacher that Megatron-LM's loop trained, on another vocabulary, with padding."""
    from megatron.bridge.training.gpt_step import forward_step
    from megatron.bridge.training.utils.omegaconf_utils import process_config_with_overrides

    config = recipe(folder, [])
    config.model = builder_config(400, should_pad_vocab=True)
    config.tokenizer.vocab_size = 399
    small(config, folder / "megatron-lm")
    config.teacher.hf, config.teacher.overrides = None, {}
    return train(process_config_with_overrides(config, cli_overrides=overrides), forward_step)


def export(folder: Path, overrides: list[str]) -> dict[str, Any]:
    """The distilled student as a model of Hugging Face."""
    import torch
    from transformers import AutoModelForCausalLM

    from abkd_megatron.hosts.bridge import export_to_hf

    torch.distributed.destroy_process_group()
    export_to_hf(folder / "saved", folder / "student", folder / "exported")
    tokens, logits = torch.load(folder / "logits.pt")
    before, after = (
        AutoModelForCausalLM.from_pretrained(folder / name)(tokens).logits.detach() for name in ("student", "exported")
    )
    return {"from the student": (after - logits).abs().max().item(), "learned": (after - before).abs().max().item()}


def settings(folder: Path, overrides: list[str]) -> dict[str, Any]:
    """A container as Bridge writes it, read again by Bridge; then what is refused, by what was set beside the rest."""
    from abkd_megatron.errors import AbkdError
    from abkd_megatron.hosts import bridge, bridge_teacher

    given = ["distillation.alpha={schedule: linear, from: 0.5, to: 0.2, end: 3}", "distillation.divergence=alpha_beta"]
    config = recipe(folder, given)
    bridge.add_teacher(config)
    config.to_yaml(str(folder / "container.yaml"))
    again = bridge.DistillConfigContainer.from_yaml(str(folder / "container.yaml"))
    facts: dict[str, Any] = {
        "text": (folder / "container.yaml").read_text(),
        "equal": [again.teacher == config.teacher, again.distillation == config.distillation],
        "refused": {},
    }
    attempts: dict[str, Callable[[], Any]] = {
        "vocabulary": lambda: bridge_teacher._check_vocabulary(VOCABULARY, 400, None),
        "shared vocabulary": lambda: bridge_teacher._check_vocabulary(VOCABULARY, 400, 300),
        "export": lambda: bridge.export_to_hf(folder, folder, folder),
        "no hook": lambda: bridge.BridgeStep(Recording())(None, None, None),  # type: ignore[arg-type]
        "no such override": lambda: bridge_teacher._resolved({"depth": 2}, config.model),
        "no such function": lambda: bridge_teacher._resolved({"transformer_layer_spec": "nowhere.spec"}, config.model),
        **{setting: lambda it=setting: bridge.add_teacher(recipe(folder, [it])) for setting in overrides},
    }
    for name, attempt in attempts.items():
        try:
            attempt()
        except AbkdError as error:
            facts["refused"][name] = f"{type(error).__name__}: {error}"
    return facts


def document(folder: Path, overrides: list[str]) -> dict[str, Any]:
    """The document's examples, the first one's last call on a configuration for a CPU; and every recipe."""
    from abkd_megatron.hosts import bridge

    example, of_any_recipe, of_adapters = re.findall(r"```python\n(.*?)```", Path(overrides[0]).read_text(), re.DOTALL)
    first, last = example.split("\ndistill(")
    names: dict[str, Any] = {}
    exec(compile(of_any_recipe, "docs/bridge.md", "exec"), names)
    facts: dict[str, Any] = {"any recipe's teacher": names["config"].teacher.hf}
    exec(compile(of_adapters, "docs/bridge.md", "exec"), names)
    assert names["config"].peft.dim == 16
    for name in ("llama32_3b_to_1b", "llama31_70b_to_8b", "qwen3_8b_to_1p7b", "nemotron_nano_9b_to_4b"):
        config = getattr(bridge, f"{name}_distill_config")()
        bridge.add_teacher(config)
        facts[name] = [config.teacher.hf, config.tokenizer.tokenizer_model, config.model.tensor_model_parallel_size]
        assert not config.tokenizer.use_tokenizer_vocab_size
    exec(compile(first, "docs/bridge.md", "exec"), names)
    config = names["config"]
    facts["temperature"] = config.distillation.temperature
    small(config, folder / "document")
    config.distillation.skip_preflight = ["teacher_loss"]  # the model is untrained
    config.teacher.overrides = {**OF_PROVIDER, "transformer_layer_spec": LOCAL_SPEC}
    exec(compile(f"distill({last}", "docs/bridge.md", "exec"), names)
    facts["saved"] = sorted(path.name for path in (folder / "document" / "saved").iterdir())
    return facts


def main(case: str, folder: Path, overrides: list[str]) -> None:
    import torch

    from abkd_megatron import cpu_backend

    cpu_backend.install()
    import_bridge()
    if case == "models":
        make_models(folder)
        return
    cpu_backend.init_process_group(timedelta(minutes=3))
    facts = globals()[case](folder, overrides)
    if os.environ.get("RANK", "0") == str(int(os.environ.get("WORLD_SIZE", "1")) - 1):
        print("FACTS", json.dumps(facts), flush=True)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
