"""Operations of a chain's graph as expressions of C++."""

from __future__ import annotations

import re
from typing import Any

from torch import fx

from .graph import (
    COMPARISONS,
    ChainGraph,
    Level,
    UntranslatableError,
    line_of,
    name_of,
    number_kind,
    spread,
    to_lines,
)

# Operations by name; {0}, {1}, … are the arguments. The functions are those of lanes.h.
_OPERATIONS = {
    "add": "({0} + {1})",
    "sub": "({0} - {1})",
    "mul": "({0} * {1})",
    "truediv": "({0} / {1})",
    "neg": "(-{0})",
    "abs": "magnitude({0})",
    "sqrt": "root({0})",
    "rsqrt": "inverse_root({0})",
    "coarse_rsqrt": "coarse_inverse_root({0})",
    "square": "({0} * {0})",
    "reciprocal": "(1 / {0})",
    "sign": "sign_of({0})",
    "copysign": "with_sign({0}, {1})",
    "exp": "exponential({0})",
    "sigmoid": "logistic({0})",
    "floor": "round_down({0})",
    "ceil": "round_up({0})",
    "pow": "power({0}, {1})",
    "maximum": "larger({0}, {1})",
    "minimum": "smaller({0}, {1})",
    "clamp_min": "larger({0}, {1})",
    "clamp_max": "smaller({0}, {1})",
    "clamp": "smaller(larger({0}, {1}), {2})",
    "where": "where({0}, {1}, {2})",
    "rshift": "({0} >> {1})",
    "lshift": "({0} << {1})",
    "and_": "({0} & {1})",
    "or_": "({0} | {1})",
    "xor": "({0} ^ {1})",
    "gt": "({0} > {1})",
    "lt": "({0} < {1})",
    "ge": "({0} >= {1})",
    "le": "({0} <= {1})",
    "eq": "({0} == {1})",
    "ne": "({0} != {1})",
}


class Expressions:
    """How the values of a graph's nodes are written.

    Nodes are numbered; a value is called t[i] where it is computed for a tensor, si in a pass that
    uses it, bi for a block and vi for sixteen elements.
    """

    def __init__(self, graph: ChainGraph) -> None:
        self.graph, self.values = graph, graph.values
        self.number = {node: index for index, node in enumerate(graph.nodes)}

    def of(self, node: fx.Node, level: Level) -> str:
        """A node's value from its arguments, at the level where it is computed.

        Raises:
            UntranslatableError: an operation without translation.
        """
        name, kind = name_of(node), self.values[node].kind
        if node.target in (spread, to_lines):
            return self.argument(node.args[0], level)
        if name == "view":
            return f"as<{'I' if kind == 'int' else 'V'}>({self.argument(node.args[0], level)})"
        if name in ("to", "float", "int"):
            truth = self.kind(node.args[0]) == "truth"
            operand = self.argument(node.args[0], level, "real" if truth else None)
            return f"to_{'int' if kind == 'int' else 'float'}({operand})"
        if name not in _OPERATIONS or len(node.args) != _arity(name):
            raise UntranslatableError(
                f"A technique uses '{name}' of {len(node.args)} arguments, which has no "
                f"translation to C++: {line_of(node)}. "
                "Write it with operations that have one (docs/engine.md lists them), or run the "
                'optimizer with backend="eager".'
            )
        arguments = list(node.args)
        if name == "pow" and arguments[1] in (2, 0.5):
            name = "square" if arguments[1] == 2 else "sqrt"
        if name == "rsqrt" and level == Level.ELEMENT and self.graph.is_of_codes(node):
            # Codes have three bits behind the exponent: a root of fourteen is exact enough.
            name = "coarse_rsqrt"
        if name in COMPARISONS:
            kind = "int" if {self.kind(argument) for argument in arguments} == {"int"} else "real"
        operands = [
            self.argument(argument, level, "truth" if name == "where" and k == 0 else kind)
            for k, argument in enumerate(arguments)
        ]
        return _OPERATIONS[name].format(*operands)

    def kind(self, argument: Any) -> str:
        """Whether an argument is real, int or truth."""
        known = isinstance(argument, fx.Node)
        return self.values[argument].kind if known else number_kind(argument)

    def argument(self, argument: Any, level: Level, kind: str | None = None) -> str:
        """An argument as a value of the level, converted to the kind."""
        if not isinstance(argument, fx.Node):
            if level == Level.ELEMENT:
                return f"splat_int({argument})" if kind == "int" else f"splat({float(argument)!r}f)"
            return f"{float(argument)!r}" + ("f" if level == Level.BLOCK else "")
        own = self.values[argument]
        if own.level == Level.ELEMENT:
            text = f"v{self.number[argument]}"
            if kind == "truth" and own.kind != "truth":
                return f"({text} != 0)"
            if kind == "real" and own.kind == "truth":
                return f"where({text}, splat(1.0f), splat(0.0f))"
            if kind == "int" and own.kind == "truth":
                return f"where({text}, splat_int(1), splat_int(0))"
            return f"to_float({text})" if kind == "real" and own.kind == "int" else text
        if own.level == Level.BLOCK:
            text = f"b{self.number[argument]}"
            return f"splat({text})" if level == Level.ELEMENT else text
        if level == Level.TENSOR:
            number = f"t[{self.number[argument]}]"
            return f"({number} != 0)" if own.kind == "truth" else number
        text = f"s{self.number[argument]}"
        if own.kind == "truth" and kind not in ("real", "int"):
            text = f"({text} != 0)"
            return f"splat_truth{text}" if level == Level.ELEMENT else text
        return f"splat({text})" if level == Level.ELEMENT else text


def _arity(name: str) -> int:
    """How many arguments an operation takes."""
    return len(set(re.findall(r"{(\d)}", _OPERATIONS[name])))
