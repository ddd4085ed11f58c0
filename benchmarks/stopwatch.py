"""Time and memory of an optimizer's steps, beside the reference's in the same rounds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from contenders import REFERENCE, Contender
from torch import Tensor
from torch.autograd import DeviceType
from torch.nn import Parameter
from torch.profiler import ProfilerActivity, profile
from workload import Workload


@dataclass(frozen=True)
class Plan:
    """How long to measure one optimizer: `rounds` at most, and no more than `seconds`, but `least`
    rounds if four times as long is enough for them; all after `warmup` steps that do not count."""

    warmup: int = 3
    rounds: int = 60
    least: int = 5
    seconds: float = 8.0


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of some measurements."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: list[float]) -> Spread:
        if len(values) == 1:
            return Spread(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return Spread(median, low, high)


@dataclass(frozen=True)
class Comparison:
    """One optimizer beside the reference. Times in milliseconds; `ratio` is of the two steps of
    one round; bytes are per parameter; kernels and copies are counted per step, on a GPU only."""

    ms: Spread
    reference_ms: Spread
    ratio: Spread
    rounds: int
    state_bytes: float
    held_bytes: float
    kernels: int | None
    copies: int | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Runner:
    """An optimizer on a copy of the parameters of its own."""

    def __init__(
        self,
        contender: Contender,
        workload: Workload,
        parameters: dict[str, Parameter] | None = None,
        **more: Any,
    ) -> None:
        self.workload = workload
        self.parameters = workload.new_parameters() if parameters is None else parameters
        self.optimizer = contender.build(self.parameters, **more)

    def step(self) -> float:
        """One step on new gradients; returns the milliseconds that the step alone took."""
        self.workload.new_gradients()
        self._synchronize()
        started = time.perf_counter()
        self.optimizer.step()
        self._synchronize()
        return 1000 * (time.perf_counter() - started)

    def _synchronize(self) -> None:
        if self.workload.device.type == "cuda":
            torch.cuda.synchronize(self.workload.device)

    def state_bytes(self) -> float:
        """Bytes per parameter of all tensors in the optimizer's `state`."""
        return self._bytes_in(self.optimizer.state)

    def held_bytes(self) -> float:
        """Bytes per parameter of all tensors that the optimizer holds from step to step: state,
        and what it keeps beside it in order to be fast."""
        return self._bytes_in(vars(self.optimizer))

    def _bytes_in(self, holder: object) -> float:
        storages = {
            storage.data_ptr(): storage.nbytes()
            for tensor in _tensors_in(holder, set())
            for storage in (tensor.untyped_storage(),)
        }
        for name, parameter in self.parameters.items():
            storages.pop(parameter.untyped_storage().data_ptr(), None)
            storages.pop(self.workload.gradients[name].untyped_storage().data_ptr(), None)
        return sum(storages.values()) / self.workload.parameters

    def count_launches(self) -> tuple[int | None, int | None]:
        """Kernels, and copies or fills, that one step launches on the GPU; None without one."""
        if self.workload.device.type != "cuda":
            return None, None
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            self.step_on_same_gradients()
        launched = [
            event.name
            for event in profiler.events() or ()
            if event.device_type == DeviceType.CUDA and not event.is_user_annotation
        ]
        copies = sum(name.startswith(("Memcpy", "Memset")) for name in launched)
        return len(launched) - copies, copies

    def step_on_same_gradients(self) -> None:
        """A step and nothing else, for what watches the process or the device meanwhile."""
        self._synchronize()
        self.optimizer.step()
        self._synchronize()


def compare(contender: Contender, reference: Runner, workload: Workload, plan: Plan) -> Comparison:
    """Measure an optimizer step by step in turn with the reference, which is warm already.

    The two swap places from round to round: neither always finds the other's traces in the caches.
    """
    runner = Runner(contender, workload)
    for _ in range(plan.warmup):
        runner.step()
    times: list[float] = []
    reference_times: list[float] = []
    started = time.perf_counter()
    while len(times) < plan.rounds:
        patience = plan.seconds * (1 if len(times) >= plan.least else 4)
        if times and time.perf_counter() - started > patience:
            break
        if len(times) % 2:
            times.append(runner.step())
            reference_times.append(reference.step())
        else:
            reference_times.append(reference.step())
            times.append(runner.step())
    kernels, copies = runner.count_launches()
    return Comparison(
        ms=Spread.of(times),
        reference_ms=Spread.of(reference_times),
        ratio=Spread.of([a / b for a, b in zip(times, reference_times, strict=True)]),
        rounds=len(times),
        state_bytes=runner.state_bytes(),
        held_bytes=runner.held_bytes(),
        kernels=kernels,
        copies=copies,
    )


def warm_reference(workload: Workload, plan: Plan) -> Runner:
    """The optimizer that all others are compared with."""
    runner = Runner(REFERENCE, workload)
    for _ in range(plan.warmup):
        runner.step()
    return runner


_NO_HOLDER = (type, ModuleType, FunctionType, MethodType, BuiltinFunctionType, torch.device)


def _tensors_in(value: object, seen: set[int]) -> Iterator[Tensor]:
    """All tensors that can be reached through containers and attributes, each once."""
    if id(value) in seen or isinstance(value, _NO_HOLDER):
        return
    seen.add(id(value))
    inside: list[object] = []
    if isinstance(value, Tensor) and hasattr(value, "__tensor_flatten__"):  # made of others
        inside = [getattr(value, name) for name in value.__tensor_flatten__()[0]]
    elif isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        inside = [*value.keys(), *value.values()]
    elif isinstance(value, (list, tuple, set, frozenset)):
        inside = list(value)
    else:
        slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
        inside = [getattr(value, name) for name in slots if hasattr(value, name)]
        inside.append(getattr(value, "__dict__", None))
    for one in inside:
        yield from _tensors_in(one, seen)
