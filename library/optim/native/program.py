"""The C++ program of a chain's graph: a look at the gradients, the passes over a tensor, and
between them what is known per tensor. driver.h leads tensors and threads through it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from ..chain import PER_TENSOR, Variant
from ..lines import AXES
from ..techniques.base import Technique
from .expressions import Expressions
from .graph import ChainGraph, Level, line_mean, mean_of_rows
from .passes import LinePass, LookPass, Memory, Pass


@dataclass(frozen=True)
class Program:
    """A chain in C++, and the order of what it is given.

    Attributes:
        source: the program.
        looks: how many sums the look at the gradients makes of each tensor.
        factors: the techniques whose factors come behind the numbers of `PER_TENSOR`.
        reports: names of the per-tensor outputs.
        pointers: what the program needs of each parameter: `p` and names of what is held.
    """

    source: str
    looks: int
    factors: tuple[Technique, ...]
    reports: tuple[str, ...]
    pointers: tuple[str, ...]


def translate(variant: Variant) -> Program:
    """The program of a variant's chain.

    Raises:
        UntranslatableError: an operation without translation.
    """
    return _Writer(ChainGraph(variant)).program()


class _Writer:
    def __init__(self, graph: ChainGraph) -> None:
        self.graph = graph
        self.values = graph.values
        self.expressions = Expressions(graph)
        self.number = self.expressions.number
        self.memory = Memory(graph.variant)

    def program(self) -> Program:
        graph = self.graph
        phases = range(1, graph.last + 1)
        looks = graph.sums_of(0)
        passes = [Pass(graph, self.expressions, self.memory, phase) for phase in phases]
        parts = [
            '#include "lanes.h"\n#include "call.h"\n#include "lines.h"\n',
            f"typedef {self.memory.type('p')} Number;",
            f"constexpr int NORM = {PER_TENSOR.index('pair_norm')};",
            f"constexpr int LOOKS = {len(looks)};",
            f"constexpr int PHASES = {len(phases)};",
            f"constexpr int SUMS = {max(len(graph.sums_of(phase)) for phase in phases)};",
            f"constexpr int VALUES = {len(graph.nodes)};",
            f"constexpr int64_t KEPT = {len(graph.kept)};",
            f"constexpr int64_t SLOTS = {len(graph.slots)};",
            self.line_sums(),
            LookPass(graph, self.expressions, self.memory).text(),
            *(one.text() for one in passes),
            _switch("pass", _PASS, phases),
            *(self.know(phase) for phase in (*phases, len(phases) + 1)),
            _switch("know", _KNOW, (*phases, len(phases) + 1)),
            self.begin(looks),
            *(self.after(phase) for phase in phases),
            _switch("after", _AFTER, phases),
            '#include "driver.h"\n',
        ]
        return Program(
            source="\n".join(parts),
            looks=len(looks),
            factors=tuple(graph.factors),
            reports=tuple(graph.report),
            pointers=self.memory.pointers,
        )

    def line_sums(self) -> str:
        """The table of sums over lines: of which axis, behind which pass known, whether a mean."""
        sums = self.graph.line_sums
        rows = [
            f"{{{AXES.index(self.values[node].axis)}, {self.values[node].phase - 1}, "
            f"{'true' if node.target is line_mean else 'false'}}}"
            for node in sums
        ]
        head = "struct LineSum { int axis, phase; bool mean; };\n"
        table = f"constexpr LineSum LINE_SUM[] = {{{', '.join(rows) or '{0, 0, false}'}}};\n"
        return f"{head}constexpr int LINE_SUMS = {len(sums)};\n{table}"

    def know(self, phase: int) -> str:
        """What is computed of lines before the pass of a phase: passes over them, and means over
        rows between these."""
        known = self.graph.lines_known(phase)
        functions: list[str] = []
        calls: list[str] = []
        for stage in sorted({self.values[node].stage for node in known}):
            here = [node for node in known if self.values[node].stage == stage]
            for node in here:
                if node.target is mean_of_rows:
                    of, to = (self.graph.slots[n] for n in (*node.all_input_nodes, node))
                    calls.append(f"  mean_of_rows(lines, lines.at({of}), lines.at({to}));")
            for axis in AXES:
                own = [
                    node
                    for node in here
                    if self.values[node].axis == axis and node.target is not mean_of_rows
                ]
                if own:
                    one = LinePass(self.graph, self.expressions, self.memory, phase, own)
                    functions.append(one.text(len(functions)))
                    calls.append(f"  lines{phase}_{len(functions) - 1}(call, i, t, lines);")
        return "\n".join([*functions, _function(_KNOW.format(phase=phase), calls)])

    # Per tensor: float64 numbers in the array t.

    def begin(self, looks: list[fx.Node]) -> str:
        """What is known of a tensor before its first pass."""
        names = [*PER_TENSOR, *(f"factor{k}" for k in range(len(self.graph.factors)))]
        given = [
            (self.graph.inputs[name], f"call.given[{row} * call.tensors + i]")
            for row, name in enumerate(names)
        ]
        given += [
            (self.graph.inputs[slot.name], f"*{self.memory.address(slot.name)}")
            for slot in self.graph.variant.slots
            if slot.kind == "scalar"
        ]
        given += [(node, f"call.looked[{k} * call.tensors + i]") for k, node in enumerate(looks)]
        lines = [self.set(node, text) for node, text in given if node in self.number]
        return _function(_BEGIN, [*lines, *self.computed(1, known=looks)])

    def after(self, phase: int) -> str:
        """What is known of it after a pass; after the last, it is written."""
        sums = self.graph.sums_of(phase)
        lines = [self.set(node, f"sums[{k}]") for k, node in enumerate(sums)]
        lines += self.computed(phase + 1, known=sums)
        if phase == self.graph.last:
            lines += self.write_numbers()
        return _function(_AFTER.format(phase=phase), lines)

    def set(self, node: fx.Node, text: str) -> str:
        return f"  t[{self.number[node]}] = {text};"

    def computed(self, phase: int, known: list[fx.Node]) -> list[str]:
        return [
            self.set(node, self.expressions.of(node, Level.TENSOR))
            for node in self.graph.per_tensor(phase)
            if node.op != "placeholder" and node not in known
        ]

    def write_numbers(self) -> list[str]:
        lines = [
            f"  *{self.memory.address(name)} = t[{self.number[node]}];"
            for name, node in self.graph.outputs.items()
            if self.values[node].level == Level.TENSOR
        ]
        for row, node in enumerate(self.graph.report.values()):
            lines.append(f"  call.report[{row} * call.tensors + i] = t[{self.number[node]}];")
        return lines


_BEGIN = "static void begin(const Call& call, int64_t i, double* t)"
_AFTER = "static void after{phase}(const Call& call, int64_t i, double* t, const double* sums)"
_PASS = Pass.head
_KNOW = "static void know{phase}(const Call& call, int64_t i, const double* t, const Lines& lines)"


def _function(head: str, lines: list[str]) -> str:
    return "\n".join([head, "{", *lines, "}\n"])


def _switch(name: str, head: str, phases: Sequence[int]) -> str:
    """A function that leads to that of its phase."""
    parameters = head.split("(", 1)[1].rstrip(")").split(",")
    names = ", ".join(part.split()[-1].strip("*&") for part in parameters)
    lines = [f"    case {phase}: return {name}{phase}({names});" for phase in phases]
    whole = head.format(phase="").replace("(", "(int phase, ", 1)
    return _function(whole, ["  switch (phase) {", *lines, "  }"])
