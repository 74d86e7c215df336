"""Keys of `generate` and of `distillation.on_policy`, and the rules of sampling. Does not import megatron."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from abkd_megatron.errors import ConfigError
from abkd_megatron.losses import registry
from abkd_megatron.losses.schedule import Schedule

if TYPE_CHECKING:
    from abkd_megatron.config.schema import Config

# Layers of a HybridModel's pattern that have a state of their own in place of keys and values.
_RECURRENT = "MG"
_FORMATS_THAT_COUNT_ALL = ("default", "identity")


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is drawn from a model's distribution.

    Raises:
        ConfigError: for a number out of range.
    """

    temperature: float = 1.0
    """Divides the logits; 0 takes the most probable token."""
    top_k: int | None = None
    """Draw from the k most probable tokens; ties with the k-th are kept. None: all."""
    top_p: float | None = None
    """Draw from the smallest set of most probable tokens with at least this mass, after `top_k`. None: all."""
    seed: int = 0
    """Of the noise."""

    def __post_init__(self) -> None:
        rules = (
            ("temperature", self.temperature >= 0, "0 or more", self.temperature),
            ("top_k", self.top_k is None or self.top_k >= 1, "1 or more", self.top_k),
            ("top_p", self.top_p is None or 0 < self.top_p <= 1, "a number above 0, at most 1", self.top_p),
        )
        for name, holds, expected, got in rules:
            if not holds:
                raise ConfigError(f"{name}: expected {expected}, got {got}")


@dataclass(frozen=True, kw_only=True)
class OnPolicy(Sampling):
    """Training steps on text that the student continues itself, see docs/on_policy.md.

    Raises:
        ConfigError: for a number out of range.
    """

    share: float | Schedule
    """Probability that a step trains on the student's own text."""
    prompt_tokens: int | None = None
    """First tokens of a sample of the data, which the student continues. With conversations the longest prompt; None:
    as long as fits with `new_tokens`."""
    new_tokens: int
    """At most so many are added."""
    source: str | None = None
    """``module:function`` that continues prompts in place of the student: from lists of ids to lists of new ids."""
    reward: str | None = None
    """``module:function`` from prompts and added texts, lists of strings, to a list of numbers; None: no reward."""
    reward_weight: float = 1.0
    """Weight of the policy gradient of the reward, beside `kd_weight` times the divergence."""
    group: int = 1
    """Consecutive samples that continue one prompt, the first's, and whose rewards are compared."""

    def __post_init__(self) -> None:
        super().__post_init__()
        values = [value for _, value in Schedule.of(self.share).points]
        if not all(0 <= value <= 1 for value in values):
            raise ConfigError(f"share: expected 0 to 1 at every step, got {', '.join(map(str, values))}")
        for name in ("prompt_tokens", "new_tokens", "group"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}: expected 1 or more, got {value}")
        for name in ("source", "reward"):
            path = getattr(self, name)
            if path is not None and not all(path.partition(":")):
                raise ConfigError(f"{name}: expected module:function, got {path!r}")
        if (self.reward is not None) != (self.group > 1):
            raise ConfigError(
                f"group: expected 2 or more with a reward and 1 without one, got {self.group} and reward {self.reward}"
            )
        if self.reward_weight < 0:
            raise ConfigError(f"reward_weight: expected 0 or more, got {self.reward_weight}")

    def longest_prompt(self, seq_length: int) -> int:
        """Return the tokens of the longest prompt in rows of `seq_length` tokens and a last label."""
        return self.prompt_tokens if self.prompt_tokens is not None else seq_length + 1 - self.new_tokens

    @property
    def is_mixed(self) -> bool:
        """Whether some steps train on the data and some on the student's text."""
        values = [value for _, value in Schedule.of(self.share).points]
        return max(values) > 0 and min(values) < 1

    def described(self) -> dict[str, Any]:
        """Return it in the form of the configuration."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def __str__(self) -> str:
        return ", ".join(f"{name}: {value}" for name, value in self.described().items())


@dataclass(kw_only=True, slots=True)
class GenerateConfig:
    """Texts that the job `generate` continues."""

    prompts: list[str] = field(default_factory=list)
    """Prompts."""
    file: str | None = None
    """Text file with one prompt per line, after `prompts`."""
    out: str | None = None
    """JSON lines file to write; None: to stdout."""
    new_tokens: int = 64
    """At most so many tokens are added to a prompt."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the most probable token."""
    top_k: int | None = None
    """Draw from the k most probable tokens; None for all."""
    top_p: float | None = None
    """Draw from the smallest set of most probable tokens with this mass; None for all."""
    seed: int = 0
    """Of the draws."""

    def sampling(self) -> Sampling:
        """Return how a token is drawn.

        Raises:
            ConfigError: for a number out of range.
        """
        return Sampling(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, seed=self.seed)


def rollout_problems(config: "Config", job: str) -> Iterator[tuple[str, str]]:
    """Yield (key, what was expected and found) of each setting of sampling that is invalid.

    Args:
        config: of the job.
        job: see `Config.check`.
    """
    generate, kd = config.generate, config.distillation.expanded()
    try:
        generate.sampling()
    except ConfigError as error:
        name, _, text = str(error).partition(": ")
        yield f"generate.{name}", text
    if generate.new_tokens < 1:
        yield "generate.new_tokens", f"expected 1 or more, got {generate.new_tokens}"
    if job == "generate":
        if not generate.prompts and generate.file is None:
            yield "generate.prompts", "expected generate.prompts or generate.file, got neither; give a prompt"
        if "" in generate.prompts:
            yield "generate.prompts", "expected text in every prompt, got an empty one; remove it"
    if job == "distill":
        named = [it.get("name") for it in kd.losses] or [kd.divergence]
        yield from _draw_problems(kd.on_policy, kd.temperature, named)
    if kd.on_policy is None:
        return
    if kd.cache is not None:
        yield (
            "distillation.on_policy",
            f"expected a live teacher, since a cache has no records of the student's own text, got distillation.cache "
            f"{kd.cache}; give teacher.load, or remove on_policy",
        )
    if kd.sources:
        yield (
            "distillation.on_policy",
            "expected no distillation.sources, since the student's own text is of no dataset; remove one of them",
        )
    if kd.mix is not None:
        yield (
            "distillation.on_policy",
            "expected no distillation.mix, since the student's own text is not mixed; remove one of them",
        )
    yield from _prompt_problems(config, kd.on_policy)
    if kd.kd_weight is not None and Schedule.of(kd.kd_weight).lowest <= 0:
        yield (
            "distillation.on_policy",
            f"expected kd_weight above 0 at every step, since own text is trained on the teacher alone, got "
            f"{kd.kd_weight}; raise it",
        )


def _draw_problems(
    on_policy: OnPolicy | None, temperature: float | Schedule | None, losses: Sequence[object]
) -> Iterator[tuple[str, str]]:
    """Yield the settings with which labels are not what the student drew at the temperature of the loss."""
    names = [name for name in registry.ESTIMATORS if name in losses]
    if not names:
        return
    which, exact = ", ".join(names), "or take reverse_kl, which is exact on any text"
    if set(losses) == {"k1"}:
        yield (
            "distillation.losses",
            f"expected a loss whose gradient has a mean, got k1 only, whose gradient has mean 0; take k2, {exact}",
        )
    if on_policy is None or {value for _, value in Schedule.of(on_policy.share).points} != {1}:
        got = "none" if on_policy is None else f"share {on_policy.share}"
        yield (
            "distillation.on_policy",
            f"expected share 1 at every step with {which}, which needs tokens that the student drew, got {got}; set "
            f"share to 1, {exact}",
        )
        return
    at = [value for _, value in Schedule.of(temperature if temperature is not None else 1.0).points]
    found = {
        "source": on_policy.source,
        "top_k": on_policy.top_k,
        "top_p": on_policy.top_p,
        "temperature": None if set(at) == {on_policy.temperature} else on_policy.temperature,
    }
    for name, value in found.items():
        if value is not None:
            yield (
                "distillation.on_policy",
                f"expected draws from the student's whole distribution at distillation.temperature with {which}, got "
                f"{name} {value} and a temperature of {', '.join(map(str, at))} in the loss; change one, {exact}",
            )


def _prompt_problems(config: "Config", on_policy: OnPolicy) -> Iterator[tuple[str, str]]:
    megatron = config.megatron
    if megatron.get("dataloader-inter-document-masking"):
        yield (
            "distillation.on_policy",
            "expected rows of one text or of conversations, got documents (megatron.dataloader-inter-document-masking);"
            " remove one of them",
        )
    if not megatron.get("sft"):
        if on_policy.prompt_tokens is None:
            yield (
                "distillation.on_policy",
                "expected prompt_tokens, the first tokens of each sample, got none; give it, or conversations "
                "(megatron.sft)",
            )
    elif (form := megatron.get("sft-tokenizer-prompt-format")) in _FORMATS_THAT_COUNT_ALL:
        yield (
            "distillation.on_policy",
            f"expected a prompt format whose prompts do not count in the loss, got megatron.sft-tokenizer-prompt-format"
            f" {form}, with which all tokens count; choose another one",
        )


def check_can_sample(settings: Any, pattern: str | None, who: str = "student") -> None:
    """Reject a model from which this package does not sample.

    Args:
        settings: Megatron's arguments, or a TransformerConfig.
        pattern: layers of a HybridModel; None for a GPTModel.
        who: in the message.

    Raises:
        ConfigError: with the setting.
    """
    recurrent = sorted(set(pattern or "") & set(_RECURRENT))
    rules = (
        ("context-parallel-size 1", settings.context_parallel_size > 1, settings.context_parallel_size),
        ("no fp8 or fp4", bool(settings.fp8 or settings.fp4), settings.fp8 or settings.fp4),
        ("no CUDA graphs", settings.cuda_graph_impl != "none", f"cuda-graph-impl {settings.cuda_graph_impl}"),
        ("no multi-latent-attention", bool(settings.multi_latent_attention), "it"),
        ("no multi-token prediction", bool(settings.mtp_num_layers), f"mtp-num-layers {settings.mtp_num_layers}"),
        ("no flash-decode", bool(settings.flash_decode), "it"),
        ("a hybrid-layer-pattern without M and G", bool(recurrent), f"{pattern} with {', '.join(recurrent)}"),
    )
    for expected, is_set, got in rules:
        if is_set:
            raise ConfigError(f"{who}: text is sampled with {expected}, got {got}; change it, or do not sample")


def check_sizes(on_policy: OnPolicy, args: Any) -> None:
    """Reject own text that does not fit into a sample, whose last token is a label alone, and groups cut in two.

    Args:
        on_policy: of the job.
        args: Megatron's, of the student.

    Raises:
        ConfigError: with the numbers.
    """
    size, total = args.micro_batch_size, args.global_batch_size
    if size % on_policy.group and (total is None or total % on_policy.group or args.rampup_batch_size):
        raise ConfigError(
            f"distillation.on_policy: expected a group that divides micro-batch-size {size}, or global-batch-size "
            f"{total} without rampup-batch-size, got {on_policy.group}; change one of them"
        )
    prompt = on_policy.prompt_tokens or 1
    if prompt + on_policy.new_tokens > args.seq_length + 1:
        raise ConfigError(
            f"distillation.on_policy: expected prompt_tokens + new_tokens of at most seq-length + 1, "
            f"{args.seq_length + 1}, got {prompt} + {on_policy.new_tokens}; lower one of them"
        )
