"""The C++ program of a chain's graph.

For each phase a pass over the blocks of a tensor, written element by element; between the passes
what is known per tensor. What several passes need is computed again in each of them, because
memory is slower than arithmetic, but for nodes with roots or divisions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..chain import Variant
from ..noise import SPACING, STREAM, TABLE
from ..techniques.base import Technique
from .graph import (
    PER_TENSOR,
    ChainGraph,
    Level,
    block_max,
    draw,
    name_of,
    number_kind,
    only,
    spread,
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
    "square": "({0} * {0})",
    "reciprocal": "(1 / {0})",
    "sign": "sign_of({0})",
    "copysign": "with_sign({0}, {1})",
    "exp": "exponential({0})",
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
_STORED = {
    torch.float32: "float",
    torch.bfloat16: "bfloat",
    torch.int8: "int8_t",
    torch.uint8: "uint8_t",
}


class UntranslatableError(NotImplementedError):
    """A technique uses an operation that has no translation; the message names it."""


@dataclass(frozen=True)
class Program:
    """A chain in C++, and the order of what it is given.

    Attributes:
        source: what goes before driver.h.
        numbers: names of the per-tensor inputs; `factors` come behind them.
        reports: names of the per-tensor outputs.
        pointers: what the program needs of each parameter: `p`, `grad` and names of what is held.
    """

    source: str
    numbers: tuple[str, ...]
    factors: tuple[Technique, ...]
    reports: tuple[str, ...]
    pointers: tuple[str, ...]


def translate(chain: Sequence[Technique], variant: Variant) -> Program:
    """The program of a chain for one variant of tensors.

    Raises:
        UntranslatableError: an operation without translation.
    """
    return _Writer(ChainGraph(chain, variant)).program()


class _Writer:
    def __init__(self, graph: ChainGraph) -> None:
        self.graph = graph
        self.values = graph.values
        self.number = {node: index for index, node in enumerate(graph.nodes)}
        self.stored = {"p": graph.variant.dtype, "grad": graph.variant.dtype}
        for slot in graph.variant.slots:
            self.stored[slot.name] = slot.stored(graph.variant)
            if slot.coded:
                self.stored[slot.scale] = torch.float32
        self.pointers = tuple(self.stored)

    def program(self) -> Program:
        graph = self.graph
        passes = range(graph.last + 1)
        sums = [self.sums(phase) for phase in passes]
        parts = [
            '#include <algorithm>\n#include "lanes.h"\n',
            _CALL,
            f"constexpr int PHASES = {len(passes)};",
            f"constexpr int SUMS = {max(map(len, sums))};",
            f"constexpr int VALUES = {len(graph.nodes)};",
            f"constexpr int64_t KEPT = {len(graph.kept)};",
            *(self.one_pass(phase) for phase in passes),
            _switch("pass", _PASS, [f"pass{k}" for k in passes]),
            self.per_tensor("begin", 0, []),
            *(self.per_tensor(f"after{k}", k + 1, sums[k]) for k in passes),
            _switch("after", _AFTER, [f"after{k}" for k in passes]),
            '#include "driver.h"\n',
        ]
        return Program(
            source="\n".join(parts),
            numbers=PER_TENSOR,
            factors=tuple(graph.factors),
            reports=tuple(graph.report),
            pointers=self.pointers,
        )

    def sums(self, phase: int) -> list[fx.Node]:
        return [node for node in self.graph.sums if self.values[node].phase == phase + 1]

    # Per tensor: float64 numbers in the array t.

    def per_tensor(self, name: str, phase: int, sums: list[fx.Node]) -> str:
        first = name == "begin"
        head = _BEGIN if first else _AFTER
        lines = [f"  t[{self.number[node]}] = sums[{k}];" for k, node in enumerate(sums)]
        if first:
            lines += self.read_numbers()
        for node in self.graph.per_tensor(phase):
            if node.op != "placeholder" and node not in sums:
                lines.append(f"  t[{self.number[node]}] = {self.expression(node, Level.TENSOR)};")
        if phase == self.graph.last + 1:
            lines += self.write_numbers()
        return f"static void {name}{head} {{\n" + "\n".join(lines) + "\n}\n"

    def read_numbers(self) -> list[str]:
        names = [*PER_TENSOR, *(f"factor{k}" for k in range(len(self.graph.factors)))]
        lines = []
        for row, name in enumerate(names):
            if (node := self.graph.inputs[name]) in self.number:
                index = self.number[node]
                lines.append(f"  t[{index}] = call.given[{row} * call.tensors + i];")
        for slot in self.graph.variant.slots:
            node = self.graph.inputs[slot.name]
            if slot.kind == "scalar" and node in self.number:
                lines.append(f"  t[{self.number[node]}] = *{self.pointer(slot.name)};")
        return lines

    def write_numbers(self) -> list[str]:
        lines = [
            f"  *{self.pointer(name)} = (float)t[{self.number[node]}];"
            for name, node in self.graph.outputs.items()
            if self.values[node].level == Level.TENSOR
        ]
        for row, node in enumerate(self.graph.report.values()):
            lines.append(f"  call.report[{row} * call.tensors + i] = t[{self.number[node]}];")
        return lines

    def pointer(self, name: str) -> str:
        """The address of what is held of tensor i."""
        kind = _STORED[self.stored[name]]
        return f"(({kind}*)call.held[{self.pointers.index(name)} * call.tensors + i])"

    # Per block and element.

    def one_pass(self, phase: int) -> str:
        return _Pass(self, phase).text()

    def expression(self, node: fx.Node, level: Level) -> str:
        """A node's value from its arguments, at the level where it is computed."""
        name = name_of(node)
        if node.target is spread:
            return self.argument(node.args[0], level)
        if name in ("view", "to", "float", "int"):
            cast = {"view": "as", "to": "to"}.get(name, "to")
            kind = self.values[node].kind
            of = self.argument(node.args[0], level)
            if cast == "as":
                return f"as<{'I' if kind == 'int' else 'V'}>({of})"
            return f"to_{'int' if kind == 'int' else 'float'}({of})"
        if name not in _OPERATIONS or node.kwargs:
            raise UntranslatableError(
                f"A technique uses '{name}' ({node.format_node()}), which has no translation to "
                "C++. Write it with operations that have one (docs/engine.md lists them), or "
                'run the optimizer with backend="eager".'
            )
        kind = self.values[node].kind
        arguments = list(node.args)
        if name == "pow" and arguments[1] in (2, 0.5):
            name = "square" if arguments[1] == 2 else "sqrt"
        if name in ("gt", "lt", "ge", "le", "eq", "ne"):
            kinds = {self.kind(argument) for argument in arguments}
            kind = "int" if kinds == {"int"} else "real"
        operands = [
            self.argument(argument, level, None if name == "where" and k == 0 else kind)
            for k, argument in enumerate(arguments)
        ]
        return _OPERATIONS[name].format(*operands)

    def kind(self, argument: Any) -> str:
        return (
            self.values[argument].kind if isinstance(argument, fx.Node) else number_kind(argument)
        )

    def argument(self, argument: Any, level: Level, kind: str | None = None) -> str:
        """An argument as a value of the level, converted to the kind."""
        if not isinstance(argument, fx.Node):
            if level == Level.ELEMENT:
                return f"splat_int({argument})" if kind == "int" else f"splat({float(argument)!r}f)"
            return f"{float(argument)!r}" + ("f" if level == Level.BLOCK else "")
        own = self.values[argument]
        if own.level == Level.ELEMENT:
            text = f"v{self.number[argument]}"
            return f"to_float({text})" if kind == "real" and own.kind == "int" else text
        if own.level == Level.BLOCK:
            text = f"b{self.number[argument]}"
            return f"splat({text})" if level == Level.ELEMENT else text
        if level == Level.TENSOR:
            number = f"t[{self.number[argument]}]"
            return f"({number} != 0)" if own.kind == "truth" else number
        text = f"s{self.number[argument]}"
        return f"splat({text})" if level == Level.ELEMENT else text


class _Pass:
    """The text of one pass: for each block, its loops and what lies between them."""

    def __init__(self, writer: _Writer, phase: int) -> None:
        self.writer, self.phase = writer, phase
        self.graph, self.values, self.number = writer.graph, writer.values, writer.number
        self.nodes = self.graph.needed(phase)
        self.loaded = [n for n, made in self.graph.kept.items() if made < phase and n in self.nodes]
        self.loop = self.loops()
        self.last_loop = max(self.loop.values(), default=0)

    def loops(self) -> dict[fx.Node, int]:
        """In which loop over the block's elements a node is computed, or before which a block's."""
        loop: dict[fx.Node, int] = {}
        for node in self.nodes:
            if node in self.loaded or node.op == "placeholder":
                loop[node] = 0
                continue
            before = [loop[arg] for arg in node.all_input_nodes if arg in loop]
            loop[node] = max(before, default=0) + (node.target is block_max)
        return loop

    def text(self) -> str:
        lines = [f"static void pass{self.phase}{_PASS} {{"]
        lines += [f"  Sum sum{self.number[node]};" for node in self.writer.sums(self.phase)]
        for node in self.numbers():
            lines.append(f"  const float s{self.number[node]} = (float)t[{self.number[node]}];")
        lines.append("  for (int64_t b = first; b < last; ++b) {")
        lines += ["    " + line for line in self.block()]
        lines.append("  }")
        for k, node in enumerate(self.writer.sums(self.phase)):
            lines.append(f"  sums[{k}] = sum{self.number[node]}.total();")
        return "\n".join(lines) + "\n}\n"

    def numbers(self) -> list[fx.Node]:
        """What is known of the tensor and used for its blocks and elements."""
        used = {
            arg for node in self.nodes if not self.is_loaded(node) for arg in node.all_input_nodes
        }
        return [
            node
            for node in self.graph.nodes
            if node in used and self.values[node].level == Level.TENSOR
        ]

    def block(self) -> list[str]:
        lines = ["const int64_t at = b * BLOCK;"]
        lines.append("const int n = (int)std::min<int64_t>(BLOCK, call.numel[i] - at);")
        lines += self.open_inputs()
        handed = self.handed_on()
        lines += [f"{self.lanes(node)} a{self.number[node]}[BLOCK / LANES];" for node in handed]
        maxima = [node for node in self.nodes if node.target is block_max]
        lines += [f"V x{self.number[node]}{{}};" for node in maxima]
        sums = self.writer.sums(self.phase)
        lines += [f"V l{self.number[node]}{{}};" for node in sums]
        for loop in range(self.last_loop + 1):
            lines += self.block_values(loop)
            lines.append("for (int j = 0; j < BLOCK; j += LANES) {")
            lines += ["  " + line for line in self.one_loop(loop, handed)]
            lines.append("}")
        lines += [f"sum{self.number[node]}.add(l{self.number[node]});" for node in sums]
        return lines + self.close_outputs()

    def lanes(self, node: fx.Node) -> str:
        return "V" if self.values[node].kind == "real" else "I"

    def handed_on(self) -> list[fx.Node]:
        """Nodes that a later loop needs, in an array of the block's size; those that are one
        operation away from memory are computed again instead."""
        return [
            node
            for node in self.nodes
            if self.values[node].level == Level.ELEMENT
            and not self.is_loaded(node)
            and not self.is_near(node)
            and any(self.loop.get(user, 0) > self.loop[node] for user in self.users(node))
        ]

    def users(self, node: fx.Node) -> list[fx.Node]:
        return [user for user in node.users if user in self.loop and user.target is not block_max]

    def is_loaded(self, node: fx.Node) -> bool:
        return node.op == "placeholder" or node.target is draw or node in self.loaded

    def is_near(self, node: fx.Node) -> bool:
        """Whether nothing but what is loaded, or known of the tensor, goes into a node."""
        return all(
            self.is_loaded(arg) or self.values[arg].level == Level.TENSOR
            for arg in node.all_input_nodes
        )

    def tensors_read(self) -> list[str]:
        return [
            name
            for name, node in self.graph.inputs.items()
            if node in self.nodes and self.values[node].level == Level.ELEMENT
        ]

    def tensors_written(self) -> list[str]:
        return [
            name
            for name in self.graph.written(self.phase)
            if self.values[self.graph.outputs[name]].level == Level.ELEMENT
        ]

    def open_inputs(self) -> list[str]:
        """Where the block lies; a tensor's last block is brought to full length first."""
        lines = []
        written = self.tensors_written()
        for name in dict.fromkeys([*self.tensors_read(), *written]):
            kind = _STORED[self.writer.stored[name]]
            lines += [
                f"{kind}* {name}_at = {self.writer.pointer(name)} + at;",
                f"{kind} {name}_end[BLOCK];",
                "if (n < BLOCK) {",
                f"  std::memset({name}_end, 0, sizeof {name}_end);",
                f"  std::memcpy({name}_end, {name}_at, n * sizeof({kind}));",
                f"  {name}_at = {name}_end;",
                "}",
            ]
        for node in self.nodes:
            if self.values[node].level == Level.BLOCK and node.op == "placeholder":
                lines.append(
                    f"const float b{self.number[node]} = {self.writer.pointer(node.name)}[b];"
                )
            if node.target is draw:
                index = self.number[node]
                lines.append(
                    f"const int32_t* d{index} = call.noise + (scramble(scramble(call.seeds[i] + "
                    f"{node.args[0]}u * {STREAM}u) ^ ((uint32_t)b * {SPACING}u)) & {TABLE - 1}u);"
                )
        return lines

    def close_outputs(self) -> list[str]:
        lines = []
        for name in self.tensors_written():
            kind = _STORED[self.writer.stored[name]]
            lines.append(
                f"if (n < BLOCK) std::memcpy({self.writer.pointer(name)} + at, {name}_end, "
                f"n * sizeof({kind}));"
            )
        for name in self.graph.written(self.phase):
            node = self.graph.outputs[name]
            if self.values[node].level == Level.BLOCK:
                lines.append(f"{self.writer.pointer(name)}[b] = b{self.number[node]};")
        return lines

    def block_values(self, loop: int) -> list[str]:
        """What is known of the block before this loop and was not before the one in front."""
        lines = []
        for node in self.nodes:
            if self.values[node].level != Level.BLOCK or self.loop[node] != loop:
                continue
            if node.op == "placeholder":
                continue
            index = self.number[node]
            if node.target is block_max:
                lines.append(f"const float b{index} = largest(x{index});")
            else:
                text = self.writer.expression(node, Level.BLOCK)
                lines.append(f"const float b{index} = {text};")
        return lines

    def one_loop(self, loop: int, handed: list[fx.Node]) -> list[str]:
        lines = []
        for node in self.used_in(loop, handed):
            index = self.number[node]
            if self.is_loaded(node) or (node in handed and self.loop[node] < loop):
                text = self.load(node, handed)
            else:
                text = self.writer.expression(node, Level.ELEMENT)
            lines.append(f"const {self.lanes(node)} v{index} = {text};")
        for node in handed:
            if self.loop[node] == loop:
                lines.append(f"a{self.number[node]}[j / LANES] = v{self.number[node]};")
        for node, made in self.graph.kept.items():
            if made == self.phase and node in self.loop and self.loop[node] == loop:
                lines.append(f"store({self.kept_at(node)}, v{self.number[node]});")
        for node in self.maxima(loop):
            of = self.number[only(node)]
            lines.append(f"x{self.number[node]} = larger(x{self.number[node]}, v{of});")
        for node in self.sums(loop):
            term = self.writer.argument(node.args[0], Level.ELEMENT, "real")
            lines.append(f"l{self.number[node]} += {term};")
        for name in self.written(loop):
            lines.append(f"store({name}_at + j, v{self.number[self.graph.outputs[name]]});")
        return lines

    def maxima(self, loop: int) -> list[fx.Node]:
        return [n for n in self.nodes if n.target is block_max and self.loop[n] == loop + 1]

    def sums(self, loop: int) -> list[fx.Node]:
        return [n for n in self.writer.sums(self.phase) if self.loop[only(n)] == loop]

    def written(self, loop: int) -> list[str]:
        return [name for name in self.tensors_written() if self.store_loop(name) == loop]

    def used_in(self, loop: int, handed: list[fx.Node]) -> list[fx.Node]:
        """What a loop loads or computes, in order."""
        used: set[fx.Node] = set()
        todo = [n for n in handed if self.loop[n] == loop]
        todo += [
            n
            for n, made in self.graph.kept.items()
            if made == self.phase and self.loop.get(n) == loop
        ]
        todo += [only(n) for n in (*self.maxima(loop), *self.sums(loop))]
        todo += [self.graph.outputs[name] for name in self.written(loop)]
        while todo:
            node = todo.pop()
            if node in used or self.values[node].level != Level.ELEMENT:
                continue
            used.add(node)
            if not self.is_loaded(node) and not (node in handed and self.loop[node] < loop):
                todo.extend(node.all_input_nodes)
        return [node for node in self.nodes if node in used]

    def load(self, node: fx.Node, handed: list[fx.Node]) -> str:
        if node.op == "placeholder":
            return f"load({node.name}_at + j)"
        if node.target is draw:
            return f"load(d{self.number[node]} + j)"
        return (
            f"a{self.number[node]}[j / LANES]" if node in handed else f"load({self.kept_at(node)})"
        )

    def store_loop(self, name: str) -> int:
        """In which loop an output is written: not before the last that reads what lies there."""
        node = self.graph.outputs[name]
        readers = [user for user in self.graph.inputs[name].users if user in self.loop]
        again = [user for near in readers if self.is_near(near) for user in near.users]
        loops = [self.loop[user] for user in (*readers, *again) if user in self.loop]
        return max([self.loop[node], *loops])

    def kept_at(self, node: fx.Node) -> str:
        return f"kept + {list(self.graph.kept).index(node)} * stride + at + j"


_CALL = """
struct Call {
  int64_t tensors, threads;
  const int64_t* numel;     // [tensors]
  const double* given;      // [numbers, tensors]
  double* report;           // [reports, tensors]
  void* const* held;        // [pointers, tensors]
  const uint32_t* seeds;    // [tensors]
  const int32_t* noise;
};
"""
_BEGIN = "(const Call& call, int64_t i, double* t)"
_AFTER = "(const Call& call, int64_t i, double* t, const double* sums)"
_PASS = (
    "(const Call& call, int64_t i, int64_t first, int64_t last, const double* t, double* sums, "
    "float* kept, int64_t stride)"
)


def _switch(name: str, parameters: str, functions: list[str]) -> str:
    """A function that leads to that of its phase."""
    names = [part.split()[-1].strip("*&") for part in parameters.strip("()").split(",")]
    cases = "\n".join(
        f"    case {k}: return {function}({', '.join(names)});"
        for k, function in enumerate(functions)
    )
    head = parameters.replace("(", "(int phase, ", 1)
    return f"static void {name}{head} {{\n  switch (phase) {{\n{cases}\n  }}\n}}\n"
