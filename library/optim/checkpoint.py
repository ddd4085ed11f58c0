"""State dicts of chain optimizers: found by name, converted between precisions."""

from __future__ import annotations

import logging
import zlib
from collections import Counter
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .arguments import check_values, plain
from .layout import BLOCK, layout_of
from .lines import shape_of_lines
from .state import CODES, NEAREST, QUANTIZABLE, Kind, decode, encode

if TYPE_CHECKING:
    from .chain import Slot, Variant
    from .engine import ChainOptimizer

logger = logging.getLogger(__name__)

# Of a saved group, what belongs to its parameters rather than to the options.
_NOT_OPTIONS = ("params", "param_names", "named")


def complete(optimizer: ChainOptimizer, param: Tensor) -> None:
    """Give a parameter's state what its chain keeps and is not there yet.

    All zero, but for what is kept of the parameter itself, and for `noise_key`: the number that
    stands for the parameter in stochastic rounding. It comes from the name where there is one, so
    that it does not depend on the grouping.
    """
    state = optimizer.state[param]
    state.setdefault("step", 0)
    if "noise_key" not in state:
        name = optimizer.roles.names[param]
        # 31 bits: it is stored as an int32 where noise is drawn.
        state["noise_key"] = (
            zlib.crc32(name.encode()) >> 1 if name else optimizer.roles.position[param]
        )
    for technique in optimizer.chain:
        if technique.settles(state):
            technique.settle(state)
    variant = optimizer.variant(param)
    for name in optimizer.outlived(param, state):
        del state[name]
    for slot in variant.slots:
        _check_shapes(optimizer, param, state, slot, variant)
        for name, (shape, dtype) in _forms(slot, variant, param).items():
            if name not in state:
                state[name] = torch.zeros(shape, dtype=dtype, device=param.device)
                if slot.kind == "initial":
                    state[name].copy_(param.detach())
            # The parameter may have moved, and a loaded state may come from anywhere.
            state[name] = state[name].to(param.device, dtype).contiguous()


def _check_shapes(
    optimizer: ChainOptimizer, param: Tensor, state: dict[str, Any], slot: Slot, variant: Variant
) -> None:
    """Refuse what is held in a slot if it belongs to a tensor of another shape."""
    for name, (shape, _) in _forms(slot, variant, param).items():
        if name in state and state[name].shape != shape:
            raise ValueError(
                f"The state '{name}' of {optimizer.roles.call(param)} has shape "
                f"{tuple(state[name].shape)} where {tuple(shape)} belongs."
            )


def _forms(
    slot: Slot, variant: Variant, param: Tensor
) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and type of the tensors that hold a slot, by name."""
    shape = torch.Size() if slot.kind == "scalar" else param.shape
    if slot.axis:
        shape = shape_of_lines(shape, slot.axis)
    forms = {slot.name: (shape, slot.stored(variant))}
    blocks = -(-shape.numel() // BLOCK)
    if slot.coded:
        forms[slot.scale] = torch.Size([blocks]), torch.float32
    if slot.kind == "packed":
        forms[slot.high] = torch.Size([blocks, BLOCK // 4]), torch.uint8
    return forms


def load(optimizer: ChainOptimizer, state_dict: dict[str, Any]) -> None:
    """Replace the optimizer's state, and the groups' options where the groups are the same.

    Raises:
        ValueError: parameters, groups or shapes that differ from the saved ones, or a saved option
            that is impossible; nothing was changed.
    """
    saved_groups = state_dict["param_groups"]
    params, same_groups = _match(optimizer, saved_groups)
    options = [
        {key: value for key, value in group.items() if key not in _NOT_OPTIONS}
        for group in (saved_groups if same_groups else [])
    ]
    for some in options:
        check_values(optimizer.RULES, some, f"The saved state for {type(optimizer).__name__}")
    conversions: Counter[str] = Counter()
    loaded = {
        params[index]: _restore(optimizer, params[index], saved, conversions)
        for index, saved in state_dict["state"].items()
        if index in params
    }
    others = {key: deepcopy(v) for key, v in state_dict["state"].items() if key not in params}
    optimizer.state.clear()
    optimizer.state.update(loaded)
    for param in loaded:
        complete(optimizer, param)
    optimizer.state.update(others)  # kept for whoever put it there
    if same_groups:
        for group, some in zip(optimizer.param_groups, options, strict=True):
            group.update(deepcopy(some))
            group.update({key: plain(group[key]) for key in optimizer.defaults})
    else:
        logger.info(
            "The saved optimizer state is grouped differently: state was found by parameter name, "
            "learning rates and other group options stay as they are set now."
        )
    for direction, count in conversions.items():
        logger.info("Converted the optimizer state of %d tensors %s.", count, direction)


def _match(
    optimizer: ChainOptimizer, saved_groups: list[dict[str, Any]]
) -> tuple[dict[int, Tensor], bool]:
    """The parameter for each saved index, and whether the groups are the same.

    A name that occurs once on both sides tells the parameter; the others are matched in their
    order, group by group.
    """
    now, then = _named(optimizer.param_groups), _named(saved_groups)
    shared = _unique(now) & _unique(then)
    by_name = {name: param for group in now for name, param in group if name in shared}
    found = {index: by_name[name] for group in then for name, index in group if name in shared}
    rest_now, rest_then = _without(shared, now), _without(shared, then)
    names_now = [name for group in rest_now for name, _ in group]
    names_then = [name for group in rest_then for name, _ in group]
    pairs = zip(names_now, names_then, strict=False)
    contradict = any(one and other and one != other for one, other in pairs)
    missing = sorted((Counter(names_now) - Counter(names_then)).keys() - {""})
    unknown = sorted((Counter(names_then) - Counter(names_now)).keys() - {""})
    if (missing or unknown) and (contradict or all(names_now + names_then)):
        raise ValueError(
            "The saved optimizer state is of other parameters. "
            f"Not in it: {_some(missing)}. Only in it: {_some(unknown)}."
        )
    if contradict or list(map(len, rest_now)) != list(map(len, rest_then)):
        raise ValueError(
            f"The saved optimizer state has parameter groups of sizes {list(map(len, then))}, this "
            f"optimizer has {list(map(len, now))}; without a unique name for every parameter they "
            "must have the same sizes and order to be matched."
        )
    for group, saved in zip(rest_now, rest_then, strict=True):
        found.update({index: p for (_, p), (_, index) in zip(group, saved, strict=True)})
    members_now = [[id(p) for _, p in group] for group in now]
    members_then = [[id(found[index]) for _, index in group] for group in then]
    return found, members_now == members_then


def _named(groups: list[dict[str, Any]]) -> list[list[tuple[str, Any]]]:
    """Of each group, its parameters (or their saved indices) with their names, "" for none."""
    named = []
    for group in groups:
        items = group["params"]
        names = group.get("param_names", [""] * len(items))
        named.append(list(zip(names, items, strict=True)))
    return named


def _unique(groups: list[list[tuple[str, Any]]]) -> set[str]:
    """The names that occur once."""
    counts = Counter(name for group in groups for name, _ in group if name)
    return {name for name, count in counts.items() if count == 1}


def _without(names: set[str], groups: list[list[tuple[str, Any]]]) -> list[list[tuple[str, Any]]]:
    """What is left of the groups without the parameters so called, and without empty groups."""
    left = [[item for item in group if item[0] not in names] for group in groups]
    return [group for group in left if group]


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return (", ".join(names[:3]) or "nothing") + more


def _restore(
    optimizer: ChainOptimizer, param: Tensor, saved: dict[str, Any], conversions: Counter[str]
) -> dict[str, Any]:
    """A copy of one parameter's saved state, on its device and in the precision it has now."""
    state = {
        key: value.to(param.device, copy=True) if isinstance(value, Tensor) else deepcopy(value)
        for key, value in saved.items()
    }
    if "step" in state:
        state["step"] = int(state["step"])  # other optimizers keep it as a tensor
    converted = set()
    variant = optimizer.variant(param, state)
    for slot in variant.slots:
        name, kind = slot.name, slot.kind
        if kind not in QUANTIZABLE or name not in state:
            _check_shapes(optimizer, param, state, slot, variant)
            continue
        shape, _ = _forms(slot, variant, param)[name]
        if state[name].shape != shape:
            raise ValueError(
                f"The saved '{name}' of {optimizer.roles.call(param)} has shape "
                f"{tuple(state[name].shape)}, the parameter {tuple(param.shape)}."
            )
        if slot.scale not in state:
            state[name] = state[name].to(variant.maths)
            if slot.coded:
                _quantize(state, name, kind)
                converted.add("from float32 to 8 bits")
        elif not slot.coded:
            _dequantize(state, name, kind, variant.maths)
            converted.add("from 8 bits to float32")
        _check_shapes(optimizer, param, state, slot, variant)
    conversions.update(converted)
    return state


def _quantize(state: dict[str, Any], name: str, kind: Kind) -> None:
    """Replace an element-wise state by 8-bit codes and scales, rounded to the nearest."""
    value = state[name]
    layout = layout_of((value.numel(),), value.device)
    matrix = layout.gather([value], torch.float32)
    codes, scales = encode(matrix, kind, NEAREST)
    (view,) = layout.split(codes, [value.shape])
    state[name] = view.to(CODES[kind])  # a copy, without the padding
    state[f"{name}_scale"] = scales.squeeze(1)


def _dequantize(state: dict[str, Any], name: str, kind: Kind, dtype: torch.dtype) -> None:
    """Replace 8-bit codes and scales by their values."""
    codes = state[name]
    layout = layout_of((codes.numel(),), codes.device)
    scales = state.pop(f"{name}_scale").unsqueeze(1)
    matrix = decode(layout.gather([codes], torch.int32), scales, kind)
    (view,) = layout.split(matrix, [codes.shape])
    state[name] = view.to(dtype, copy=True)  # without the padding
