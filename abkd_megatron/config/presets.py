"""Presets: documented choices of divergence, schedule, weights and temperature."""

from typing import Any

from abkd_megatron.losses.schedule import Schedule

_OF_DIVERGENCE = ("divergence", "alpha", "beta")
_ABKD = {"divergence": "alpha_beta", "alpha": 0.2, "beta": 0.7}
_FORWARD_KL = {"divergence": "forward_kl"}
_RISING = Schedule.linear(0.0, 1.0, start=0.0, end=1.0, by="fraction")
_ANNEALED = {
    "divergence": "alpha_beta",
    "alpha": Schedule.linear(1.0, 0.2, start=0.5, end=1.0, by="fraction"),
    "beta": Schedule.linear(0.0, 0.7, start=0.5, end=1.0, by="fraction"),
}

# The values of `distillation` that each name stands for. A row changes `none`, whose values are the plain defaults.
PRESETS: dict[str, dict[str, Any]] = {
    "none": {**_ABKD, "temperature": 1.0, "kd_weight": 1.0, "lm_weight": 1.0},
    # First the teacher, then more and more of the text, which teaches what the teacher does not know better.
    "pretrain": {**_FORWARD_KL, "lm_weight": _RISING},
    # Pruned from a trained model: as much of the text all along.
    "pruned": {**_FORWARD_KL, "lm_weight": 1.0},
    # Forward KL, annealed to alpha-beta over the last half of the run.
    "annealed": {**_ANNEALED, "lm_weight": 0.0},
    # Trained before, distilled on other text such as instructions.
    "finetune": {**_ABKD, "lm_weight": 0.0},
}
DEFAULT = "pretrain"


def preset_values(name: str, *, divergence: bool) -> dict[str, Any]:
    """Return the values of a preset.

    Args:
        name: a key of `PRESETS`.
        divergence: True for its divergence, False for that of `none`.

    Returns:
        {key of `distillation`: value}, the same keys for every preset.
    """
    plain, own = PRESETS["none"], PRESETS[name]
    return plain | {key: value for key, value in own.items() if divergence or key not in _OF_DIVERGENCE}
