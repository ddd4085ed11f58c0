"""The base of the optimizers here: gather small tensors, run a chain of techniques, scatter back.

Today the chain runs eagerly over cache-sized pieces. State lives per parameter, in PyTorch's form.
"""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from . import checkpoint, rounding
from .arguments import (
    Rule,
    check_groupable,
    check_values,
    number,
    one_of,
    pair,
    plain,
    whole_number,
)
from .layout import BLOCK, Layout, layout_of
from .roles import Roles, family_of, group_names
from .state import QUANTIZABLE, Kind, decode, encode
from .techniques.base import TINY, Technique, Work

# Elements that run through the chain together: a dozen float32 matrices of them fit a CPU's cache.
_PIECE = 1 << 17

_NO_NAMES = (
    "The optimizer was given no parameter names: every parameter counts as 'regular', and the "
    "LoRA/LoKr features (pair scaling, weight decay by role, zero anchors) are off. To turn them "
    "on pass model.named_parameters(), or a list of names as 'param_names' or 'named' in each "
    "parameter group, or set a 'param_name' attribute on the tensors."
)


class NonFiniteGradientError(RuntimeError):
    """A gradient holds NaN or infinity; the message names the tensors. Nothing was changed."""


class _Alike(NamedTuple):
    """What tensors must have in common to run through the chain together."""

    group: int
    device: torch.device
    dtype: torch.dtype
    family: str
    kept: tuple[tuple[str, Kind], ...]
    quantized: bool
    step: int


@dataclass(frozen=True)
class StepRecord:
    """What the last step noted of some tensors: roles, and per-tensor or common figures."""

    roles: Sequence[str]
    values: Mapping[str, Tensor | float]


class ChainOptimizer(torch.optim.Optimizer):
    """An optimizer that is a chain of techniques.

    Args:
        params: tensors, `(name, tensor)` pairs, or parameter groups (see `roles.group_names`).
        defaults: lr, betas, eps and weight_decay of groups that do not set their own.
        chain: the techniques, in the order in which they act.
        optim_bits: 8 keeps the moments of large tensors in 8 bits, 32 keeps all in float32.
        min_8bit_size: tensors with fewer elements keep float32 state.
        bf16_rounding: how bfloat16 and float16 parameters are written back.
        nonfinite: `raise` on NaN or infinity in a gradient, or `skip` the step and count it.

    Raises:
        ValueError: an impossible hyper-parameter, or names that do not match the parameters.
    """

    RULES: ClassVar[dict[str, Rule]] = {
        "lr": number(0),
        "betas": pair(number(0, 1, open_high=True)),
        # A zero in float32 would divide zero by zero where a gradient is zero.
        "eps": number(TINY),
        "weight_decay": number(0),
        "optim_bits": one_of(8, 32),
        "min_8bit_size": whole_number(0),
        "bf16_rounding": one_of("stochastic", "nearest"),
        "nonfinite": one_of("raise", "skip"),
    }

    def __init__(
        self,
        params: Iterable[Any],
        defaults: dict[str, Any],
        chain: Sequence[Technique],
        *,
        optim_bits: int,
        min_8bit_size: int,
        bf16_rounding: Literal["stochastic", "nearest"],
        nonfinite: Literal["raise", "skip"],
    ) -> None:
        self.chain = tuple(chain)
        self.optim_bits = optim_bits
        self.min_8bit_size = min_8bit_size
        self.bf16_rounding = bf16_rounding
        self.nonfinite = nonfinite
        self.skipped_steps = 0
        self.last_step: list[StepRecord] = []
        self._roles: Roles | None = None
        super().__init__(params, defaults)
        if not self.roles.named:
            warnings.warn(_NO_NAMES, stacklevel=3)

    @property
    def roles(self) -> Roles:
        """Names, roles and pairs of the parameters as they are grouped now."""
        if self._roles is None:
            self._roles = Roles(self.param_groups)
        return self._roles

    @torch._disable_dynamo
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, with its names where it tells them.

        Raises:
            ValueError: a number of names that differs, an impossible hyper-parameter or one that
                a group cannot set, or a tensor that is not of real floating-point numbers.
        """
        params = param_group["params"]
        if not isinstance(params, Tensor | set):
            params = param_group["params"] = list(params)
        elif isinstance(params, Tensor):
            params = param_group["params"] = [params]
        check_groupable(self.RULES, self.defaults, param_group, type(self).__name__)
        check_values(self.RULES, {**self.defaults, **param_group}, type(self).__name__)
        # Plain numbers: torch.load(weights_only=True) reads them, and a step needs no device.
        for key, default in self.defaults.items():
            param_group[key] = plain(param_group.get(key, default))
        for item in params:
            param = item[1] if isinstance(item, tuple) else item
            if isinstance(param, Tensor) and not param.is_floating_point():
                raise ValueError(
                    f"{type(self).__name__} takes real floating-point tensors, not {param.dtype}."
                )
        names = group_names(param_group)
        # PyTorch wants all groups with names or none: "" stands for a missing one.
        if names is None and any("param_names" in group for group in self.param_groups):
            names = [""] * len(params)
        if names is not None:
            for group in self.param_groups:
                group.setdefault("param_names", [""] * len(group["params"]))
            param_group["param_names"] = names
        super().add_param_group(param_group)
        self._roles = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; returns what `closure` returns, if given.

        Raises:
            NonFiniteGradientError: with `nonfinite="raise"`; parameters and state are untouched.
            RuntimeError: a sparse gradient.
            ValueError: a learning rate that is not finite.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        pieces = self._pieces()
        grads = [self._gather_gradients(params) for _, params in pieces]
        if not self._all_finite(grads):
            self.skipped_steps += 1
            return loss
        # Before any parameter moves: a pair's halves may lie in different pieces.
        prepared = {technique: technique.prepare(self.roles) for technique in self.chain}
        self.last_step = []
        for (alike, params), grad in zip(pieces, grads, strict=True):
            report = self._advance(alike, params, grad, prepared)
            self.last_step.append(StepRecord([self.roles.role[p] for p in params], report))
        return loss

    def state_dict(self) -> dict[str, Any]:
        """State per parameter and options per group, in PyTorch's form; plain values and tensors
        only, so that `torch.load(weights_only=True)` reads it."""
        saved = super().state_dict()
        for group in saved["param_groups"]:
            group.pop("named", None)  # the same as param_names
        return saved

    @torch._disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a `state_dict`, bit for bit.

        State is found by name, whatever the groups, where both sides have the name, and in order
        for the rest; group options are taken over only if the groups are the same. State in another
        precision is converted, with a log line.

        Raises:
            ValueError: parameters or shapes that differ, or an impossible group option.
        """
        state_dict = state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = pre_hook(self, state_dict) or state_dict
        checkpoint.load(self, state_dict)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def uses_8bit(self, param: Tensor) -> bool:
        """Whether this parameter's moments are kept in 8 bits."""
        return self.optim_bits == 8 and param.numel() >= self.min_8bit_size

    def kept(self, param: Tensor) -> dict[str, Kind]:
        """What the chain keeps of a parameter, by name."""
        role = self.roles.role[param]
        return {name: kind for link in self.chain for name, kind in link.state(role).items()}

    def __getstate__(self) -> dict[str, Any]:
        own = (
            "chain",
            "optim_bits",
            "min_8bit_size",
            "bf16_rounding",
            "nonfinite",
            "skipped_steps",
        )
        return super().__getstate__() | {name: getattr(self, name) for name in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._roles = None
        self.last_step = []

    def _pieces(self) -> list[tuple[_Alike, list[Tensor]]]:
        """The tensors that have a gradient, in pieces that run through the chain together."""
        lists: dict[_Alike, list[list[Tensor]]] = defaultdict(list)
        filled: dict[_Alike, int] = {}
        kept_by_role: dict[str, tuple[tuple[str, Kind], ...]] = {}
        for index, group in enumerate(self.param_groups):
            if not math.isfinite(group["lr"]):
                raise ValueError(f"The learning rate of parameter group {index} is {group['lr']}.")
            for param in group["params"]:
                if param.grad is None or param.numel() == 0:
                    continue
                if param.grad.is_sparse:
                    raise RuntimeError(
                        f"{type(self).__name__} does not take sparse gradients; "
                        f"{self.roles.call(param)} has one."
                    )
                role = self.roles.role[param]
                if role not in kept_by_role:
                    kept_by_role[role] = tuple(self.kept(param).items())
                alike = _Alike(
                    group=index,
                    device=param.device,
                    dtype=param.dtype,
                    family=family_of(role),
                    kept=kept_by_role[role],
                    quantized=self.uses_8bit(param),
                    step=self.state.get(param, {}).get("step", 0) + 1,
                )
                size = -(-param.numel() // BLOCK) * BLOCK
                if alike not in filled or filled[alike] + size > _PIECE:
                    lists[alike].append([])
                    filled[alike] = 0
                lists[alike][-1].append(param)
                filled[alike] += size
        return [(alike, params) for alike, some in lists.items() for params in some]

    def _gather_gradients(self, params: Sequence[Tensor]) -> Tensor:
        """The gradients as one `[blocks, 256]` matrix, in the precision of the maths."""
        grads = [param.grad for param in params if param.grad is not None]
        return _layout(params).gather(grads, checkpoint.maths_dtype(params[0]))

    def _all_finite(self, grads: Sequence[Tensor]) -> bool:
        """Whether every gradient is finite: one synchronisation with each device."""
        largest: dict[torch.device, list[Tensor]] = defaultdict(list)
        for grad in grads:
            largest[grad.device].append(grad.abs().amax())
        if all(bool(torch.stack(some).isfinite().all()) for some in largest.values()):
            return True
        if self.nonfinite == "raise":
            with_grad = (
                p for group in self.param_groups for p in group["params"] if p.grad is not None
            )
            broken = [self.roles.call(p) for p in with_grad if not bool(p.grad.isfinite().all())]
            more = f" and {len(broken) - 8} more" if len(broken) > 8 else ""
            raise NonFiniteGradientError(
                f"NaN or infinity in the gradient of {', '.join(broken[:8])}{more}. Parameters and "
                "optimizer state are unchanged."
            )
        return False

    def _advance(
        self,
        alike: _Alike,
        params: Sequence[Tensor],
        grad: Tensor,
        prepared: Mapping[Technique, Mapping[Tensor, Tensor]],
    ) -> Mapping[str, Tensor | float]:
        """Run the chain on one piece, write parameters and state back, return what was noted."""
        for param in params:
            if not self.state[param]:
                checkpoint.complete(self, param)
        layout, group = _layout(params), self.param_groups[alike.group]
        p = layout.gather(params, grad.dtype)
        work = Work(
            params=params,
            family=alike.family,
            layout=layout,
            step=alike.step,
            lr=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            grad=grad,
            g=grad,
            p=p,
            u=grad,
            pace=torch.ones_like(layout.numel),
            new_p=p,
            prepared=prepared,
        )
        for name, kind in alike.kept:
            work.state[name] = self._read(work, name, kind, alike.quantized)
        for technique in self.chain:
            technique.apply(work)
        noise = self._noise(work)
        for name, kind in alike.kept:
            self._write(work, name, kind, alike.quantized, noise)
        for param in params:
            self.state[param]["step"] = alike.step
        self._write_parameters(work, alike.dtype, noise)
        return work.report

    def _read(self, work: Work, name: str, kind: Kind, quantized: bool) -> Tensor:
        """One kind of state of the piece's tensors, as a matrix (`[tensors]` for a scalar)."""
        kept = self._kept_tensors(work, name)
        if kind == "scalar":
            return torch.stack(kept).to(work.grad.dtype)
        if quantized and kind in QUANTIZABLE:
            scale = torch.cat(self._kept_tensors(work, f"{name}_scale"))
            return decode(work.layout.gather(kept, kept[0].dtype), scale, kind)
        return work.layout.gather(kept, work.grad.dtype)

    def _write(
        self, work: Work, name: str, kind: Kind, quantized: bool, noise: Iterator[Tensor]
    ) -> None:
        """Keep one kind of state of the piece's tensors."""
        if kind == "scalar":
            self._keep(work, name, work.state[name].unbind())
        elif quantized and kind in QUANTIZABLE:
            codes, scale = encode(work.state[name], kind, next(noise))
            self._keep(work, name, work.layout.split(codes, [p.shape for p in work.params]))
            self._keep(work, f"{name}_scale", work.layout.split_blocks(scale))
        elif kind != "initial":
            shapes = [param.shape for param in work.params]
            self._keep(work, name, work.layout.split(work.state[name], shapes))

    def _write_parameters(self, work: Work, dtype: torch.dtype, noise: Iterator[Tensor]) -> None:
        new_p = work.new_p
        if dtype in (torch.bfloat16, torch.float16) and self.bf16_rounding == "stochastic":
            new_p = rounding.round_to(new_p, dtype, next(noise))
        shapes = [param.shape for param in work.params]
        torch._foreach_copy_(list(work.params), work.layout.split(new_p, shapes))

    def _kept_tensors(self, work: Work, name: str) -> list[Tensor]:
        """One entry of each tensor's state, brought along where the parameter has moved."""
        device = work.grad.device
        kept = [self.state[param][name] for param in work.params]
        return [tensor if tensor.device == device else tensor.to(device) for tensor in kept]

    def _keep(self, work: Work, name: str, values: Iterable[Tensor]) -> None:
        # Cloned: a view would keep the matrix of all the piece's tensors alive, and in torch.save,
        # for as long as this one gets no gradient. It costs under two hundredths of a step.
        for param, value in zip(work.params, values, strict=True):
            self.state[param][name] = value.clone()

    def _noise(self, work: Work) -> Iterator[Tensor]:
        """Uniform noise for the piece's elements; each tensor's depends on its key and the step."""
        keys = work.layout.spread(torch.stack(self._kept_tensors(work, "noise_key")))
        return rounding.uniforms(work.layout.position, keys, work.step)


def _layout(params: Sequence[Tensor]) -> Layout:
    return layout_of(tuple(param.numel() for param in params), params[0].device)
