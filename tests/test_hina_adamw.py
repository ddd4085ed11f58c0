"""HinaAdamW as a user meets it: arguments, reports, bad gradients, dtypes, the rest of torch."""

import inspect
import logging

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from library.custom_hina_adamw_optimizer import HinaAdamWOptimizer
from library.optim.engine import NonFiniteGradientError
from library.optim.telemetry import optimizer_report


def lokr_parameters(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    """A LoKr and a LoRA module and a plain weight, one of them large enough for 8-bit state."""
    torch.manual_seed(0)
    shapes = {
        "x.lokr_w1": (4, 4),
        "x.lokr_w2": (80, 60),
        "y.lora_down.weight": (4, 40),
        "y.lora_up.weight": (30, 4),
        "z.weight": (5, 7),
    }
    return {name: nn.Parameter(torch.randn(shape).to(dtype)) for name, shape in shapes.items()}


def set_gradients(params: dict[str, nn.Parameter], seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in params.values():
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype) * 0.01


def snapshot(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    state = [v for p in params for v in optimizer.state[p].values() if isinstance(v, Tensor)]
    return [tensor.detach().clone() for tensor in (*params, *state)]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def test_defaults_are_the_specified_ones():
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(HinaAdamWOptimizer).parameters.items()
        if name != "params"
    }
    assert defaults == {
        "lr": 1e-3,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": 1e-2,
        "use_orthogonal_grad": False,
        "use_agr": True,
        "use_adopt_stability": True,
        "use_tam": True,
        "tam_beta": 0.999,
        "use_grams": True,
        "use_cautious": True,
        "use_alora": True,
        "alora_ratio": 21.0,
        "dynamic_weight_decay": True,
        "wd_transition_steps": 1000,
        "wd_decay_factor": 0.7,
        "wd_min_ratio": 0.1,
        "use_spd": True,
        "spd_lambda": 0.06,
        "spd_anchor": "auto",
        "optim_bits": 8,
        "min_8bit_size": 4096,
        "bf16_rounding": "stochastic",
        "nonfinite": "raise",
        "backend": "auto",
    }
    assert set(HinaAdamWOptimizer.RULES) == set(defaults)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("lr", float("nan")),
        ("lr", float("inf")),
        ("lr", -1e-3),
        ("betas", (0.9, 1.0)),
        ("betas", (-0.1, 0.9)),
        ("betas", (0.9,)),
        ("eps", -1e-8),
        ("eps", 0),
        ("eps", 1e-50),  # zero in float32
        ("weight_decay", -0.1),
        ("tam_beta", 1.0),
        ("use_agr", "yes"),
        ("alora_ratio", 0),
        ("wd_transition_steps", 0),
        ("wd_decay_factor", 1.5),
        ("spd_anchor", "nowhere"),
        ("optim_bits", 16),
        ("min_8bit_size", 2.5),
        ("bf16_rounding", "up"),
        ("nonfinite", "ignore"),
        ("backend", "fast"),
    ],
)
def test_impossible_values_are_named(argument, value):
    with pytest.raises(ValueError, match=argument):
        HinaAdamWOptimizer(lokr_parameters().items(), **{argument: value})


def test_impossible_values_of_a_group_are_named():
    with pytest.raises(ValueError, match="betas"):
        HinaAdamWOptimizer([{"params": list(lokr_parameters().items()), "betas": (0.9, 2)}])
    optimizer = HinaAdamWOptimizer(lokr_parameters().items())
    with pytest.raises(ValueError, match="lr"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "lr": float("nan")})


def test_the_smallest_eps_divides_zero_gradients():
    """A new LoRA's gradients are zero, and so is the padding: 0/max(√0, ε) must stay 0."""
    params = lokr_parameters()
    tiny = torch.finfo(torch.float32).tiny
    for switches in ({}, {"use_adopt_stability": False}):
        optimizer = HinaAdamWOptimizer(params.items(), eps=tiny, **switches)
        for _ in range(3):
            set_gradients(params)
            params["y.lora_down.weight"].grad.zero_()
            optimizer.step()
        assert all(p.isfinite().all() for p in params.values())


def test_a_learning_rate_that_becomes_nan_is_an_error():
    params = lokr_parameters()
    optimizer = HinaAdamWOptimizer(params.items())
    set_gradients(params)
    optimizer.param_groups[0]["lr"] = float("nan")
    with pytest.raises(ValueError, match="learning rate of parameter group 0 is nan"):
        optimizer.step()


def test_the_info_has_its_keys_and_counts():
    info = HinaAdamWOptimizer(lokr_parameters().items(), use_grams=False).get_optimization_info()
    assert set(info) == {"optimizer_type", "total_params", "features", "lora_stats", "lokr_stats"}
    assert info["optimizer_type"] == "HinaAdamWOptimizer"
    assert info["total_params"] == 5
    assert info["features"]["use_grams"] is False
    assert info["features"]["use_tam"] is True
    assert info["lora_stats"] == {"lora_a_params": 1, "lora_b_params": 1, "lora_pairs": 1}
    assert info["lokr_stats"] == {
        "lokr_w1_params": 1,
        "lokr_w2_params": 1,
        "lokr_pairs": 1,
        "lokr_groups": 1,
        "w_norm_params": 0,
        "b_norm_params": 0,
        "norm_pairs": 0,
    }


def test_two_facts_are_told_once(caplog):
    caplog.set_level(logging.INFO)
    HinaAdamWOptimizer(lokr_parameters().items())
    assert caplog.text.count("use_cautious masks nothing") == 1
    assert caplog.text.count("near identity on large tensors") == 1
    caplog.clear()
    HinaAdamWOptimizer(lokr_parameters().items(), use_grams=False, use_agr=False)
    assert caplog.text == ""


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_gradient_raises_and_leaves_every_byte(value):
    params = lokr_parameters()
    optimizer = HinaAdamWOptimizer(params.items())
    for seed in range(3):
        set_gradients(params, seed)
        optimizer.step()
    before = snapshot(optimizer)
    params["x.lokr_w2"].grad[3, 5] = value
    with pytest.raises(NonFiniteGradientError, match=r"gradient of x\.lokr_w2\. "):
        optimizer.step()
    assert same(snapshot(optimizer), before)


def test_a_non_finite_gradient_on_the_first_step_leaves_no_state():
    params = lokr_parameters()
    optimizer = HinaAdamWOptimizer(params.items())
    set_gradients(params)
    params["z.weight"].grad[0] = float("nan")
    with pytest.raises(NonFiniteGradientError, match=r"z\.weight"):
        optimizer.step()
    assert not optimizer.state


def test_skipped_steps_are_counted():
    params = lokr_parameters()
    optimizer = HinaAdamWOptimizer(params.items(), nonfinite="skip")
    set_gradients(params)
    optimizer.step()
    before = snapshot(optimizer)
    params["x.lokr_w1"].grad[0, 0] = float("inf")
    optimizer.step()
    assert same(snapshot(optimizer), before)
    assert optimizer.get_optimization_info()["features"]["nonfinite_skipped_steps"] == 1


def test_sparse_and_complex_tensors_are_refused():
    embedding = nn.Embedding(10, 4, sparse=True)
    optimizer = HinaAdamWOptimizer(embedding.named_parameters())
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse gradients; weight has one"):
        optimizer.step()
    with pytest.raises(ValueError, match="complex64"):
        HinaAdamWOptimizer([("c", nn.Parameter(torch.zeros(3, dtype=torch.complex64)))])


class Synchronisations(TorchDispatchMode):
    """Counts reads of a tensor's value by Python."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("backend", "reads"), [("compiled", 0), ("eager", 1)])
def test_a_step_reads_no_values_but_to_check_gradients(backend, reads):
    params = lokr_parameters(torch.bfloat16)
    optimizer = HinaAdamWOptimizer(params.items(), use_orthogonal_grad=True, backend=backend)
    for seed in range(3):
        set_gradients(params, seed)
        with Synchronisations() as seen:
            optimizer.step()
        assert seen.count == reads


def test_parameters_without_gradient_stay_as_they_are():
    params = lokr_parameters()
    optimizer = HinaAdamWOptimizer(params.items())
    set_gradients(params)
    params["y.lora_up.weight"].grad = None
    kept = params["y.lora_up.weight"].detach().clone()
    for _ in range(2):
        optimizer.step()
    assert torch.equal(params["y.lora_up.weight"], kept)
    assert params["y.lora_up.weight"] not in optimizer.state
    set_gradients(params)
    optimizer.step()
    assert optimizer.state[params["y.lora_up.weight"]]["step"] == 1
    assert optimizer.state[params["z.weight"]]["step"] == 3
    optimizer.zero_grad()
    optimizer.step()  # nothing to do


def test_looking_at_the_state_before_a_step_does_no_harm():
    params = lokr_parameters()
    optimizer = HinaAdamWOptimizer(params.items())
    assert optimizer.state[params["z.weight"]] == {}
    set_gradients(params)
    optimizer.step()
    assert optimizer.state[params["z.weight"]]["step"] == 1


def test_gradients_are_not_changed():
    params = lokr_parameters()
    optimizer = HinaAdamWOptimizer(params.items(), use_orthogonal_grad=True)
    set_gradients(params)
    before = [p.grad.clone() for p in params.values()]
    for _ in range(3):
        optimizer.step()
    assert same([p.grad for p in params.values()], before)


def test_closure_scheduler_and_later_group():
    params = lokr_parameters()
    optimizer = HinaAdamWOptimizer(params.items(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    target = nn.Parameter(torch.ones(3, 3))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = sum((p**2).sum() for group in optimizer.param_groups for p in group["params"])
        loss.backward()
        return loss

    losses = []
    for step in range(8):
        if step == 4:
            optimizer.add_param_group({"params": [target], "named": ["late.w_norm"], "lr": 1e-2})
        losses.append(optimizer.step(closure).item())
        schedule.step() if step < 4 else None
    assert losses[3] < losses[0]
    assert losses[7] < losses[4]
    assert optimizer.param_groups[0]["lr"] < 1e-2
    assert optimizer.roles.role[target] == "w_norm"
    assert optimizer.state[target]["step"] == 4


def test_dtypes_and_strides_mix():
    torch.manual_seed(0)
    params = {
        "half": nn.Parameter(torch.randn(9, 5, dtype=torch.float16)),
        "bfloat": nn.Parameter(torch.randn(9, 5, dtype=torch.bfloat16)),
        "float": nn.Parameter(torch.randn(9, 5)),
        "double": nn.Parameter(torch.randn(9, 5, dtype=torch.float64)),
        "strided": nn.Parameter(torch.randn(4, 6, 3, 3).to(memory_format=torch.channels_last)),
        "empty": nn.Parameter(torch.empty(0, 3)),
    }
    optimizer = HinaAdamWOptimizer(params.items(), min_8bit_size=40)
    start = {name: p.detach().clone() for name, p in params.items()}
    for seed in range(4):
        set_gradients(params, seed)
        optimizer.step()
    for name, p in params.items():
        assert p.dtype == start[name].dtype
        assert p.stride() == start[name].stride()
        assert p.isfinite().all()
        assert name == "empty" or not torch.equal(p, start[name])


def test_moved_parameters_go_on():
    model = nn.Linear(6, 6)
    optimizer = HinaAdamWOptimizer(model.named_parameters(), optim_bits=32)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        model.to(dtype)
        model(torch.ones(2, 6, dtype=dtype)).sum().backward()
        optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())
    assert optimizer.state[model.weight]["step"] == 3


def test_float64_parameters_are_updated_in_float64():
    p = nn.Parameter(torch.ones(3, dtype=torch.float64))
    options = {"weight_decay": 1e-12, "lr": 1.0, "use_spd": False}
    optimizer = HinaAdamWOptimizer([("x.weight", p)], **options)
    for _ in range(2):
        p.grad = torch.zeros(3, dtype=torch.float64)
        optimizer.step()
    assert p[0].item() == 1 - 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_decay_acts_on_low_precision(dtype):
    """lr·wd = 1e-5 is far below the spacing of the numbers: rounded to nearest it does nothing."""
    shrunk = {}
    for rounding in ("stochastic", "nearest"):
        p = nn.Parameter(torch.ones(4000, dtype=dtype))
        optimizer = HinaAdamWOptimizer([("x.weight", p)], use_spd=False, bf16_rounding=rounding)
        p.grad = torch.zeros_like(p)
        for _ in range(101):  # the first step of ADOPT only looks
            optimizer.step()
        shrunk[rounding] = 1 - p.float().mean().item()
    assert shrunk["nearest"] == 0
    assert shrunk["stochastic"] == pytest.approx(1 - (1 - 1e-5) ** 100, rel=0.1)


def bytes_held(optimizer: torch.optim.Optimizer) -> int:
    """The memory that the state keeps alive, and that `torch.save` writes: whole storages, of which
    a tensor may be only a part."""
    tensors = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def test_state_is_small():
    p = nn.Parameter(torch.randn(16, 1280))
    optimizer = HinaAdamWOptimizer([("x.lora_down.weight", p)])
    p.grad = torch.randn_like(p)
    optimizer.step()
    assert bytes_held(optimizer) / p.numel() <= 2.2


def test_state_stays_small_where_gradients_are_missing():
    """As with module dropout: what a parameter keeps from an earlier step is its own alone, and not
    padded to whole blocks, which would take 2.4 bytes."""
    params = {f"m{i}.lora_down.weight": nn.Parameter(torch.randn(16, 40)) for i in range(12)}
    numel = sum(p.numel() for p in params.values())
    optimizer = HinaAdamWOptimizer(params.items(), min_8bit_size=300)
    for step in range(12):
        set_gradients(params, step)
        for p in list(params.values())[:step]:
            p.grad = None
        optimizer.step()
    assert bytes_held(optimizer) / numel <= 2.2
    wide = HinaAdamWOptimizer(params.items(), optim_bits=32)
    wide.step()
    optimizer.load_state_dict(wide.state_dict())
    assert bytes_held(optimizer) / numel <= 2.2
    wide.load_state_dict(optimizer.state_dict())
    assert bytes_held(wide) / numel <= 8.2


@pytest.mark.parametrize("switches", [{}, {"use_adopt_stability": False, "use_grams": False}])
def test_eight_bits_reach_the_same_minimum(switches):
    torch.manual_seed(0)
    target, scale = torch.randn(64, 80), torch.logspace(-2, 1, 80)
    final = {}
    for bits in (8, 32):
        p = nn.Parameter(torch.zeros(64, 80))
        optimizer = HinaAdamWOptimizer([("x.weight", p)], lr=3e-2, optim_bits=bits, **switches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)
        for step in range(100):
            noise = torch.randn(64, 80, generator=torch.Generator().manual_seed(step))
            p.grad = (p.detach() - target + 0.1 * noise) * scale
            optimizer.step()
            schedule.step()
        final[bits] = (p.detach() - target).square().mean().item()
    assert final[8] == pytest.approx(final[32], rel=0.05)


def test_pairs_scale_the_learning_rate_of_their_halves():
    params = lokr_parameters()
    optimizer = HinaAdamWOptimizer(params.items(), lr=0.1)
    set_gradients(params)
    a, b = params["y.lora_down.weight"].detach(), params["y.lora_up.weight"].detach()
    w1, w2 = params["x.lokr_w1"].detach(), params["x.lokr_w2"].detach()
    lora = 0.1 / (1 + (b @ a).norm(dim=1).mean().item())
    lokr = 0.1 / (1 + 0.3 * torch.kron(w1, w2).norm().item())
    optimizer.step()
    report = optimizer_report(optimizer)
    assert report["effective_lr/lora_a"] == pytest.approx(lora, rel=1e-5)
    assert report["effective_lr/lora_b"] == pytest.approx(lora * 21, rel=1e-5)
    assert report["effective_lr/lokr_w1"] == pytest.approx(lokr, rel=1e-5)
    assert report["effective_lr/lokr_w2"] == pytest.approx(lokr * 0.6 * 21, rel=1e-5)
    assert report["effective_lr/regular"] == pytest.approx(0.1)


def test_report():
    params = lokr_parameters()
    optimizer = HinaAdamWOptimizer(params.items(), wd_transition_steps=2, use_grams=False)
    assert optimizer_report(optimizer) == {}
    for seed in range(4):
        set_gradients(params, seed)
        optimizer.step()
    report = optimizer_report(optimizer)
    assert report["weight_decay/regular"] == pytest.approx(0.01)
    assert report["weight_decay/lora_b"] == pytest.approx(0.01 * 0.7)
    assert report["weight_decay/lokr_w1"] == pytest.approx(0.01 * 0.7**0.7)
    assert -1 <= report["tam/alignment"] <= 1
    assert 0 < report["cautious/masked_share"] < 1
    assert all(isinstance(value, float) for value in report.values())
    assert optimizer_report(torch.optim.AdamW(params.values())) == {}


def test_accelerate_prepares_it():
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = nn.Linear(4, 4)
    model, optimizer = accelerator.prepare(model, HinaAdamWOptimizer(model.named_parameters()))
    before = model.weight.detach().clone()
    for _ in range(2):
        accelerator.backward(model(torch.ones(2, 4)).square().sum())
        optimizer.step()
    assert not torch.equal(model.weight, before)
    assert "effective_lr/regular" in optimizer_report(optimizer)


def test_it_learns_a_low_rank_map():
    torch.manual_seed(0)
    target = torch.randn(40, 3) @ torch.randn(3, 30) / 5
    down, up = nn.Parameter(torch.randn(4, 30) / 30**0.5), nn.Parameter(torch.zeros(40, 4))
    named = [("x.lora_down.weight", down), ("x.lora_up.weight", up)]
    optimizer = HinaAdamWOptimizer(named, lr=1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, 120)
    losses = []
    for _ in range(120):
        loss = (up @ down - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
