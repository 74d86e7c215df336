"""A student of Bridge's that ModelOpt has quantized; `bridge_job.py` trains it."""

import json
from pathlib import Path
from typing import Any

import torch


def save_quantized(model: list[Any], batches: list[dict[str, Any]], folder: Path) -> None:
    """Quantize a model, and write its checkpoint and its KL per token from the model before, on these batches."""
    import modelopt.torch.quantization as mtq
    from megatron.bridge.training.model_load_save import save_megatron_model

    def log_probabilities() -> list[torch.Tensor]:
        return [model[0](it["tokens"], it["position_ids"], None).double().log_softmax(-1) for it in batches]

    with torch.no_grad():
        plain = log_probabilities()
        first = batches[0]["tokens"], batches[0]["position_ids"], None
        mtq.quantize(model[0], mtq.INT8_DEFAULT_CFG, lambda it: it(*first))
        kl = [(p.exp() * (p - q)).sum(-1) for p, q in zip(plain, log_probabilities(), strict=True)]
    masks = [it["loss_mask"] for it in batches]
    mean = sum((of * mask).sum() for of, mask in zip(kl, masks, strict=True)) / sum(mask.sum() for mask in masks)
    (folder / "quantized.json").write_text(json.dumps(mean.item()))
    save_megatron_model(model, folder / "quantized")


def num_quantizers(model: Any) -> int:
    """How many are on."""
    import modelopt.torch.quantization as mtq

    return sum(isinstance(it, mtq.nn.TensorQuantizer) and it.is_enabled for it in model.modules())
