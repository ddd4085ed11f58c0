"""The context-aware learning rate (C-Optim): a multiplier on lr from a run's own recent course."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from .arguments import Rule, check_values, number, plain, whole_number

LOWEST, HIGHEST = 0.5, 1.5  # of the multiplier
FEWEST = 10  # losses, or cosines, that an edge case is told from
UNSTEADY = 0.5  # coefficient of variation
TURNING = 0.2  # direction consistency
_ROUNDING = 0.01  # what a cosine may be beyond 1: bfloat16's spacing there is 1/128

_WHOLE = whole_number(1)
RULES = {
    "context_window": whole_number(2),
    "edge_threshold": number(0, 1, open_low=True, open_high=True),
    "adaptation_rate": number(0, 1),
    "momentum_scales": Rule(
        lambda value: (
            isinstance(value, list | tuple)
            and len(value) > 0
            and all(map(_WHOLE.holds, value))
            and len(set(value)) == len(value)
        ),
        f"a list of one or more different numbers, each {_WHOLE.allowed}",
    ),
}


class ContextAwareLR:
    """A multiplier on lr in [0.5, 1.5] from the gradients' direction and the loss (spec 1, §5).

    It knows no optimizer. In each step its owner tells it the loss and the cosine, calls `advance`
    once and multiplies lr by `compute_contextual_lr_multiplier()`.

    *Direction consistency* c, in [0, 1]: for each scale s of `momentum_scales` the mean of
    (1 + cosine)/2 over the last s cosines, or as many as are known; of these the mean. 1 is the
    same direction, 0 reversal, 0.5 no relation, and also 0.5 while no cosine is known.

    *Relative fall* of the loss over s steps: 1 − mean(last s)/mean(the s before them); 0 with fewer
    than 2s losses (always, where 2s > `context_window`) or an earlier mean that is not positive.
    The sorted scales are halved, an odd middle belonging to the shorter; then 1 is left out, for
    two single losses tell nothing. The *short trend* is the mean fall over the shorter half (of
    1, 5, 10, 25 this is 5), the *long trend* over the longer (10, 25); 0 for a half left empty.

    *Edge cases*, the first that holds:

    - "unsteady loss": population standard deviation / mean of the window's losses > 0.5, with at
      least ten losses of positive mean. A loss that falls evenly to less than about a sixth within
      the window is one too.
    - "turning gradients": c < 0.2, with at least ten cosines.
    - "stagnation": `context_window` losses are known, and the mean of the later half exceeds
      `edge_threshold` times that of the earlier half; an odd middle belongs to neither.

    *Multiplier*: signal = (2c − 1)/2 + clamp(10·(short + long)/2, −1, 1)/2, target = 1 + signal/2;
    in an edge case at most 1. From 1 on, each `advance` moves the multiplier by
    `adaptation_rate`·(target − multiplier).

    Args:
        context_window: how many losses, and how many cosines, are kept.
        edge_threshold: what share of the earlier loss stagnation begins above, in (0, 1).
        adaptation_rate: the share of the way to the target in each step, in [0, 1]; 0 watches only.
        momentum_scales: different numbers of steps, in any order.

    Raises:
        OptimizerArgumentError: (a ValueError) an argument is impossible; names it.
    """

    def __init__(
        self,
        context_window: int = 100,
        edge_threshold: float = 0.95,
        adaptation_rate: float = 0.1,
        momentum_scales: Sequence[int] = (1, 5, 10, 25),
    ) -> None:
        given = {
            "context_window": context_window,
            "edge_threshold": edge_threshold,
            "adaptation_rate": adaptation_rate,
            "momentum_scales": momentum_scales,
        }
        check_values(RULES, given, "C-Optim")
        self.context_window: int = plain(context_window)
        self.edge_threshold: float = plain(edge_threshold)
        self.adaptation_rate: float = plain(adaptation_rate)
        self.momentum_scales: tuple[int, ...] = tuple(sorted(plain(momentum_scales)))
        self._losses: deque[float] = deque(maxlen=self.context_window)
        self._cosines: deque[float] = deque(maxlen=self.context_window)
        self._multiplier = 1.0

    def note_loss(self, loss: float) -> None:
        """Keep a step's loss.

        Raises:
            ValueError: it is not finite; nothing is kept.
        """
        self._losses.append(_loss(loss))

    def note_direction(self, cosine: float) -> None:
        """Keep the cosine of a step's gradient and the momentum before it, clamped to [-1, 1].

        Raises:
            ValueError: it is not finite, or further outside than rounding goes; nothing is kept.
        """
        self._cosines.append(_cosine(cosine))

    def advance(self) -> None:
        """Move the multiplier towards its target; once in each step of the optimizer."""
        short, long = self.loss_trends()
        trend = min(1.0, max(-1.0, 10 * (short + long) / 2))
        signal = 0.5 * (2 * self.direction_consistency() - 1) + 0.5 * trend
        target = 1 + 0.5 * signal
        if self.detect_edge_case():
            target = min(target, 1.0)
        moved = self._multiplier + self.adaptation_rate * (target - self._multiplier)
        self._multiplier = min(HIGHEST, max(LOWEST, moved))

    def compute_contextual_lr_multiplier(self) -> float:
        """The present multiplier; asking changes nothing."""
        return self._multiplier

    def direction_consistency(self) -> float:
        """c of the class's definition."""
        if not self._cosines:
            return 0.5
        cosines = list(self._cosines)
        return _mean([(1 + _mean(cosines[-scale:])) / 2 for scale in self.momentum_scales])

    def loss_trends(self) -> tuple[float, float]:
        """The short and the long trend; positive where the loss falls."""
        losses = list(self._losses)
        middle = (len(self.momentum_scales) + 1) // 2
        short, long = self.momentum_scales[:middle], self.momentum_scales[middle:]
        return _mean_fall(losses, short), _mean_fall(losses, long)

    def detect_edge_case(self) -> bool:
        """Whether lr should not be raised now."""
        return self.edge_case() is not None

    def edge_case(self) -> str | None:
        """Which edge case it is: "unsteady loss", "turning gradients", "stagnation" or None."""
        losses = list(self._losses)
        if len(losses) >= FEWEST and _variation(losses) > UNSTEADY:
            return "unsteady loss"
        if len(self._cosines) >= FEWEST and self.direction_consistency() < TURNING:
            return "turning gradients"
        half = self.context_window // 2
        if len(losses) == self.context_window and (
            _mean(losses[-half:]) > self.edge_threshold * _mean(losses[:half])
        ):
            return "stagnation"
        return None

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` continues from: two lists of floats, oldest first, and a float."""
        return {
            "losses": list(self._losses),
            "cosines": list(self._cosines),
            "multiplier": self._multiplier,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`; of a longer window's the newest values are kept.

        Raises:
            ValueError: a value is missing or impossible; nothing is changed.
        """
        missing = [key for key in self.state_dict() if key not in state]
        if missing:
            raise ValueError(f"The saved state of C-Optim lacks {', '.join(missing)}.")
        multiplier = float(state["multiplier"])
        if not LOWEST <= multiplier <= HIGHEST:
            raise ValueError(
                f"The saved multiplier of C-Optim is {multiplier}; "
                f"it must lie in [{LOWEST}, {HIGHEST}]."
            )
        losses, cosines = map(_loss, state["losses"]), map(_cosine, state["cosines"])
        kept = deque(losses, self.context_window), deque(cosines, self.context_window)
        self._losses, self._cosines = kept
        self._multiplier = multiplier


def _loss(value: float) -> float:
    value = float(value)
    if not math.isfinite(value):
        raise ValueError(f"C-Optim was given a loss of {value}; it must be finite.")
    return value


def _cosine(value: float) -> float:
    value = float(value)
    if not abs(value) <= 1 + _ROUNDING:  # so that nan is refused too
        raise ValueError(f"C-Optim was given a cosine of {value}; it must lie in [-1, 1].")
    return min(1.0, max(-1.0, value))


def _mean(values: Collection[float]) -> float:
    # Divided first: a sum of finite losses can overflow.
    count = len(values)
    return math.fsum([value / count for value in values])


def _variation(losses: list[float]) -> float:
    """Population standard deviation / mean; 0 where the mean is not positive."""
    mean = _mean(losses)
    if mean <= 0:
        return 0.0
    # The distance is scaled within, so that no square overflows.
    return math.dist(losses, [mean] * len(losses)) / math.sqrt(len(losses)) / mean


def _mean_fall(losses: list[float], scales: Sequence[int]) -> float:
    falls = [_fall(losses, scale) for scale in scales if scale > 1]
    return sum(falls) / len(falls) if falls else 0.0


def _fall(losses: list[float], scale: int) -> float:
    """The loss's relative fall over `scale` steps."""
    if len(losses) < 2 * scale:
        return 0.0
    earlier = _mean(losses[-2 * scale : -scale])
    return 1 - _mean(losses[-scale:]) / earlier if earlier > 0 else 0.0
