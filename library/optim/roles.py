"""What a parameter is for, read from its name: roles, base names and the pairs they form.

Names come from the training program (spec 1 §2). Every adapter format in use writes the factor's
own token (`lora_down`, `lora_A`, `lokr_w1`, …) behind the name of the module it adapts, so the
token gives the role and what stands before it, the base name, joins the tensors of one module.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

# The first row that fits decides; in a row the last occurrence counts, because a module path may
# itself contain such a word ("lora_down_blocks_0.lora_up.weight" is an up matrix).
_TOKENS: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("lokr", re.compile(r"lokr[._]?(?:(w[12])(?:_([ab]))?|(t2))?(?![a-z0-9])|lokr")),
    ("mid", re.compile(r"lora[._]mid(?![a-z])")),
    (
        "lora",
        re.compile(r"lora[._](?:embedding_)?(?:(down|a)|(up|b))(?![a-z])"),
    ),
    ("norm", re.compile(r"(?<![a-z])([wb]_norm)(?![a-z])")),
    ("hada", re.compile(r"hada_(?:w[12]|t[12])")),
    ("dora", re.compile(r"dora_scale|lora_magnitude_vector")),
    ("oft", re.compile(r"oft_(?:blocks|diag|r)(?![a-z])")),
    ("ia3", re.compile(r"(?<![a-z])ia3(?![a-z])")),
    ("glora", re.compile(r"glora|(?<=\.)[ab][12](?=\.weight$)")),
)
_OWN_ROLE = {
    "mid": "lora_mid",
    "hada": "hada",
    "dora": "dora_scale",
    "oft": "oft_blocks",
    "ia3": "ia3",
    "glora": "glora",
}

REGULAR = "regular"


@dataclass(frozen=True)
class ParsedName:
    """What a name tells.

    Attributes:
        role: one of spec 1 §2's roles.
        slot: the role, with the factor's letter where the matrix is itself factored
            (`lokr_w2_a`, `lokr_w2_t`).
        base: the module's own name, in front of the token.
        adapter: what follows the token, without `weight`: PEFT's adapter name.
    """

    role: str
    slot: str
    base: str
    adapter: str


def parse_name(name: str) -> ParsedName:
    """Role, factor and base name of the parameter called `name` (in any letter case)."""
    lower = name.lower()
    for row, pattern in _TOKENS:
        found = list(pattern.finditer(lower))
        if not found:
            continue
        # A bare "lokr" in a module's path must not hide the factor's own token behind it.
        match = next((m for m in reversed(found) if any(m.groups())), found[-1])
        role, factor = _role_of(row, match)
        base = name[: match.start()].rstrip("._")
        rest = [part for part in name[match.end() :].split(".") if part and part != "weight"]
        return ParsedName(role, role + factor, base, ".".join(rest))
    return ParsedName(REGULAR, REGULAR, name, "")


def _role_of(row: str, match: re.Match[str]) -> tuple[str, str]:
    """The role, and the suffix that tells a factored matrix's factor."""
    if row == "lokr":
        which, letter, tucker = match.groups()
        if tucker:
            return "lokr_w2", "_t"
        return (f"lokr_{which}", f"_{letter}" if letter else "") if which else ("lokr_generic", "")
    if row == "lora":
        return ("lora_a" if match.group(1) else "lora_b"), ""
    if row == "norm":
        return match.group(1), ""
    return _OWN_ROLE[row], ""


def family_of(role: str) -> str:
    """`lora` for the halves of a LoRA, `lokr` for all tensors of a LoKr, `other` for the rest."""
    if role in ("lora_a", "lora_b"):
        return "lora"
    return "lokr" if role.startswith("lokr_") else "other"


def group_names(group: dict[str, Any]) -> list[str] | None:
    """The names a parameter group tells, one a parameter, or None.

    Looked for in this order: PyTorch's `param_names` (or `(name, tensor)` pairs in `params`, from
    which PyTorch makes it), `named`, a `param_name` attribute on the tensors. Where only some
    tensors carry the attribute the others are called "".

    Raises:
        ValueError: as many names as parameters were expected and another number was given.
    """
    params = group["params"]
    for key in ("param_names", "named"):
        names = group.get(key)
        if names is None:
            continue
        names = list(names)
        if len(names) != len(params):
            raise ValueError(
                f"A parameter group has {len(params)} parameters but {len(names)} names in '{key}'."
            )
        if not all(isinstance(name, str) for name in names):
            raise ValueError(f"'{key}' of a parameter group must hold strings.")
        return names
    if params and all(isinstance(item, tuple) for item in params):
        return [item[0] for item in params]
    names = [getattr(param, "param_name", "") for param in params]
    return names if any(names) else None


@dataclass(frozen=True)
class LoRAPair:
    """B·A of one module; `mid` is the core tensor of a Tucker-decomposed convolution."""

    base: str
    a: Tensor
    b: Tensor
    mid: Tensor | None


@dataclass(frozen=True)
class Factor:
    """One matrix of a Kronecker product: whole, or a·b, or a Tucker core with a and b."""

    whole: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None
    core: Tensor | None = None

    @property
    def complete(self) -> bool:
        """Whether the matrix can be computed from what is there."""
        if self.whole is not None:
            return True
        if self.a is None or self.b is None:
            return False
        if self.core is None:
            return self.a.shape[1] == self.b.shape[0]
        return (self.a.shape[0], self.b.shape[0]) == tuple(self.core.shape[:2])

    @property
    def zero_initialised(self) -> Tensor:
        """The tensor that starts at zero when this is the complete w2 of a LoKr."""
        return next(tensor for tensor in (self.whole, self.b) if tensor is not None)


@dataclass(frozen=True)
class LoKrPair:
    """w1 ⊗ w2 of one module, and all `lokr_*` tensors that belong to it."""

    base: str
    w1: Factor
    w2: Factor
    members: tuple[Tensor, ...]


@dataclass(frozen=True)
class Unpaired:
    """A half without its partner: where it is, what it is, and why it stands alone."""

    name: str
    shape: tuple[int, ...]
    role: str
    reason: str


class Roles:
    """Names, roles and pairs of all parameters of an optimizer, across its parameter groups.

    Attributes:
        names, role, position: per parameter (keyed by the tensor itself); the position counts
            through all groups.
        named: whether any parameter has a name.
        lora_pairs, lokr_pairs, norm_pairs: sorted by base name, so that they do not depend on how
            the parameters are grouped.
        lokr_groups: how many modules have any `lokr_*` tensor.
        unpaired: halves that no pair contains.
    """

    def __init__(self, param_groups: Sequence[dict[str, Any]]) -> None:
        self.names: dict[Tensor, str] = {}
        self.role: dict[Tensor, str] = {}
        self.position: dict[Tensor, int] = {}
        self.lora_pairs: list[LoRAPair] = []
        self.lokr_pairs: list[LoKrPair] = []
        self.norm_pairs: list[tuple[Tensor, Tensor]] = []
        self.lokr_groups = 0
        self.unpaired: list[Unpaired] = []
        modules = self._read(param_groups)
        for base, slots in sorted(modules.items()):
            self._pair_lora(base[0], slots)
            self._pair_lokr(base[0], slots)
            self._pair_norm(slots)

    @cached_property
    def lora_positions(self) -> Tensor:
        """`[pairs, 2]`: the positions of a and b of each LoRA pair."""
        positions = [(self.position[p.a], self.position[p.b]) for p in self.lora_pairs]
        return torch.tensor(positions, dtype=torch.int64).view(-1, 2)

    @cached_property
    def lokr_members(self) -> Tensor:
        """`[members, 2]`: the position of each tensor of a LoKr pair, and the pair's index."""
        return torch.tensor(
            [(self.position[m], k) for k, p in enumerate(self.lokr_pairs) for m in p.members]
        )

    @cached_property
    def lokr_zeros(self) -> Tensor:
        """`[pairs]`: the position of the tensor of each LoKr pair that starts at zero."""
        return torch.tensor([self.position[p.w2.zero_initialised] for p in self.lokr_pairs])

    @property
    def named(self) -> bool:
        return any(self.names.values())

    def count(self, role: str) -> int:
        """How many tensors have this role."""
        return sum(own == role for own in self.role.values())

    def call(self, param: Tensor) -> str:
        """A parameter's name, or what tells it apart where it has none."""
        return (
            self.names[param] or f"parameter {self.position[param]} of shape {tuple(param.shape)}"
        )

    def _read(
        self, param_groups: Sequence[dict[str, Any]]
    ) -> dict[tuple[str, str, int], dict[str, Tensor]]:
        """Fill `names` and `role`; return the tensors of each module by slot."""
        modules: dict[tuple[str, str, int], dict[str, Tensor]] = defaultdict(dict)
        seen: Counter[tuple[str, str, str]] = Counter()
        for group in param_groups:
            params = group["params"]
            for param, name in zip(
                params, group.get("param_names", [""] * len(params)), strict=True
            ):
                parsed = parse_name(name)
                self.position[param] = len(self.names)
                self.names[param] = name
                self.role[param] = parsed.role
                # The same name again is another module's (two networks in one optimizer).
                place = (parsed.base, parsed.adapter, parsed.slot)
                if parsed.role != REGULAR:
                    modules[(*place[:2], seen[place])][parsed.slot] = param
                seen[place] += 1
        return modules

    def _alone(self, params: Iterable[Tensor], reason: str) -> None:
        for param in params:
            self.unpaired.append(
                Unpaired(self.names[param], tuple(param.shape), self.role[param], reason)
            )

    def _pair_lora(self, base: str, slots: dict[str, Tensor]) -> None:
        a, b = slots.get("lora_a"), slots.get("lora_b")
        if a is None or b is None:
            self._alone(
                (half for half in (a, b) if half is not None),
                f"no {'lora_a' if a is None else 'lora_b'} of the same base name",
            )
        elif not a.numel() or not b.numel():
            self._alone((a, b), "there are no elements in it")
        elif min(a.ndim, b.ndim) < 2 or a.shape[0] != b[0].numel():
            self._alone((a, b), "the shapes of lora_a and lora_b do not multiply")
        else:
            self.lora_pairs.append(LoRAPair(base, a, b, slots.get("lora_mid")))

    def _pair_lokr(self, base: str, slots: dict[str, Tensor]) -> None:
        members = tuple(p for slot, p in slots.items() if slot.startswith("lokr_"))
        if not members:
            return
        self.lokr_groups += 1
        w1, w2 = (
            Factor(*(slots.get(which + part) for part in ("", "_a", "_b", "_t")))
            for which in ("lokr_w1", "lokr_w2")
        )
        if w1.complete and w2.complete:
            self.lokr_pairs.append(LoKrPair(base, w1, w2, members))
        else:
            missing = "lokr_w1" if not w1.complete else "lokr_w2"
            self._alone(members, f"no complete {missing} of the same base name")

    def _pair_norm(self, slots: dict[str, Tensor]) -> None:
        w, b = slots.get("w_norm"), slots.get("b_norm")
        if w is not None and b is not None:
            self.norm_pairs.append((w, b))
        else:
            self._alone(
                (half for half in (w, b) if half is not None),
                f"no {'w_norm' if w is None else 'b_norm'} of the same base name",
            )
