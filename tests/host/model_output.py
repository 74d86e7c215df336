"""Small models of both classes on one rank: what `process_output` and `without_head` leave behind. A line of JSON."""

import json
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

VOCAB, LAYERS, HIDDEN, LENGTH, ROWS = 64, 2, 16, 8, 2


def main() -> None:
    from abkd_megatron import cpu_backend

    cpu_backend.install()
    cpu_backend.init_process_group(timedelta(minutes=3))
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection

    parallel_state.initialize_model_parallel()
    groups = ProcessGroupCollection.use_mpu_process_groups()
    found = {}
    for kind in ("GPTModel", "HybridModel", "HybridModel with MTP"):
        for name, case in CASES.items():
            found[f"{kind}: {name}"] = case(build(kind, groups))
    print("FOUND " + json.dumps(found), flush=True)


def build(kind: str, groups: Any) -> torch.nn.Module:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.hybrid.hybrid_model import HybridModel
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer import TransformerConfig

    from abkd_megatron.local_hybrid_spec import local_hybrid_stack_spec

    model_parallel_cuda_manual_seed(1)
    torch.manual_seed(1)
    is_hybrid, predicts_ahead = kind.startswith("Hybrid"), kind.endswith("MTP")
    config = TransformerConfig(
        num_layers=LAYERS * (2 if is_hybrid else 1),
        hidden_size=HIDDEN,
        num_attention_heads=2,
        mtp_num_layers=1 if predicts_ahead else None,
        mtp_loss_scaling_factor=0.1,
        normalization="RMSNorm",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
    )
    given = {"vocab_size": VOCAB, "max_sequence_length": LENGTH, "position_embedding_type": "rope"}
    if is_hybrid:
        pattern = "*-" * LAYERS + "/*-" * predicts_ahead
        return HybridModel(config, local_hybrid_stack_spec, hybrid_layer_pattern=pattern, pg_collection=groups, **given)
    return GPTModel(config, get_gpt_layer_local_spec(normalization="RMSNorm"), pg_collection=groups, **given)


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    tokens, labels = torch.randint(VOCAB, (2, ROWS, LENGTH), generator=generator)
    return {
        "input_ids": tokens,
        "position_ids": torch.arange(LENGTH).repeat(ROWS, 1),
        "attention_mask": None,
        "labels": labels,
        "loss_mask": torch.ones(ROWS, LENGTH),
    }


def state(model: torch.nn.Module) -> dict[str, Any]:
    """What a model is: attributes in their order, hooks, parameters."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
    hooks += ("_forward_hooks_always_called", "_backward_hooks", "_backward_pre_hooks")
    plain = {name: value for name, value in vars(model).items() if not name.startswith("_")}
    return {
        "names": list(vars(model)),
        "plain": {name: repr(value) for name, value in plain.items() if isinstance(value, str | int | float | None)},
        "hooks": {name: len(vars(model)[name]) for name in hooks},
        "parameters": [(name, id(weight)) for name, weight in model.named_parameters()],
    }


def trained(model: torch.nn.Module) -> list[Tensor]:
    """Loss and gradients."""
    model.zero_grad()
    loss = model(**batch())
    loss.sum().backward()
    return [loss.detach(), *(weight.grad.clone() for weight in model.parameters() if weight.grad is not None)]


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def own_head(calls: list[dict[str, Any]]) -> Callable[..., Tensor]:
    """Return a `process` that does what the model's own head does."""

    def process(**given: Any) -> Tensor:
        calls.append(given)
        logits, _ = given["output_layer"](given["hidden_states"], weight=given["output_weight"])
        return given["compute_language_model_loss"](given["labels"], given["scale_logits"](logits))

    return process


def the_same_loss(model: torch.nn.Module) -> bool:
    """With a head that does what the model's own does, every gradient is equal to the bit, MTP's included."""
    from abkd_megatron.teacher.model import process_output

    before, wanted, calls = state(model), trained(model), []
    handles = process_output(model, lambda args, kwargs: "context", own_head(calls))
    got = trained(model)
    for handle in handles:
        handle.remove()
    (call,) = calls
    assert call["context"] == "context" and call["hidden_states"].shape == (LENGTH, ROWS, HIDDEN)
    return equal(got, wanted) and state(model) == before and equal(trained(model), wanted)


def left_alone(model: torch.nn.Module) -> bool:
    """Without a context the forward is the model's."""
    from abkd_megatron.teacher.model import process_output

    wanted, calls = trained(model), []
    handles = process_output(model, lambda args, kwargs: None, own_head(calls))
    got = trained(model)
    for handle in handles:
        handle.remove()
    return equal(got, wanted) and not calls


def seen_by_others(model: torch.nn.Module) -> bool:
    """Hooks of others, earlier and later ones, see the loss."""
    from abkd_megatron.teacher.model import process_output

    seen: list[tuple[int, ...]] = []
    others = [model.register_forward_hook(lambda *given: seen.append(tuple(given[-1].shape)))]
    handles = process_output(model, lambda args, kwargs: "context", own_head([]))
    others.append(model.register_forward_hook(lambda *given: seen.append(tuple(given[-1].shape))))
    trained(model)
    for handle in (*handles, *others):
        handle.remove()
    return seen == [(ROWS, LENGTH)] * 2


def after_an_error(where: str) -> Callable[[torch.nn.Module], bool]:
    def case(model: torch.nn.Module) -> bool:
        """The model is as it was, and its next forward is as if nothing had been."""
        from abkd_megatron.teacher.model import process_output

        wanted, broken = trained(model), [True]
        before = state(model)

        def fail(*_: Any, **__: Any) -> None:
            if broken:
                raise ValueError(where)

        norm = "final_norm" if hasattr(model.decoder, "final_norm") else "final_layernorm"
        modules = {
            "layer": model.decoder.layers[-1],
            "norm": getattr(model.decoder, norm),
            "output layer": model.output_layer,
        }
        others = [modules[where].register_forward_pre_hook(fail)] if where in modules else []
        head = own_head([])

        def context(args: tuple, kwargs: dict[str, Any]) -> str:
            if where == "context":
                fail()
            return "context"

        def process(**given: Any) -> Tensor:
            if where == "head":
                fail()
            return head(**given)

        attributes = list(vars(model))
        handles = process_output(model, context, process)
        if where == "later pre-hook":
            handles.append(model.register_forward_pre_hook(fail))
        try:
            model(**batch())
        except ValueError as error:
            assert str(error) == where
        else:
            return False
        assert model.post_process is True and list(vars(model)) == attributes
        broken.clear()
        got = trained(model)  # with our head
        for handle in (*handles, *others):
            handle.remove()
        return equal(got, wanted) and state(model) == before and equal(trained(model), wanted)

    return case


def without_its_head(model: torch.nn.Module) -> bool:
    """The last hidden states, after the final norm; and the model as it was, also after an error."""
    from abkd_megatron.teacher.model import without_head

    if model.config.mtp_num_layers:
        return True  # a teacher has none
    before, kept = state(model), []
    wanted = trained(model)
    hook = model.output_layer.register_forward_pre_hook(lambda _, args: kept.append(args[0].detach()))
    model(**batch())
    hook.remove()
    with without_head(model):
        hidden_states = model(**batch())
    try:
        with without_head(model):
            model(**batch() | {"input_ids": None})
    except Exception:
        failed = True
    return failed and torch.equal(hidden_states, kept[0]) and state(model) == before and equal(trained(model), wanted)


CASES = {
    "the same loss": the_same_loss,
    "left alone": left_alone,
    "seen by others": seen_by_others,
    "without its head": without_its_head,
    **{
        f"an error in {where}": after_an_error(where)
        for where in ("context", "later pre-hook", "layer", "norm", "output layer", "head")
    },
}

if __name__ == "__main__":
    main()
