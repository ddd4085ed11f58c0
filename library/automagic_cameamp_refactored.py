"""The CameAMP family as config, strategies and factories.

```python
optimizer = create_lora_optimizer(model.parameters(), lr=1e-4, warmup_steps=500)
optimizer = RefactoredAutomagicCameAMP(model.parameters(), OptimizerConfig(verbose=True))
```
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from library.optim.arguments import OptimizerArgumentError, check_keys
from library.optim.cameamp import CameAMP
from library.optim.cameamp_config import PROFILES, RULES, OptimizerConfig
from library.optim.regularization import (
    BackgroundRegularization,
    EdgeSuppression,
    FrequencyPenalty,
    RankPenalty,
    RegularizationStrategy,
    SpatialAwareness,
)
from library.optim.techniques import Consistent as ConsistentMomentum
from library.optim.techniques import Momentum as MomentumStrategy
from library.optim.techniques import TorqueAware as TorqueAwareMomentum

__all__ = [
    "PROFILES",
    "BackgroundRegularization",
    "ConsistentMomentum",
    "EdgeSuppression",
    "FrequencyPenalty",
    "MomentumStrategy",
    "OptimizerConfig",
    "RankPenalty",
    "RefactoredAutomagicCameAMP",
    "RegularizationStrategy",
    "SpatialAwareness",
    "TorqueAwareMomentum",
    "create_full_finetune_optimizer",
    "create_lora_optimizer",
]


class RefactoredAutomagicCameAMP(CameAMP):
    """CAME with adaptive gradient regularization, momentum by phase, a learning rate for each
    element and regularizers of the gradient; everything is set by a config.

    Args:
        params: tensors, `(name, tensor)` pairs, or parameter groups. Names are not needed.
        config: an `OptimizerConfig`; its defaults if None.
        options: fields of the config and `profile`, where there is no config.

    Raises:
        OptimizerArgumentError: (a ValueError) an unknown or impossible option, or options beside a
            config.
        NonFiniteGradientError: from `step`, naming the tensors; nothing was changed.
    """

    def __init__(
        self, params: Iterable[Any], config: OptimizerConfig | None = None, **options: Any
    ) -> None:
        if config is not None and options:
            raise OptimizerArgumentError(
                f"RefactoredAutomagicCameAMP: {', '.join(options)} was given beside a config, "
                "which would not be changed by it. Put it into the config."
            )
        if config is not None and not isinstance(config, OptimizerConfig):
            raise OptimizerArgumentError(
                "RefactoredAutomagicCameAMP takes an OptimizerConfig as its config, not "
                f"{config!r}; a learning rate is given as lr=…"
            )
        super().__init__(params, config or self.configured(**options))

    @classmethod
    def configured(cls, **options: Any) -> OptimizerConfig:
        """The config that these options make.

        Raises:
            OptimizerArgumentError: names the key, the value, what is allowed and the nearest key.
        """
        check_keys([*RULES, "profile"], options, cls.__name__)
        return OptimizerConfig.of_profile(**options)

    @classmethod
    def validate(cls, **options: Any) -> None:
        """Check arguments without building anything.

        Raises:
            OptimizerArgumentError: names the key, the value, what is allowed and the nearest key.
        """
        cls.configured(**options)


def create_lora_optimizer(
    params: Iterable[Any], lr: float = 1e-4, warmup_steps: int = 500, **overrides: Any
) -> RefactoredAutomagicCameAMP:
    """An optimizer for the halves of an adapter.

    Args:
        overrides: any field of `OptimizerConfig`, and `profile`.

    Raises:
        OptimizerArgumentError: (a ValueError) an unknown or impossible option.
    """
    return RefactoredAutomagicCameAMP(params, lr=lr, warmup_steps=warmup_steps, **overrides)


def create_full_finetune_optimizer(
    params: Iterable[Any],
    lr: float = 5e-5,
    warmup_steps: int = 200,
    edge_suppression: bool = False,
    **overrides: Any,
) -> RefactoredAutomagicCameAMP:
    """An optimizer for whole weights: `full_finetune`, without edge suppression.

    Args:
        overrides: any other field of `OptimizerConfig`, and `profile`.

    Raises:
        OptimizerArgumentError: (a ValueError) an unknown or impossible option.
    """
    options = {"full_finetune": True, "edge_suppression": edge_suppression, **overrides}
    return RefactoredAutomagicCameAMP(params, lr=lr, warmup_steps=warmup_steps, **options)
