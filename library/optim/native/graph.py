"""A chain of techniques as a graph, and in which order a program has to go through it.

The chain is run once on symbols (`torch.fx`). That gives a graph of elementwise operations, sums
over tensors and over their lines, and maxima over blocks. Sums divide it into phases: what depends
on a sum can only be known in a later pass over the tensor. Maxima divide a pass in the same way
into loops over the block's elements. What is known of lines (rows, columns, filters) is computed
between passes, by short passes over these (`passes.LinePass`).

Phase 0 is the look at the gradients of all tensors, before anything moves: it has to be made for
their finiteness, and sums over gradients alone cost nothing more there. All else begins in phase 1.
"""

from __future__ import annotations

import linecache
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from ..chain import PER_TENSOR, Variant, advance
from ..lines import Axis
from ..techniques import base as techniques
from ..techniques.base import Technique


class Level(IntEnum):
    """What a value is one of: the program, a tensor, a block or an element. The lines of a tensor
    are numbers one after the other like its elements, and have blocks like these: of a value's
    `axis` it depends which are meant."""

    PROGRAM = 0
    TENSOR = 1
    BLOCK = 2
    ELEMENT = 3


# Stand-ins for what the layout does: the graph names them, the program has its own way.
def tensor_sum(matrix: Any) -> Any: ...
def spread(per_tensor: Any) -> Any: ...
def line_sum(matrix: Any, axis: Any) -> Any: ...
def line_mean(matrix: Any, axis: Any) -> Any: ...
def spread_lines(lines: Any, axis: Any) -> Any: ...
def to_lines(per_tensor: Any, axis: Any) -> Any: ...
def mean_of_rows(rows: Any) -> Any: ...
def block_max(matrix: Any) -> Any: ...
def draw(number: Any, axis: Any) -> Any: ...


LINE_SUMS = (line_sum, line_mean)
_SUMS = (tensor_sum, *LINE_SUMS)

_ALIASES = {"div": "truediv", "divide": "truediv", "max": "maximum", "min": "minimum"}
COMPARISONS = {"gt", "lt", "ge", "le", "eq", "ne"}
_ARITHMETIC = {"add", "sub", "mul", "neg", "abs", "square", "pow", "maximum", "minimum"}
_COSTLY = {"truediv", "sqrt", "rsqrt", "reciprocal", "exp", "sigmoid", "pow"}
_WORTH_KEEPING = 9  # operations


def name_of(node: fx.Node) -> str:
    """The operation's name, however it was called: operator, function or method."""
    name = node.target if isinstance(node.target, str) else node.target.__name__
    return _ALIASES.get(name, name)


class _Tracer(fx.proxy.GraphAppendingTracer):
    """Notes of each node which line of a technique made it."""

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        frame = sys._getframe(1)
        while frame.f_back and frame.f_code.co_filename.startswith(_NO_TECHNIQUES):
            frame = frame.f_back
        node.meta["line"] = (frame.f_code.co_filename, frame.f_lineno)
        return node


_NO_TECHNIQUES = (__file__, techniques.__file__, str(Path(torch.__file__).parent))


def line_of(node: fx.Node) -> str:
    """The line of Python that made a node; of an input, its name."""
    if node.op == "placeholder":
        return node.name
    file, number = node.meta["line"]
    return f"{Path(file).name}, line {number}: {linecache.getline(file, number).strip()}"


def only(node: fx.Node) -> fx.Node:
    """The one argument of a sum or a maximum."""
    if len(node.all_input_nodes) != 1:
        raise UntranslatableError(f"This is a sum of nothing that is known: {line_of(node)}.")
    return node.all_input_nodes[0]


def number_kind(value: Any) -> str:
    if isinstance(value, bool):
        return "truth"
    return "int" if isinstance(value, int) else "real"


class UntranslatableError(RuntimeError):
    """A technique has a line that cannot be translated; the message tells which and what to do."""


@dataclass
class Value:
    """What is known of a node: what it is one of, whether real, int or truth, in which phase it can
    be known, and whether it is a per-tensor quantity that was spread to meet matrices or lines.

    Attributes:
        axis: of which lines it is, or was spread to meet; None where it is of elements.
        stage: of what is known of lines, how many means over rows lie before it in its phase.
    """

    level: Level
    kind: str
    phase: int = 0
    is_spread: bool = False
    axis: Axis | None = None
    stage: int = 0


class ChainGraph:
    """The graph of a chain for one variant of tensors.

    Attributes:
        nodes: those that outputs depend on, each behind its arguments.
        values: what is known of them.
        inputs: the nodes that are given, by name.
        outputs: the nodes that are written, by the name of what is held, and `p`.
        report: the nodes that are reported per tensor.
        factors: the techniques that ask for a factor, in the order of the inputs `factor0`, ….
        last: the last phase, in which at the latest everything is written; the first is 1.
        write_in: the pass that writes each output of elements or blocks.
        slots: of what is known of lines, where it is kept until the tensor's step is over.
        kept: nodes that several passes need and that cost more to compute again than to load, and
            the pass that makes them.
    """

    def __init__(self, variant: Variant) -> None:
        self.variant = variant
        self.values: dict[fx.Node, Value] = {}
        self.inputs: dict[str, fx.Node] = {}
        self.factors: list[Technique] = []
        self._graph = fx.Graph()
        self._tracer = _Tracer(self._graph)
        self._run()
        needed = self._behind([*self.outputs.values(), *self.report.values(), self.inputs["grad"]])
        self.nodes = [node for node in self._graph.nodes if node in needed]
        for node in self.nodes:
            if node not in self.values:
                self.values[node] = self._value_of(node)
        self._check_outputs()
        self.sums = [node for node in self.nodes if node.target is tensor_sum]
        self.line_sums = [node for node in self.nodes if node.target in LINE_SUMS]
        terms = map(only, (*self.sums, *self.line_sums))
        elements = [node for node in self.outputs.values() if self.is_of_elements(node)]
        self.last = max([1, *(self.values[node].phase for node in (*elements, *terms))])
        self.kept: dict[fx.Node, int] = {}
        self.write_in = {
            name: self.last for name, node in self.outputs.items() if self.is_of_elements(node)
        }
        self._delay_sums()
        self._count_stages()
        self.slots = self._give_slots()
        self._write_early()
        self._keep_costly()

    def is_of_elements(self, node: fx.Node) -> bool:
        """Whether a pass over a tensor's elements computes a node, for these or their blocks."""
        value = self.values[node]
        return value.level > Level.TENSOR and value.axis is None

    def is_of_lines(self, node: fx.Node) -> bool:
        """Whether it is known of lines or of blocks of these."""
        value = self.values[node]
        return value.level > Level.TENSOR and value.axis is not None

    def roots(self, phase: int) -> list[fx.Node]:
        """What the pass of a phase is made for: terms of sums, outputs, and nodes to keep."""
        looked_at = [] if phase else [self.inputs["grad"]]
        terms = [only(node) for node in (*self.sums_of(phase), *self.line_sums_of(phase))]
        written = [self.outputs[name] for name in self.written(phase)]
        kept = [node for node, made in self.kept.items() if made == phase]
        return looked_at + terms + written + kept

    def sums_of(self, phase: int) -> list[fx.Node]:
        """The sums that the pass of a phase makes."""
        return [node for node in self.sums if self.values[node].phase == phase + 1]

    def line_sums_of(self, phase: int) -> list[fx.Node]:
        """The sums over lines that the pass of a phase makes."""
        return [node for node in self.line_sums if self.values[node].phase == phase + 1]

    def lines_known(self, phase: int) -> list[fx.Node]:
        """The nodes of lines, sums aside, that are computed before the pass of a phase, in order;
        behind the last pass for the phase after it."""
        return [
            node
            for node in self.nodes
            if self.is_of_lines(node)
            and self.values[node].phase == phase
            and node.op != "placeholder"
            and node.target not in LINE_SUMS
        ]

    def written(self, phase: int) -> list[str]:
        """The names of what the pass of a phase writes, of elements and blocks."""
        return [name for name, made in self.write_in.items() if made == phase]

    def needed(self, phase: int) -> list[fx.Node]:
        """The nodes of elements and blocks that the pass of a phase goes through, in order."""
        loaded = {node for node, made in self.kept.items() if made < phase}
        found = self._behind(self.roots(phase), stop=loaded)
        return [node for node in self.nodes if node in found and self.is_of_elements(node)]

    def is_of_codes(self, node: fx.Node) -> bool:
        """Whether a node of elements comes from state in 8 bits."""
        if self.values[node].axis is not None:
            return False
        coded = {self.inputs[slot.name] for slot in self.variant.slots if slot.coded}
        return not coded.isdisjoint(self._behind([node]))

    def per_tensor(self, phase: int) -> list[fx.Node]:
        """The nodes of tensors that can be known once `phase` passes are over, in order."""
        return [
            node
            for node in self.nodes
            if self.values[node].level == Level.TENSOR and self.values[node].phase == phase
        ]

    def _run(self) -> None:
        per_tensor = {name: self.given(name, Level.TENSOR) for name in PER_TENSOR}
        p, grad = self.given("p", Level.ELEMENT), self.given("grad", Level.ELEMENT, phase=0)
        held = {}
        # A pass over lines reads such state once and hands it on; it writes what it computes.
        floats = [slot for slot in self.variant.slots if slot.axis and not slot.coded]
        for slot in self.variant.slots:
            level = Level.TENSOR if slot.kind == "scalar" else Level.ELEMENT
            kind = "int" if slot.coded or slot.kind in ("whole", "byte", "packed") else "real"
            held[slot.name] = self.given(slot.name, level, kind, axis=slot.axis)
            if slot in floats:
                held[slot.name] = held[slot.name] * 1.0
            if slot.coded:
                held[slot.scale] = self.given(slot.scale, Level.BLOCK, axis=slot.axis)
            if slot.kind == "packed":
                held[slot.high] = self.given(slot.high, Level.ELEMENT, "int")
        try:
            results: Any = advance(self.variant, held, p, grad, per_tensor, _Factors(self), self)
        except (fx.proxy.TraceError, TypeError) as error:
            if isinstance(error, TypeError) and "Proxy" not in str(error):
                raise
            raise UntranslatableError(
                "A technique asks for a number before there is one, as `if`, `max(a, b)` and "
                "functions of `math` do. Use torch.where and the methods of tensors; what changes "
                "with the step belongs into `schedule` (docs/engine.md)."
            ) from error
        for node in self._graph.nodes:
            if name_of(node).endswith("_") and name_of(node) not in ("and_", "or_"):
                raise UntranslatableError(
                    f"A technique changes a tensor in place: {line_of(node)}."
                )
        new_p, after, report = results
        for name, value in report.items():
            if not isinstance(value, fx.Proxy):
                raise UntranslatableError(
                    f"A technique reports {value!r} as '{name}': a report is a per-tensor quantity."
                )
        for slot in floats:
            if slot.name in after and after[slot.name].node.target in (*LINE_SUMS, mean_of_rows):
                after[slot.name] = after[slot.name] * 1.0
        self.outputs = {"p": new_p.node} | {name: proxy.node for name, proxy in after.items()}
        self.report = {name: proxy.node for name, proxy in report.items()}

    def given(
        self,
        name: str,
        level: Level,
        kind: str = "real",
        phase: int = 1,
        axis: Axis | None = None,
    ) -> Any:
        """A symbol for an input."""
        node = self._graph.placeholder(name)
        self.inputs[name] = node
        self.values[node] = Value(level, kind, phase, axis=axis)
        return fx.Proxy(node, self._tracer)

    def _call(self, function: Any, *arguments: Any) -> Any:
        return self._tracer.create_proxy("call_function", function, arguments, {})

    # The layout, as techniques and codes see it.

    def sum(self, matrix: Tensor) -> Any:
        return self._call(tensor_sum, matrix)

    def spread(self, per_tensor: Tensor) -> Any:
        return self._call(spread, per_tensor)

    def line_sum(self, matrix: Tensor, axis: Axis) -> Any:
        return self._call(line_sum, matrix, axis)

    def line_mean(self, matrix: Tensor, axis: Axis) -> Any:
        return self._call(line_mean, matrix, axis)

    def spread_lines(self, lines: Tensor, axis: Axis) -> Any:
        return self._call(spread_lines, lines, axis)

    def to_lines(self, per_tensor: Tensor, axis: Axis) -> Any:
        return self._call(to_lines, per_tensor, axis)

    def mean_of_rows(self, rows: Tensor) -> Any:
        return self._call(mean_of_rows, rows)

    def largest(self, matrix: Tensor) -> Any:
        return self._call(block_max, matrix)

    def noise(self, number: int, axis: Axis | None = None) -> Any:
        return self._call(draw, number, axis)

    def _value_of(self, node: fx.Node) -> Value:
        known = [self.values[arg] for arg in node.all_input_nodes]
        self._check_levels(node, known)
        value = self._unspread_value_of(node, known)
        value.axis = self._axis_of(node, known)
        if node.target not in _SUMS:
            spreads = node.target in (spread, to_lines)
            value.is_spread = spreads or any(arg.is_spread for arg in known)
        return value

    def _axis_of(self, node: fx.Node, known: Sequence[Value]) -> Axis | None:
        """Of which lines a node is; None where it is of elements, or of the tensor."""
        if node.target in (spread, spread_lines, tensor_sum):
            return None
        if node.target in (*LINE_SUMS, to_lines, draw):
            given: Any = node.args[1]
            return given
        return next((value.axis for value in known if value.axis), None)

    def _check_outputs(self) -> None:
        """Refuse a matrix where a number for the tensor is kept or reported, and the other way.

        Raises:
            UntranslatableError: names it.
        """
        scalars = {slot.name for slot in self.variant.slots if slot.kind == "scalar"}
        axes = {name: slot.axis for slot in self.variant.slots for name in slot.names}
        for name, node in {**self.outputs, **self.report}.items():
            per_tensor = name in scalars or name in self.report
            axis = axes.get(name)
            value = self.values[node]
            if (value.level <= Level.TENSOR) != per_tensor or value.axis != axis:
                matrix = f"a quantity per {axis}" if axis else "a matrix"
                wanted = "a per-tensor quantity" if per_tensor else matrix
                raise UntranslatableError(f"'{name}' has to be {wanted}: {line_of(node)}.")

    def _check_levels(self, node: fx.Node, known: Sequence[Value]) -> None:
        """Refuse what only PyTorch's broadcasting would decide, or would decide otherwise.

        Raises:
            UntranslatableError: a per-tensor quantity meets a matrix, or is summed.
        """
        per_tensor = [value for value in known if value.level == Level.TENSOR]
        if node.target in _SUMS and per_tensor:
            raise UntranslatableError(
                f"A technique sums what is the same for all elements: {line_of(node)}. Multiply it "
                "by work.numel instead."
            )
        spreads = node.target in (spread, to_lines)
        if spreads and (known[0].level > Level.TENSOR or known[0].is_spread):
            raise UntranslatableError(
                f"work.{name_of(node)} is for per-tensor quantities; this is a matrix, or of "
                f"lines: {line_of(node)}."
            )
        mixed = any(value.is_spread or value.level > Level.TENSOR for value in known)
        if mixed and not spreads and not all(value.is_spread for value in per_tensor):
            raise UntranslatableError(
                f"A per-tensor quantity meets a matrix: {line_of(node)}. Use work.spread."
            )
        self._check_axes(node, {v.axis for v in known if v.is_spread or v.level > Level.TENSOR})

    def _check_axes(self, node: fx.Node, met: set[Axis | None]) -> None:
        """Refuse what is of elements and of lines, or of different lines, in one operation.

        Raises:
            UntranslatableError: names it.
        """
        if node.target in _SUMS and met != {None}:
            raise UntranslatableError(f"Only matrices can be summed: {line_of(node)}.")
        if node.target is spread_lines and met != {node.args[1]}:
            raise UntranslatableError(f"This is no quantity per {node.args[1]}: {line_of(node)}.")
        if node.target is mean_of_rows and met != {"row"}:
            raise UntranslatableError(f"This is no quantity per row: {line_of(node)}.")
        if len(met) > 1:
            raise UntranslatableError(
                f"A per-line quantity meets a matrix, or one of other lines: {line_of(node)}. Use "
                "work.spread_lines, and work.to_lines for what is per tensor."
            )

    def _unspread_value_of(self, node: fx.Node, known: Sequence[Value]) -> Value:
        level = max((value.level for value in known), default=Level.PROGRAM)
        phase = max((value.phase for value in known), default=0)
        name = name_of(node)
        if node.kwargs:
            raise UntranslatableError(f"Arguments have to be given by position: {line_of(node)}.")
        if node.target is tensor_sum:
            return Value(Level.TENSOR, "real", phase + 1)
        if node.target in LINE_SUMS:
            return Value(Level.ELEMENT, "real", max(phase, 1) + 1)
        if node.target is block_max:
            return Value(Level.BLOCK, "real", phase)
        if node.target is draw:
            return Value(Level.ELEMENT, "int", phase)
        if name in COMPARISONS:
            return Value(level, "truth", phase)
        if name in ("view", "to", "float", "int"):
            to = node.args[1] if len(node.args) > 1 else torch.float32
            if to not in (torch.float32, torch.int32):
                raise UntranslatableError(f"There is no type {to} here: {line_of(node)}.")
            return Value(level, "int" if name == "int" or to == torch.int32 else "real", phase)
        operands = node.args[1:] if name == "where" else node.args
        kinds = {
            self.values[arg].kind if isinstance(arg, fx.Node) else number_kind(arg)
            for arg in operands
        }
        kind = next(k for k in ("real", "int", "truth") if k in kinds)
        # A truth value counts as 0 or 1.
        counts = name == "truediv" or (kind == "truth" and name in _ARITHMETIC)
        return Value(level, "real" if counts else kind, phase)

    def _behind(
        self, roots: Iterable[fx.Node], stop: Iterable[fx.Node] | None = None
    ) -> set[fx.Node]:
        """The roots and all they depend on. With `stop`, only what a pass computes: not what lies
        behind those nodes, nor behind what is known per tensor or per line."""
        found: set[fx.Node] = set()
        ends, todo = set(stop or ()), list(roots)
        while todo:
            node = todo.pop()
            if node in found:
                continue
            found.add(node)
            known = stop is not None and not self.is_of_elements(node)
            if node not in ends and not known:
                todo.extend(node.all_input_nodes)
        return found

    def _delay_sums(self) -> None:
        """Move each sum to the last pass before it is used: there most of what it is a sum of is
        computed anyway. Sums over gradients alone stay in the look at these."""
        needed: dict[fx.Node, int] = {}
        for node in reversed(self.nodes):
            if self.is_of_elements(node) and node.target is not spread_lines:
                continue
            by = [
                self.values[user].phase
                if self.is_of_elements(user) and user.target is not spread_lines
                else needed[user]
                for user in node.users
                if user in self.values
            ]
            needed[node] = min([*by, self.last + 1])
        for node in self.nodes:
            value = self.values[node]
            if node.target in _SUMS:
                if self.values[only(node)].phase or node.target is not tensor_sum:
                    value.phase = needed[node]
            elif node.op == "placeholder":
                continue
            elif not self.is_of_elements(node) or node.target is spread_lines:
                value.phase = max((self.values[a].phase for a in node.all_input_nodes), default=0)
        for node in self.sums:
            if self.values[node].phase > 1:
                self._take_along(node)

    def _take_along(self, node: fx.Node) -> None:
        """Make a sum in the first pass that computes what it is a sum of for another reason."""
        value, term = self.values[node], only(node)
        last = value.phase
        for phase in range(max(1, self.values[term].phase), last - 1):
            value.phase = self.last + 2  # out of the way: not among the roots of any pass
            along = term.op != "placeholder" and term in self._behind(self.roots(phase), stop=())
            value.phase = phase + 1 if along else last
            if along:
                return

    def _count_stages(self) -> None:
        """Order what is computed of lines between two passes by the means over rows in it."""
        for node in self.nodes:
            if not self.is_of_lines(node) or node.op == "placeholder":
                continue
            value = self.values[node]
            before = [
                self.values[argument].stage
                for argument in node.all_input_nodes
                if self.values[argument].phase == value.phase
            ]
            value.stage = max(before, default=0) + (node.target is mean_of_rows)

    def _give_slots(self) -> dict[fx.Node, int]:
        """Places for what is known of lines and used beyond the pass over lines that makes it: sums
        first, in their order."""
        slots = {node: k for k, node in enumerate(self.line_sums)}
        for node in self.nodes:
            if not self.is_of_lines(node) or node.op == "placeholder" or node.target is draw:
                continue
            where = self._turn(node)
            apart = node.target is mean_of_rows or any(
                not self.is_of_lines(user)
                or self._turn(user) != where
                or user.target is mean_of_rows
                for user in node.users
                if user in self.values
            )
            if apart and self.values[node].level == Level.BLOCK:
                raise UntranslatableError(
                    f"The largest of a block is used behind a sum over lines: {line_of(node)}."
                )
            if apart:
                slots.setdefault(node, len(slots))
        return slots

    def _turn(self, node: fx.Node) -> tuple[int, int]:
        value = self.values[node]
        return value.phase, value.stage

    def _write_early(self) -> None:
        """Write each state in the pass that leaves least to keep between passes, of these in the
        first.

        What is written no longer has to be made again in later passes; but these cannot make again
        what came from its old value either, and need that kept.
        """
        for slot in self.variant.slots:
            names = [name for name in slot.names if name in self.write_in]
            if not names:
                continue
            first = max([1, *(self.values[self.outputs[name]].phase for name in names)])
            kept_before, before = self.kept, self.write_in
            choices = []
            for phase in range(first, self.last + 1):
                self.kept, self.write_in = dict(kept_before), before
                kept = self._kept_if_written(names, phase)
                if kept is None:
                    continue
                self.kept, self.write_in = dict(kept), before | dict.fromkeys(names, phase)
                self._keep_costly()
                choices.append((len(self.kept), phase, kept))
            _, phase, self.kept = min(choices, key=lambda choice: choice[:2])
            self.write_in = before | dict.fromkeys(names, phase)

    def _kept_if_written(self, names: list[str], written: int) -> dict[fx.Node, int] | None:
        """What has to be kept if these are written in some pass; None if that is not enough."""
        before = {self.inputs[name] for name in names}
        state = self.kept, self.write_in
        self.kept, self.write_in = dict(self.kept), dict(self.write_in)
        self.write_in.update(dict.fromkeys(names, written))
        later = range(written + 1, self.last + 1)
        for phase in later:
            needed = set(self.needed(phase))
            if not before.isdisjoint(needed):
                for node in self._frontier(needed, written):
                    if not before.isdisjoint(self._behind([node])):
                        self.kept.setdefault(node, written)
        possible = all(before.isdisjoint(self.needed(phase)) for phase in later)
        kept = self.kept
        self.kept, self.write_in = state
        return kept if possible else None

    def _frontier(self, needed: set[fx.Node], phase: int) -> list[fx.Node]:
        """Elements known in a phase that go into what is not."""
        return [
            node
            for node in needed
            if self.values[node].level == Level.ELEMENT
            and node.op != "placeholder"
            and node.target not in (draw, spread_lines)
            and self.values[node].phase <= phase
            and any(user in needed and self.values[user].phase > phase for user in node.users)
        ]

    def _keep_costly(self) -> None:
        """Keep what several passes need and is slower to compute again than to load."""
        passes = {phase: set(self.needed(phase)) for phase in range(1, self.last + 1)}
        cost: dict[fx.Node, int] = {}
        for node in self.nodes:
            if not self.is_of_elements(node) or self.values[node].level != Level.ELEMENT:
                continue
            needing = [phase for phase, some in passes.items() if node in some]
            cost[node] = 0 if node in self.kept else self._cost(node, cost)
            if len(needing) < 2 or cost[node] < _WORTH_KEEPING:
                continue
            if any(self._is_used_apart(node, passes, phase) for phase in needing[1:]):
                self.kept[node] = needing[0]
                cost[node] = 0

    def _cost(self, node: fx.Node, cost: dict[fx.Node, int]) -> int:
        """Operations to compute a node again, from what is loaded."""
        if node.op == "placeholder" or node.target in (draw, spread_lines):
            return 0
        own = 8 if name_of(node) in _COSTLY else 1
        return own + sum(cost.get(argument, 0) for argument in node.all_input_nodes)

    def _is_used_apart(self, node: fx.Node, passes: dict[int, set[fx.Node]], phase: int) -> bool:
        """Whether a later pass uses a node in more than the one way that an earlier pass did: else
        its user is the one to keep."""
        first = next(some for some in passes.values() if node in some)
        users = [user for user in node.users if user in passes[phase]]
        return len(users) > 1 or node in self.roots(phase) or any(u not in first for u in users)


class _Factors(dict[Technique, Any]):
    """A factor for each technique that asks for it."""

    def __init__(self, graph: ChainGraph) -> None:
        super().__init__()
        self._graph = graph

    def __missing__(self, technique: Technique) -> Any:
        if not technique.has_factor:
            raise UntranslatableError(
                f"{type(technique).__name__} asks for a factor, but has neither `schedule` nor "
                "`prepare`."
            )
        factors = self._graph.factors
        self[technique] = self._graph.given(f"factor{len(factors)}", Level.TENSOR)
        factors.append(technique)
        return self[technique]
