"""One pass over the blocks of a tensor in C++, written element by element.

What several passes need is computed again in each of them, because memory is slower than
arithmetic, but for what takes more than a few operations (`ChainGraph.kept`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from ..chain import Variant
from ..lines import AXES
from .expressions import Expressions
from .graph import ChainGraph, Level, block_max, draw, only, spread_lines

_TYPES = {
    torch.float64: "double",
    torch.float32: "float",
    torch.bfloat16: "bfloat",
    torch.int16: "int16_t",
    torch.int8: "int8_t",
    torch.uint8: "uint8_t",
}


class Memory:
    """Where a program finds parameters, gradients and state.

    Attributes:
        pointers: what it needs of each parameter beside the gradient, by name.
        quarters: those that hold two bits of each element, four elements to a byte.
    """

    def __init__(self, variant: Variant) -> None:
        self._dtypes = {"p": variant.dtype}
        self.quarters = {slot.high for slot in variant.slots if slot.kind == "packed"}
        for slot in variant.slots:
            self._dtypes[slot.name] = slot.stored(variant)
            if slot.coded:
                self._dtypes[slot.scale] = torch.float32
            if slot.kind == "packed":
                self._dtypes[slot.high] = torch.uint8
        self.pointers = tuple(self._dtypes)
        self._dtypes["grad"] = variant.dtype

    def type(self, name: str) -> str:
        """Of what type the numbers are."""
        return _TYPES[self._dtypes[name]]

    def address(self, name: str) -> str:
        """Where those of tensor i begin."""
        if name == "grad":
            return f"((const {self.type(name)}*)call.grads[i])"
        row = self.pointers.index(name)
        return f"(({self.type(name)}*)call.held[{row} * call.tensors + i])"


class Pass:
    """One pass: for each block, its loops over elements and what lies between them.

    Attributes:
        nodes: what it loads or computes, in order.
        sums, line_sums: what it sums up.
        loaded, stored: of the nodes, those that an earlier pass has left and those that are left
            for a later one, and where.
    """

    head = (
        "static void pass{phase}(const Call& call, int64_t i, int64_t first, int64_t last, "
        "const double* t, double* sums, float* kept, int64_t stride, const Lines& lines)"
    )
    length = "call.numel[i]"

    def __init__(
        self, graph: ChainGraph, expressions: Expressions, memory: Memory, phase: int
    ) -> None:
        self.graph, self.expressions, self.memory, self.phase = graph, expressions, memory, phase
        self.values, self.number = graph.values, expressions.number
        self.sums: list[fx.Node] = []
        self.line_sums: list[fx.Node] = []
        self.nodes: list[fx.Node] = []
        self.loaded: dict[fx.Node, str] = {}
        self.stored: dict[fx.Node, str] = {}
        self.choose()
        self.loop = self.loops()
        self.last_loop = max(self.loop.values(), default=0)

    def choose(self) -> None:
        """Decide what it loads, computes, sums up and leaves."""
        graph, phase = self.graph, self.phase
        self.nodes = graph.needed(phase)
        self.sums = graph.sums_of(phase)
        self.line_sums = graph.line_sums_of(phase)
        for k, (node, made) in enumerate(graph.kept.items()):
            where = f"kept + {k} * stride + at + j"
            if made < phase and node in self.nodes:
                self.loaded[node] = where
            elif made == phase:
                self.stored[node] = where

    def loops(self) -> dict[fx.Node, int]:
        """In which loop over the block's elements a node is computed, or before which a block's."""
        loop: dict[fx.Node, int] = {}
        for node in self.nodes:
            if self.is_loaded(node):
                loop[node] = 0
                continue
            before = [loop[arg] for arg in node.all_input_nodes if arg in loop]
            loop[node] = max(before, default=0) + (node.target is block_max)
        return loop

    def text(self) -> str:
        """The pass as a function of a tensor's blocks from `first` to `last`."""
        lines = [self.head.format(phase=self.phase), "{", *self.start()]
        lines += [f"  Sum sum{self.number[node]};" for node in self.sums]
        for node in self.numbers():
            lines.append(f"  const float s{self.number[node]} = (float)t[{self.number[node]}];")
        lines.append("  for (int64_t b = first; b < last; ++b) {")
        lines += ["    " + line for line in self.block()]
        lines.append("  }")
        for k, node in enumerate(self.sums):
            lines.append(f"  sums[{k}] = sum{self.number[node]}.total();")
        return "\n".join([*lines, *self.end(), "}\n"])

    def start(self) -> list[str]:
        """What the function does before its blocks."""
        return []

    def end(self) -> list[str]:
        """What it does behind them."""
        return []

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
        lines.append(f"const int n = (int)std::min<int64_t>(BLOCK, {self.length} - at);")
        lines += self.open_inputs()
        lines += self.prefetches()
        lines += self.spread_numbers()
        for term in self.line_terms():
            lines.append(f"alignas(64) float r{self.number[term]}[BLOCK];")
        handed = self.handed_on()
        lines += [f"{self.lanes(node)} a{self.number[node]}[BLOCK / LANES];" for node in handed]
        maxima = [node for node in self.nodes if node.target is block_max]
        lines += [f"V x{self.number[node]}{{}};" for node in maxima]
        lines += [f"V l{self.number[node]}{{}};" for node in self.sums]
        for loop in range(self.last_loop + 1):
            lines += self.block_values(loop)
            lines.append("for (int j = 0; j < BLOCK; j += LANES) {")
            lines += ["  " + line for line in self.one_loop(loop, handed)]
            lines.append("}")
        lines += [f"sum{self.number[node]}.add(l{self.number[node]});" for node in self.sums]
        for node in self.line_sums:
            axis, slot = self.axis_of(node), self.graph.line_sums.index(node)
            where = f"r{self.number[only(node)]}, lines.to[{slot}]"
            lines.append(f"add_lines({axis}, at, n, {where});")
        return lines + self.close_outputs()

    def axis_of(self, node: fx.Node) -> str:
        """The axis of what is summed or spread along lines."""
        return f"lines.axes[{AXES.index(node.args[1])}]"

    def spread_numbers(self) -> list[str]:
        """The numbers of lines that the block's elements need, one for each of these."""
        lines = []
        for node in self.nodes:
            if node.target is spread_lines:
                index, slot = self.number[node], self.graph.slots[node.all_input_nodes[0]]
                where = f"{self.axis_of(node)}, at, n, lines.at({slot}), e{index}_room"
                lines.append(f"alignas(64) float e{index}_room[BLOCK + LANES];")
                lines.append(f"const float* e{index} = spread_lines({where});")
        return lines

    def lanes(self, node: fx.Node) -> str:
        return "V" if self.values[node].kind == "real" else "I"

    def handed_on(self) -> list[fx.Node]:
        """Nodes that a later loop needs, in an array of the block's size; those that are one
        operation away from memory, or from what two of them come from, are computed again."""
        needed = [
            node
            for node in self.nodes
            if self.values[node].level == Level.ELEMENT
            and not self.is_loaded(node)
            and not self.is_near(node)
            and any(self.loop.get(user, 0) > self.loop[node] for user in self.users(node))
        ]
        origin = {node: self.origin(node) for node in needed}
        shared = {
            node for node in origin.values() if node and list(origin.values()).count(node) > 1
        }
        return [
            node
            for node in self.nodes
            if node in shared or (node in needed and origin[node] not in shared)
        ]

    def origin(self, node: fx.Node) -> fx.Node | None:
        """The one value of elements that a node is computed from, in the same loop."""
        of = [arg for arg in node.all_input_nodes if self.values[arg].level == Level.ELEMENT]
        same = len(of) == 1 and self.loop[of[0]] == self.loop[node] and not self.is_loaded(of[0])
        return of[0] if same else None

    def users(self, node: fx.Node) -> list[fx.Node]:
        return [user for user in node.users if user in self.loop and user.target is not block_max]

    def is_loaded(self, node: fx.Node) -> bool:
        from_memory = node.op == "placeholder" or node in self.loaded
        return from_memory or node.target in (draw, spread_lines)

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

    def written(self) -> list[str]:
        """The names of the outputs that it writes."""
        return self.graph.written(self.phase)

    def tensors_written(self) -> list[str]:
        return [
            name
            for name in self.written()
            if self.values[self.graph.outputs[name]].level == Level.ELEMENT
        ]

    def open_inputs(self) -> list[str]:
        """Where the block lies; a tensor's last block is brought to full length first."""
        lines = []
        written = self.tensors_written()
        for name in dict.fromkeys([*self.tensors_read(), *written]):
            kind = self.memory.type(name)
            if name in self.memory.quarters:
                lines.append(f"auto {name}_at = {self.memory.address(name)} + at / 4;")
                continue
            lines += [
                f"auto {name}_at = {self.memory.address(name)} + at;",
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
                    f"const float b{self.number[node]} = {self.memory.address(node.name)}[b];"
                )
            if node.target is draw:
                index = self.number[node]
                where = f"noise_of(call, i, b, {node.args[0]})"
                lines.append(f"const int32_t* d{index} = {where};")
        return lines

    def prefetches(self) -> list[str]:
        """The first pass asks the memory for what later ones load."""
        if self.phase != 1:
            return []
        read = self.tensors_read()
        return [
            f"prefetch({self.memory.address(name)} + at);"
            for name, node in self.graph.inputs.items()
            if name in self.memory.pointers
            and name not in (*read, *self.memory.quarters)
            and node in self.number
            and self.values[node].level == Level.ELEMENT
            and self.values[node].axis is None
        ]

    def close_outputs(self) -> list[str]:
        lines = []
        for name in self.tensors_written():
            size = f"n * sizeof({self.memory.type(name)})"
            to = f"{self.memory.address(name)} + at"
            lines.append(f"if (n < BLOCK) std::memcpy({to}, {name}_end, {size});")
        for name in self.written():
            node = self.graph.outputs[name]
            if self.values[node].level == Level.BLOCK:
                lines.append(f"{self.memory.address(name)}[b] = b{self.number[node]};")
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
                text = self.expressions.of(node, Level.BLOCK)
                lines.append(f"const float b{index} = {text};")
        return lines

    def one_loop(self, loop: int, handed: list[fx.Node]) -> list[str]:
        lines = []
        for node in self.used_in(loop, handed):
            index = self.number[node]
            if self.is_loaded(node) or (node in handed and self.loop[node] < loop):
                text = self.load(node, handed)
            else:
                text = self.expressions.of(node, Level.ELEMENT)
            lines.append(f"const {self.lanes(node)} v{index} = {text};")
        for node in handed:
            if self.loop[node] == loop:
                lines.append(f"a{self.number[node]}[j / LANES] = v{self.number[node]};")
        for node, where in self.stored.items():
            if self.loop.get(node) == loop:
                lines.append(f"store({where}, as<V>(v{self.number[node]}));")
        for node in self.maxima_in(loop):
            of = self.number[only(node)]
            lines.append(f"x{self.number[node]} = larger(x{self.number[node]}, v{of});")
        for node in self.sums_in(loop):
            term = self.expressions.argument(node.args[0], Level.ELEMENT, "real")
            lines.append(f"l{self.number[node]} += {term};")
        for node in self.line_terms():
            if self.loop[node] == loop:
                term = self.expressions.argument(node, Level.ELEMENT, "real")
                lines.append(f"store(r{self.number[node]} + j, {term});")
        for name in self.written_in(loop):
            lines.append(f"store({name}_at + j, v{self.number[self.graph.outputs[name]]});")
        return lines

    def maxima_in(self, loop: int) -> list[fx.Node]:
        return [n for n in self.nodes if n.target is block_max and self.loop[n] == loop + 1]

    def sums_in(self, loop: int) -> list[fx.Node]:
        return [n for n in self.sums if self.loop[only(n)] == loop]

    def line_terms(self) -> list[fx.Node]:
        """What is summed over lines, also where it is over several axes, once."""
        return list(dict.fromkeys(map(only, self.line_sums)))

    def written_in(self, loop: int) -> list[str]:
        return [name for name in self.tensors_written() if self.store_loop(name) == loop]

    def used_in(self, loop: int, handed: list[fx.Node]) -> list[fx.Node]:
        """What a loop loads or computes, in order."""
        used: set[fx.Node] = set()
        todo = [n for n in (*handed, *self.stored) if self.loop.get(n) == loop]
        todo += [node for node in self.line_terms() if self.loop[node] == loop]
        todo += map(only, (*self.maxima_in(loop), *self.sums_in(loop)))
        todo += [self.graph.outputs[name] for name in self.written_in(loop)]
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
            quarter = node.name in self.memory.quarters
            return f"load_quarter({node.name}_at, j)" if quarter else f"load({node.name}_at + j)"
        if node.target is draw:
            return f"load(d{self.number[node]} + j)"
        if node.target is spread_lines:
            return f"load(e{self.number[node]} + j)"
        if node in handed:
            return f"a{self.number[node]}[j / LANES]"
        return f"as<{self.lanes(node)}>(load({self.loaded[node]}))"

    def store_loop(self, name: str) -> int:
        """In which loop an output is written: not before the last that reads what lies there."""
        node = self.graph.outputs[name]
        readers = [user for user in self.graph.inputs[name].users if user in self.loop]
        again = [user for near in readers if self.is_near(near) for user in near.users]
        loops = [self.loop[user] for user in (*readers, *again) if user in self.loop]
        return max([self.loop[node], *loops])


class LookPass(Pass):
    """Phase 0, the look at gradients: sums over these alone, and whether all are finite."""

    head = (
        "static bool look(const Call& call, int64_t i, int64_t first, int64_t last, double* sums)"
    )

    def __init__(self, graph: ChainGraph, expressions: Expressions, memory: Memory) -> None:
        super().__init__(graph, expressions, memory, 0)
        self.grad = graph.inputs["grad"]

    def used_in(self, loop: int, handed: list[fx.Node]) -> list[fx.Node]:
        used = super().used_in(loop, handed)
        return used if self.grad in used else [self.grad, *used]

    def one_loop(self, loop: int, handed: list[fx.Node]) -> list[str]:
        index = self.number[self.grad]
        largest = f"largest = larger(largest, exponent_bits(v{index}));"
        return [*super().one_loop(loop, handed), largest]

    def start(self) -> list[str]:
        return ["  I largest{};"]

    def end(self) -> list[str]:
        return ["  return are_finite(largest);"]


class LinePass(Pass):
    """A pass over the lines of one axis, between two passes over elements."""

    head = (
        "static void lines{phase}_{turn}(const Call& call, int64_t i, const double* t, "
        "const Lines& lines)"
    )

    def __init__(
        self,
        graph: ChainGraph,
        expressions: Expressions,
        memory: Memory,
        phase: int,
        nodes: Sequence[fx.Node],
    ) -> None:
        self.own = set(nodes)
        self.axis = AXES.index(graph.values[nodes[0]].axis)
        self.length = f"lines.axes[{self.axis}].count"
        super().__init__(graph, expressions, memory, phase)

    def choose(self) -> None:
        graph = self.graph
        given = {arg for node in self.own for arg in node.all_input_nodes if graph.is_of_lines(arg)}
        self.nodes = [node for node in graph.nodes if node in self.own | given]
        for node in self.nodes:
            where = f"lines.at({graph.slots.get(node)}) + at + j"
            if node in self.own and node in graph.slots:
                self.stored[node] = where
            elif node in given - self.own and node.op != "placeholder" and node.target is not draw:
                self.loaded[node] = where

    def written(self) -> list[str]:
        return [name for name, node in self.graph.outputs.items() if node in self.own]

    def text(self, turn: int = 0) -> str:
        """The pass as a function, the `turn`-th of its phase."""
        lines = [self.head.format(phase=self.phase, turn=turn), "{"]
        for node in self.numbers():
            lines.append(f"  const float s{self.number[node]} = (float)t[{self.number[node]}];")
        lines.append(f"  for (int64_t b = 0; b * BLOCK < {self.length}; ++b) {{")
        lines += ["    " + line for line in self.block()]
        return "\n".join([*lines, "  }", "}\n"])
