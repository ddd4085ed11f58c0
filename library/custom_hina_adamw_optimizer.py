"""HinaAdamW: AdamW with 8-bit state that knows LoRA, LoKr and norm parameters by name."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any, ClassVar, Literal

from library.optim.arguments import Rule, flag, number, plain
from library.optim.hina import HinaOptimizer, update_links
from library.optim.techniques import (
    Descent,
    DynamicWeightDecay,
    PairScale,
    SelectiveProjection,
)
from library.optim.techniques.spd import Anchor

_NO_NAMES = (
    "The optimizer was given no parameter names: every parameter counts as 'regular', and the "
    "LoRA/LoKr features (pair scaling, weight decay by role, zero anchors) are off. To turn them "
    "on pass model.named_parameters(), or a list of names as 'param_names' or 'named' in each "
    "parameter group, or set a 'param_name' attribute on the tensors."
)


class HinaAdamWOptimizer(HinaOptimizer):
    """AdamW, and nine techniques that are switched on and off one by one (spec 1 §3).

    With every switch off it is `torch.optim.AdamW`. The techniques act in the order of the
    arguments below; each one's file in `library/optim/techniques` states its equation and paper.

    Args:
        params: tensors, `(name, tensor)` pairs, or parameter groups that tell names
            (`param_names`, `named`, or a `param_name` attribute). Without names every parameter is
            `regular` and a warning says so.
        lr: learning rate; groups may set their own, as with `betas`, `eps` and `weight_decay`. A
            tensor is read once, here: what it holds later does not act.
        betas: decay of the first and second moment, each in [0, 1).
        eps: floor of the denominator, at least float32's smallest normal number (1.2e-38).
        weight_decay: decoupled weight decay.
        use_orthogonal_grad: only the part of the gradient orthogonal to the parameter.
        use_agr: damp elements that hold much of the gradient.
        use_adopt_stability: ADOPT with clipping; off, Adam with bias correction.
        use_tam: damp gradients that turn against the momentum; `tam_beta` smooths the measure.
        use_grams: the gradient's sign on the momentum's magnitude.
        use_cautious: no step where update and gradient disagree. Masks nothing after Grams.
        use_alora: scale lr of LoRA and LoKr pairs by their product's norm; `alora_ratio` is the
            factor on the half that starts at zero.
        dynamic_weight_decay: weight decay of adapters falls after `wd_transition_steps` steps, by
            `wd_decay_factor`, to no less than `wd_min_ratio`.
        use_spd: pull back by `spd_lambda` where a step leads away from the anchor; `spd_anchor` is
            `auto` (zero for adapter roles, else the initial value), `zero` or `initial`.
        optim_bits: 8 or 32 bits for each moment.
        min_8bit_size: tensors with fewer elements keep float32 state.
        bf16_rounding: `stochastic` or `nearest`, for bfloat16 and float16 parameters.
        nonfinite: `raise` on NaN or infinity in a gradient, or `skip` the step.
        backend: `auto` runs the step as machine code where there is a C++ compiler, `compiled`
            insists on it, `eager` never does.

    Raises:
        OptimizerArgumentError: (a ValueError) an impossible value; says what is allowed.
        NonFiniteGradientError: from `step`, naming the tensors; nothing was changed.
    """

    SWITCHES: ClassVar[tuple[str, ...]] = (*HinaOptimizer.SWITCHES, "use_alora")
    RULES: ClassVar[dict[str, Rule]] = {
        **HinaOptimizer.RULES,
        "use_alora": flag(),
        "alora_ratio": number(0, open_low=True),
    }

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        use_orthogonal_grad: bool = False,
        use_agr: bool = True,
        use_adopt_stability: bool = True,
        use_tam: bool = True,
        tam_beta: float = 0.999,
        use_grams: bool = True,
        use_cautious: bool = True,
        use_alora: bool = True,
        alora_ratio: float = 21.0,
        dynamic_weight_decay: bool = True,
        wd_transition_steps: int = 1000,
        wd_decay_factor: float = 0.7,
        wd_min_ratio: float = 0.1,
        use_spd: bool = True,
        spd_lambda: float = 0.06,
        spd_anchor: Anchor = "auto",
        optim_bits: int = 8,
        min_8bit_size: int = 4096,
        bf16_rounding: Literal["stochastic", "nearest"] = "stochastic",
        nonfinite: Literal["raise", "skip"] = "raise",
        backend: Literal["auto", "compiled", "eager"] = "auto",
    ) -> None:
        given = {key: plain(value) for key, value in locals().items() if key in self.RULES}
        self.validate(**given)
        decay = DynamicWeightDecay(
            given["wd_transition_steps"], given["wd_decay_factor"], given["wd_min_ratio"]
        )
        links = [
            *update_links(given),
            (use_alora, PairScale(given["alora_ratio"])),
            (dynamic_weight_decay, decay),
            (True, Descent()),
            (use_spd, SelectiveProjection(given["spd_lambda"], spd_anchor)),
        ]
        super().__init__(params, given, links)
        if not self.roles.named:
            warnings.warn(_NO_NAMES, stacklevel=2)

    def get_optimization_info(self) -> dict[str, Any]:
        """Settings and what was found by name. `total_params` and all `…_params` count tensors;
        `lokr_groups` counts modules with any LoKr tensor, `lokr_pairs` those that are complete."""
        roles = self.roles
        return {
            "optimizer_type": type(self).__name__,
            "total_params": len(roles.role),
            "features": self.features,
            "lora_stats": {
                "lora_a_params": roles.count("lora_a"),
                "lora_b_params": roles.count("lora_b"),
                "lora_pairs": len(roles.lora_pairs),
            },
            "lokr_stats": {
                "lokr_w1_params": roles.count("lokr_w1"),
                "lokr_w2_params": roles.count("lokr_w2"),
                "lokr_pairs": len(roles.lokr_pairs),
                "lokr_groups": roles.lokr_groups,
                "w_norm_params": roles.count("w_norm"),
                "b_norm_params": roles.count("b_norm"),
                "norm_pairs": len(roles.norm_pairs),
            },
        }

    def diagnose_lora_pairing(self) -> dict[str, Any]:
        """How many pairs there are, and every half that has none: `unpaired` lists `name`, `shape`,
        `role` and `reason`."""
        roles = self.roles
        return {
            "lora_pairs": len(roles.lora_pairs),
            "lokr_pairs": len(roles.lokr_pairs),
            "norm_pairs": len(roles.norm_pairs),
            "unpaired": [
                {"name": u.name, "shape": u.shape, "role": u.role, "reason": u.reason}
                for u in roles.unpaired
            ],
        }
