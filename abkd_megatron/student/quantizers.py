"""Quantizers that NVIDIA's ModelOpt has put into a layer; without ModelOpt there are none."""

import sys
from typing import Any

import torch

# Imported by whoever quantizes. A layer without it is not quantized, so there is no reason to import it here.
_MODELOPT = "modelopt.torch.quantization.nn"


def active_quantizers(layer: torch.nn.Module) -> list[str]:
    """Return the names of the layer's quantizers that change numbers, such as ``weight_quantizer``.

    A quantizer that is disabled still changes them if it scales or rotates. Releases that do not tell whether it
    rotates, such as 0.40, count as if it did.
    """
    return [
        name
        for name, it in _quantizers(layer).items()
        if it.is_enabled or it.pre_quant_scale is not None or getattr(it, "rotate_is_enabled", True)
    ]


def unquantized_class(layer: torch.nn.Module) -> type:
    """Return the layer's class before ModelOpt's conversion for quantizers, if there was one; else its class."""
    kind: type = layer.original_cls if _quantizers(layer) else type(layer)  # type: ignore[assignment]
    return kind


def _quantizers(layer: torch.nn.Module) -> dict[str, Any]:
    modelopt: Any = sys.modules.get(_MODELOPT)
    if modelopt is None or not isinstance(layer, modelopt.QuantModule):
        return {}
    return {name: it for name, it in layer.named_modules() if isinstance(it, modelopt.TensorQuantizer)}
