"""What HinaAdamW and AdaptiveHinaAdamW have in common: arguments, and the way to an update."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from .arguments import Rule, check_keys, check_values, flag, number, one_of, whole_number
from .engine import ChainOptimizer
from .techniques import (
    ADOPT,
    AGR,
    Adam,
    Cautious,
    Grams,
    Momentum,
    OrthogonalGradient,
    Technique,
    TorqueAware,
)

logger = logging.getLogger(__name__)

Links = Sequence[tuple[bool, Technique]]
"""Techniques in their order, and whether each is on."""


class HinaOptimizer(ChainOptimizer):
    """AdamW or ADOPT with techniques that are switched on and off one by one.

    Args:
        params: see `ChainOptimizer`.
        given: all arguments by name, made `plain`.
        links: the chain.
    """

    # The arguments that switch a technique on or off.
    SWITCHES: ClassVar[tuple[str, ...]] = (
        "use_orthogonal_grad",
        "use_agr",
        "use_adopt_stability",
        "use_tam",
        "use_grams",
        "use_cautious",
        "use_spd",
        "dynamic_weight_decay",
    )
    RULES: ClassVar[dict[str, Rule]] = {
        **ChainOptimizer.RULES,
        **dict.fromkeys(SWITCHES, flag()),
        "tam_beta": number(0, 1, open_high=True),
        "wd_transition_steps": whole_number(1),
        "wd_decay_factor": number(0, 1, open_low=True),
        "wd_min_ratio": number(0, 1),
        "spd_lambda": number(0),
        "spd_anchor": one_of("auto", "zero", "initial"),
    }

    def __init__(self, params: Iterable[Any], given: Mapping[str, Any], links: Links) -> None:
        self.switches = {name: given[name] for name in self.SWITCHES}
        super().__init__(
            params,
            {key: given[key] for key in ("lr", "betas", "eps", "weight_decay")},
            [technique for on, technique in links if on],
            optim_bits=given["optim_bits"],
            min_8bit_size=given["min_8bit_size"],
            bf16_rounding=given["bf16_rounding"],
            nonfinite=given["nonfinite"],
            backend=given["backend"],
        )
        name = type(self).__name__.removesuffix("Optimizer")
        if given["use_grams"] and given["use_cautious"]:
            logger.info("%s: with use_grams on, use_cautious masks nothing.", name)
        if given["use_agr"]:
            logger.info("%s: use_agr is near identity on large tensors.", name)

    @classmethod
    def validate(cls, **kwargs: Any) -> None:
        """Check arguments without building anything.

        Raises:
            OptimizerArgumentError: names the key, the value, what is allowed and the nearest key.
        """
        check_keys(list(cls.RULES), kwargs, cls.__name__)
        check_values(cls.RULES, kwargs, cls.__name__)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"switches": self.switches}

    @property
    def features(self) -> dict[str, Any]:
        """The switches, and how state and steps are kept."""
        return {
            **self.switches,
            "optim_bits": self.optim_bits,
            "min_8bit_size": self.min_8bit_size,
            "bf16_rounding": self.bf16_rounding,
            "nonfinite": self.nonfinite,
            "backend": self.backend,
            "nonfinite_skipped_steps": self.skipped_steps,
        }


def update_links(given: Mapping[str, Any]) -> list[tuple[bool, Technique]]:
    """The techniques from a gradient to an update's direction."""
    momentum = TorqueAware(given["tam_beta"]) if given["use_tam"] else Momentum()
    return [
        (given["use_orthogonal_grad"], OrthogonalGradient()),
        (given["use_agr"], AGR()),
        (True, ADOPT(momentum) if given["use_adopt_stability"] else Adam(momentum)),
        (given["use_grams"], Grams()),
        (given["use_cautious"], Cautious()),
    ]
