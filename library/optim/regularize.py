"""Regularizers on the gradients of a step, many of one shape at a time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .batch import Turn
from .regularization import RegularizationStrategy

# Elements that are stacked at once: with a handful of temporaries they stay in a processor's cache.
PIECE = 1 << 19


class Regularizers:
    """Regularizers that act, in their order, on the gradients of every so many steps.

    The gradients that autograd left are not changed: a step works on changed copies.

    Args:
        strategies: in their order.
        interval: in a parameter's steps; the first step is one of them.
        phase_of: the name of the phase that a step belongs to.
    """

    def __init__(
        self,
        strategies: Sequence[RegularizationStrategy],
        interval: int,
        phase_of: Callable[[int], str],
    ) -> None:
        self.strategies = tuple(strategies)
        self.interval = interval
        self._phase_of = phase_of

    def act_on(self, turn: Turn, names: Sequence[str]) -> bool:
        """Put changed gradients in the place of those whose parameter is due; whether any was.

        Args:
            names: of the turn's parameters.

        Raises:
            ValueError: a strategy has returned another shape, or no tensor.
        """
        if not self.strategies:
            return False
        alike: dict[tuple[torch.Size, int], list[int]] = defaultdict(list)
        for k, (param, entry) in enumerate(zip(turn.params, turn.entries, strict=True)):
            step = entry.get("step", 0) + 1
            if (step - 1) % self.interval == 0:
                alike[param.shape, step].append(k)
        if not alike:
            return False
        turn.grads = list(turn.grads)
        for (shape, step), members in alike.items():
            many = max(1, PIECE // max(shape.numel(), 1))
            for start in range(0, len(members), many):
                self._act_on_piece(turn, members[start : start + many], names, shape, step)
        return True

    def _act_on_piece(
        self, turn: Turn, members: list[int], names: Sequence[str], shape: torch.Size, step: int
    ) -> None:
        dtype = turn.batch.variant.dtype
        maths = turn.batch.variant.maths
        stack = torch.stack([turn.grads[k].view(shape) for k in members]).to(maths)
        called = [names[k] for k in members]
        for strategy in self.strategies:
            if strategy.batched and len(shape) < 2:
                continue
            stack = self._apply(strategy, stack, called, step)
        for k, grad in zip(members, stack.to(dtype).contiguous().unbind(), strict=True):
            turn.grads[k] = grad

    def _apply(
        self, strategy: RegularizationStrategy, stack: Tensor, names: list[str], step: int
    ) -> Tensor:
        phase = self._phase_of(step)
        if strategy.batched:
            changed = strategy.apply(stack, step=step, phase=phase, names=names)
        else:
            each = [
                strategy.apply(grad, step=step, phase=phase, names=[name])
                for grad, name in zip(stack.unbind(), names, strict=True)
            ]
            for grad, name in zip(each, names, strict=True):
                _check(strategy, grad, stack[0].shape, name)
            changed = torch.stack(each)
        _check(strategy, changed, stack.shape, names[0])
        return changed


def _check(strategy: RegularizationStrategy, grad: object, shape: torch.Size, name: str) -> None:
    if not isinstance(grad, Tensor) or grad.shape != shape or grad.is_complex():
        kind = "complex numbers of " if isinstance(grad, Tensor) and grad.is_complex() else ""
        found = f"{kind}shape {tuple(grad.shape)}" if isinstance(grad, Tensor) else repr(grad)
        raise ValueError(
            f"{type(strategy).__name__}.apply has returned {found} for the gradient of "
            f"{name or 'a parameter without a name'}; it must return a real tensor of shape "
            f"{tuple(shape)}."
        )
