"""The base of the optimizers here: an optimizer that is a chain of techniques.

A step asks of each parameter only its gradient; everything else is done for all parameters of a
kind at once, as machine code where there is a compiler (`native`) or by PyTorch's operations
(`eager`). State lives per parameter, in PyTorch's form, and is changed in place.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from operator import attrgetter
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from . import checkpoint, eager
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
from .batch import Batch, Turn, make_turn
from .chain import PER_TENSOR, Variant
from .finite import all_finite
from .layout import BLOCK
from .lines import lines_of
from .native import availability, build
from .native.run import Look, NativeChain, compile_all
from .overview import Overview
from .products import lora_row_norms
from .roles import Roles, group_names
from .scratch import ScratchPool
from .state import KINDS, QUANTIZABLE, Kind, axis_of
from .techniques.base import FOREVER, TINY, Technique

logger = logging.getLogger(__name__)

_OWN_NAMES = {"p", "grad", "noise_key", *PER_TENSOR}


class NonFiniteGradientError(RuntimeError):
    """A gradient holds NaN or infinity; the message names the tensors. Nothing was changed."""


@dataclass(frozen=True)
class StepRecord:
    """What the last step noted of some tensors: roles, and per-tensor figures."""

    roles: Sequence[str]
    values: Mapping[str, Tensor]


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
        backend: `compiled` runs float32 and bfloat16 parameters on the processor as machine code
            made with the C++ compiler of this machine; `eager` runs all by PyTorch's operations;
            `auto` compiles where there is a compiler.
        stochastic_codes: whether 8-bit state is rounded stochastically; else to the nearest.

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
        "backend": one_of("auto", "compiled", "eager"),
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
        backend: Literal["auto", "compiled", "eager"],
        stochastic_codes: bool = True,
    ) -> None:
        self.chain = tuple(chain)
        self.stochastic_codes = stochastic_codes
        self.optim_bits = optim_bits
        self.min_8bit_size = min_8bit_size
        self.bf16_rounding = bf16_rounding
        self.nonfinite = nonfinite
        self.backend = backend
        self.skipped_steps = 0
        self.scratch = ScratchPool()
        self._roles: Roles | None = None
        self._batches: list[Batch] = []
        self._native: dict[Batch, NativeChain] = {}
        self._seen: list[int] = []
        self._grouped: list[tuple[int, ...]] = []
        self.last_step: list[StepRecord] = []
        super().__init__(params, defaults)

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
        if len(set(map(id, params))) < len(params):
            raise ValueError(f"A parameter group of {type(self).__name__} has a tensor twice.")
        names = group_names(param_group)
        if all(isinstance(item, tuple) for item in params):
            # PyTorch takes pairs apart itself only since 2.6.
            param_group["params"] = [param for _, param in params]
        # PyTorch wants all groups with names or none: "" stands for a missing one.
        if names is None and any("param_names" in group for group in self.param_groups):
            names = [""] * len(params)
        if names is not None:
            for group in self.param_groups:
                group.setdefault("param_names", [""] * len(group["params"]))
            param_group["param_names"] = names
        super().add_param_group(param_group)
        self._forget()

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
        self._check_groups()
        turns = [turn for batch in self._batches_now() if (turn := make_turn(batch)) is not None]
        # Machine code is made, and gradients are looked at, before anything moves.
        self._make_programs(turns)
        looks = [self._look(turn) for turn in turns]
        if not self._all_finite(turns, looks):
            self.skipped_steps += 1
            return loss
        if self._regularize(turns):
            looks = [self._look(turn) for turn in turns]
            if not self._all_finite(turns, looks):
                self.skipped_steps += 1
                return loss
        # Before any parameter moves: a pair's halves may lie in different batches.
        prepared = self._prepare()
        norms = self._pair_norms(looks)
        self.last_step = [
            self._advance(turn, prepared, norms, look)
            for turn, look in zip(turns, looks, strict=True)
        ]
        self._conclude(turns)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """State per parameter and options per group, in PyTorch's form; plain values and tensors
        only, so that `torch.load(weights_only=True)` reads it."""
        saved = super().state_dict()
        for group in saved.get("param_groups", ()):  # a hook may have given it another form
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

    def kept(self, param: Tensor, entry: Mapping[str, Any] | None = None) -> dict[str, Kind]:
        """What the chain keeps of a parameter, by name; `entry` stands for its state."""
        entry = self.state.get(param, {}) if entry is None else entry
        step = entry.get("step", 0) + 1
        return self._kept_by(
            [link for link in self.chain if link.steps is None or step < link.steps.stop],
            param,
            entry,
        )

    def outlived(self, param: Tensor, entry: Mapping[str, Any]) -> list[str]:
        """The names of what of a parameter's state only techniques had a use for whose steps are
        over."""
        kept = self.kept(param, entry)
        over = self._kept_by(self.chain, param, entry).keys() - kept
        return [name for slot in over for name in (slot, f"{slot}_scale") if name in entry]

    def _kept_by(
        self, links: Sequence[Technique], param: Tensor, entry: Mapping[str, Any]
    ) -> dict[str, Kind]:
        role = self.roles.role[param]
        kept: dict[str, Kind] = {}
        for link in links:
            for name, kind in link.state(role, entry, param.shape).items():
                if kind not in KINDS or kept.get(name, kind) != kind:
                    raise ValueError(
                        f"{type(link).__name__} keeps '{name}' as '{kind}': a kind is one of "
                        f"{', '.join(KINDS)}, and the same for all techniques that keep it."
                    )
                kept[name] = kind
        if taken := _OWN_NAMES.intersection(kept):
            raise ValueError(
                f"A technique calls its state {', '.join(map(repr, sorted(taken)))}, which is a "
                "name of the optimizer's own: choose another."
            )
        return kept

    def __getstate__(self) -> dict[str, Any]:
        own = (
            "chain",
            "optim_bits",
            "min_8bit_size",
            "stochastic_codes",
            "bf16_rounding",
            "nonfinite",
            "backend",
            "skipped_steps",
        )
        return super().__getstate__() | {name: getattr(self, name) for name in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # PyTorch adds an option of its own optimizers, which no group here has.
        self.defaults = {key: self.defaults[key] for key in self.defaults if key in self.RULES}
        self.scratch = ScratchPool()
        self._forget()

    def _forget(self) -> None:
        """Drop what is only remembered for speed, and the last step's report."""
        self._roles = None
        self._batches, self._native, self._seen, self.last_step = [], {}, [], []
        self._grouped = []

    def _check_groups(self) -> None:
        """Refuse learning rates that are not finite, and sparse gradients."""
        for index, group in enumerate(self.param_groups):
            if not math.isfinite(group["lr"]):
                raise ValueError(f"The learning rate of parameter group {index} is {group['lr']}.")
            grads = [grad for param in group["params"] if (grad := param.grad) is not None]
            if set(map(attrgetter("layout"), grads)) <= {torch.strided}:
                continue
            sparse = next(
                param
                for param in group["params"]
                if param.grad is not None and param.grad.layout is not torch.strided
            )
            raise RuntimeError(
                f"{type(self).__name__} does not take sparse gradients; "
                f"{self.roles.call(sparse)} has one."
            )

    def _regularize(self, turns: Sequence[Turn]) -> bool:
        """Put other gradients in the place of those that autograd left, which are finite; whether
        there are any."""
        return False

    def _all_finite(self, turns: Sequence[Turn], looks: Sequence[Look | None]) -> bool:
        """Whether every gradient is finite; if not, and steps are not to be skipped, an error."""
        others = (turn.grads for turn, look in zip(turns, looks, strict=True) if not look)
        if all(look.finite for look in looks if look) and all_finite(chain.from_iterable(others)):
            return True
        if self.nonfinite == "raise":
            broken = [
                (self.roles.position[param], self.roles.call(param))
                for turn in turns
                for param, grad in zip(turn.params, turn.grads, strict=True)
                if not bool(grad.isfinite().all())
            ]
            names = [name for _, name in sorted(broken)]
            more = f" and {len(names) - 8} more" if len(names) > 8 else ""
            raise NonFiniteGradientError(
                f"NaN or infinity in the gradient of {', '.join(names[:8])}{more}. Parameters and "
                "optimizer state are unchanged."
            )
        return False

    @property
    def _may_compile(self) -> bool:
        """Whether machine code is wanted and can be had.

        Raises:
            CompilerError: `backend="compiled"`, and there is no compiler or it does not work here.
        """
        if self.backend == "eager":
            return False
        problem = availability.problem()
        if problem and self.backend == "compiled":
            raise build.CompilerError(problem)
        if problem:
            _warn_once(problem)
        return problem is None

    def _compiles(self, variant: Variant) -> bool:
        """Whether machine code runs the tensors of a variant."""
        return self._may_compile and availability.fits(variant.device, variant.dtype)

    def _make_programs(self, turns: Sequence[Turn]) -> None:
        """Make what is missing of the programs for this step, and for when state has settled: no
        later step has to wait for the compiler."""
        forms = [form for link in self.chain for form in link.settled]
        forms += [{"step": begins - 1} for begins in self._turning_points]
        variants = []
        for batch in (turn.batch for turn in turns):
            if batch not in self._native and self._compiles(batch.variant):
                settled = [self.variant(batch.params[0], form) for form in forms]
                variants += [batch.variant, *settled]
        if variants:
            compile_all(variants)

    def _look(self, turn: Turn) -> Look | None:
        """Machine code's look at gradients; None where PyTorch's operations run the step."""
        batch = turn.batch
        if not self._compiles(batch.variant):
            return None
        if batch not in self._native:
            self._native[batch] = NativeChain(batch, self.roles.lora_pairs)
        return self._native[batch].look(turn)

    def _pair_norms(self, looks: Sequence[Look | None]) -> Tensor:
        """Mean row norms of B·A, `[parameters]`, of the LoRA pairs for which machine code does not
        compute them itself; 0 for all else."""
        roles = self.roles
        norms = torch.zeros(len(roles.role), dtype=torch.float64)
        if not any(technique.uses_pair_norm for technique in self.chain):
            return norms
        inside = frozenset().union(*(look.order.pairs for look in looks if look))
        rest = [k for k in range(len(roles.lora_pairs)) if k not in inside]
        if rest:
            found = lora_row_norms([roles.lora_pairs[k] for k in rest])
            norms = norms.to(found.device)
            norms[roles.lora_positions[rest]] = found.unsqueeze(1)
        return norms

    def overview(self, reported: Mapping[str, Tensor] | None = None) -> Overview:
        """All parameters with their state, as they are now."""
        entries = [self.state.get(param, {}) for param in self.roles.position]
        return Overview(self.roles, entries, self.scratch, reported or {})

    def _prepare(self) -> dict[Technique, Tensor]:
        """The factors that techniques compute from whole matrices or from all parameters."""
        asked = [link for link in self.chain if type(link).prepare is not Technique.prepare]
        if not asked:
            return {}
        overview = self.overview()
        factors = {technique: technique.prepare(overview) for technique in asked}
        return {key: factor for key, factor in factors.items() if factor is not None}

    def _conclude(self, turns: Sequence[Turn]) -> None:
        """Tell techniques that compare parameters what this step has shown of all of them."""
        ending = [link for link in self.chain if type(link).conclude is not Technique.conclude]
        if not ending or not turns:
            return
        reported: dict[str, Tensor] = {}
        for turn, record in zip(turns, self.last_step, strict=True):
            positions = turn.batch.position_index[turn.index]
            for name, values in record.values.items():
                whole = torch.full((len(self.roles.role),), math.nan, dtype=torch.float64)
                reported.setdefault(name, whole)[positions] = values.cpu().double()
        overview = self.overview(reported)
        for technique in ending:
            technique.conclude(overview)

    def variant(self, param: Tensor, entry: Mapping[str, Any] | None = None) -> Variant:
        """What decides with which others a parameter runs; `entry` stands for its state."""
        entry = self.state.get(param, {}) if entry is None else entry
        kept = self.kept(param, entry)
        low = param.dtype in (torch.bfloat16, torch.float16)
        return Variant(
            chain=self._acting(entry.get("step", 0) + 1),
            device=param.device,
            dtype=param.dtype,
            kept=tuple(kept.items()),
            coded=frozenset(name for name, kind in kept.items() if self._codes(param, kind)),
            stochastic=low and self.bf16_rounding == "stochastic",
            stochastic_codes=self.stochastic_codes,
        )

    def _codes(self, param: Tensor, kind: Kind) -> bool:
        """Whether what is kept of this kind is held in 8 bits. Of lines where a scale is worth it:
        a LoRA's few numbers along its rank each act on thousands of elements."""
        if not self.uses_8bit(param) or kind not in QUANTIZABLE:
            return False
        axis = axis_of(kind)
        return axis is None or lines_of(param.shape, axis).number >= BLOCK

    def _acting(self, step: int) -> tuple[Technique, ...]:
        """The techniques that take part in a parameter's step."""
        return tuple(link for link in self.chain if link.steps is None or step in link.steps)

    @property
    def _turning_points(self) -> list[int]:
        """The steps of a parameter at which techniques begin or end to take part."""
        ranges = [link.steps for link in self.chain if link.steps is not None]
        ends = {end for steps in ranges for end in (steps.start, steps.stop)}
        return sorted(end for end in ends if 1 < end < FOREVER)

    def _batches_now(self) -> list[Batch]:
        """All parameters in batches; made anew where a parameter or its state has moved."""
        seen = list(map(id, self.state.values()))
        grouped = [(id(group), *map(id, group["params"])) for group in self.param_groups]
        if grouped != self._grouped:
            self._forget()
            self._grouped = grouped
        as_before = seen == self._seen and all(batch.is_as_before() for batch in self._batches)
        if self._batches and as_before and not self._settles() and not self._turns():
            return self._batches
        batches: dict[Variant, Batch] = {}
        position = 0
        for index, group in enumerate(self.param_groups):
            for param in group["params"]:
                if param.numel():
                    entry = self.state.get(param, {})
                    if entry:
                        checkpoint.complete(self, param)
                    variant = self.variant(param)
                    batch = batches.setdefault(variant, Batch(variant))
                    batch.add(param, self.roles.role[param], index, position, entry)
                position += 1
        self._batches, self._native, self._seen = list(batches.values()), {}, seen
        return self._batches

    def _turns(self) -> bool:
        """Whether other techniques take part in a parameter's next step than in the one before."""
        if all(link.steps is None for link in self.chain):
            return False
        return any(
            self._acting(step + 1) != batch.variant.chain
            for batch in self._batches
            for step in {entry["step"] for entry in batch.entries if entry}
        )

    def _settles(self) -> bool:
        """Whether a parameter's state is to take another form now."""
        settling = [link for link in self.chain if type(link).settles is not Technique.settles]
        return any(
            link.settles(entry)
            for link in settling
            for batch in self._batches
            for entry in batch.entries
        )

    def _advance(
        self,
        turn: Turn,
        prepared: Mapping[Technique, Tensor],
        norms: Tensor,
        look: Look | None,
    ) -> StepRecord:
        """One step of the parameters of a turn."""
        batch = turn.batch
        for k in [k for k, entry in enumerate(turn.entries) if not entry]:
            param = turn.params[k]
            checkpoint.complete(self, param)
            turn.entries[k] = self.state[param]
            whole = k if isinstance(turn.index, slice) else int(turn.index[k])
            batch.begin(whole, self.state[param])
            self._seen.append(id(self.state[param]))
        turn.tell(self.param_groups, prepared, norms)
        if look:
            report = self._native[batch].run(turn, look)
        else:
            report = eager.run(turn)
        for entry in turn.entries:
            entry["step"] += 1
        return StepRecord(turn.roles, report)


@lru_cache(maxsize=4)
def _warn_once(problem: str) -> None:
    logger.warning(
        "%s The optimizer runs by PyTorch's operations, which takes several times as long.", problem
    )
