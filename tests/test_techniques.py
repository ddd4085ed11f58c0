"""Each technique alone, in float32, against a float64 reference written from its paper."""

import math
from functools import cache

import pytest
import torch
from optimizers import NOTHING_ON, each_backend
from torch import Tensor

from library.custom_hina_adamw_optimizer import HinaAdamWOptimizer
from library.optim.layout import layout_of
from library.optim.products import lokr_norms, lora_row_norms
from library.optim.roles import Roles
from library.optim.techniques.spd import anchor_for
from library.optim.techniques.weight_decay import DynamicWeightDecay

SHAPES = {
    "scalar": (),
    "one": (1,),
    "bias": (7,),
    "matrix": (16, 24),
    "conv": (6, 5, 3, 3),
    "big": (130, 70),
    "down.lora_down.weight": (4, 30),
    "down.lora_up.weight": (50, 4),
    "alone.lora_down.weight": (4, 9),
    "kron.lokr_w1": (5, 6),
    "kron.lokr_w2_a": (12, 3),
    "kron.lokr_w2_b": (3, 40),
}
LR, BETAS, EPS, DECAY = 1e-2, (0.9, 0.99), 1e-8, 0.05
STEPS, TRANSITION, FACTOR, MIN_RATIO = 50, 10, 0.7, 0.1
TAM_BETA, SPD_LAMBDA, RATIO = 0.9, 0.3, 21.0


def initial_parameters() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def gradients(step: int) -> dict[str, Tensor]:
    """A slowly turning direction and noise, so that momentum agrees with most of it."""
    steady, noise = torch.Generator().manual_seed(1), torch.Generator().manual_seed(100 + step)
    return {
        name: 0.01 * torch.randn(shape, generator=steady) * math.cos(step / 20)
        + 0.02 * torch.randn(shape, generator=noise)
        for name, shape in SHAPES.items()
    }


def family(name: str) -> str:
    return "lora" if "lora_" in name else "lokr" if "lokr_" in name else "other"


class Reference:
    """The papers' equations in float64, tensor by tensor, in the order of the chain."""

    def __init__(self, on: dict[str, bool]) -> None:
        self.on = {**NOTHING_ON, **on}
        self.p = {name: p.double() for name, p in initial_parameters().items()}
        self.start = {name: p.clone() for name, p in self.p.items()}
        self.m = {name: torch.zeros_like(p) for name, p in self.p.items()}
        self.v = {name: torch.zeros_like(p) for name, p in self.p.items()}
        self.s = dict.fromkeys(self.p, 0.0)

    def run(self) -> dict[str, Tensor]:
        for t in range(1, STEPS + 1):
            lrs = self.learning_rates()
            for name, g in gradients(t).items():
                self.update(name, g.double(), t, lrs[name])
        return self.p

    def learning_rates(self) -> dict[str, float]:
        factor = dict.fromkeys(self.p, 1.0)
        if self.on["use_alora"]:
            a, b = self.p["down.lora_down.weight"], self.p["down.lora_up.weight"]
            scale = 1 / (1 + (b @ a).norm(dim=1).mean().item())
            factor["down.lora_down.weight"] = scale
            factor["down.lora_up.weight"] = scale * RATIO
            product = self.p["kron.lokr_w2_a"] @ self.p["kron.lokr_w2_b"]
            scale = 1 / (1 + 0.3 * torch.kron(self.p["kron.lokr_w1"], product).norm().item())
            factor["kron.lokr_w1"] = factor["kron.lokr_w2_a"] = scale
            factor["kron.lokr_w2_b"] = scale * 0.6 * RATIO
        return {name: LR * value for name, value in factor.items()}

    def update(self, name: str, grad: Tensor, t: int, lr: float) -> None:
        on, p, g, n = self.on, self.p[name], grad, grad.numel()
        if on["use_orthogonal_grad"] and n > 1:
            turned = g - (p * g).sum() / (p * p).sum() * p
            g = turned * g.norm() / turned.norm()
        if on["use_agr"] and n > 1:
            g = g * (1 - g.abs() / g.abs().sum())
        u, decays = self.direction(name, g, t)
        if on["use_grams"]:
            u = u.abs() * g.sign()
        if on["use_cautious"]:
            mask = (u * g > 0).double()
            u = u * mask * n / (mask.sum() + 1)
        decay = LR * DECAY * (self.decay_multiplier(family(name), t) if decays else 0)
        new = p - decay * p - lr * u
        if on["use_spd"]:
            origin = self.start[name] if family(name) == "other" else torch.zeros_like(p)
            if -(grad * (p - origin)).sum() < 0:
                after, before = (new - origin).norm(), (p - origin).norm()
                r = ((after - before) / after).clamp(0, 1)
                new = new - SPD_LAMBDA * r * (new - origin)
        self.p[name] = new

    def direction(self, name: str, g: Tensor, t: int) -> tuple[Tensor, bool]:
        beta1, beta2 = BETAS
        m, v = self.m[name], self.v[name]
        if self.on["use_adopt_stability"] and t == 1:
            self.v[name] = g**2
            return torch.zeros_like(g), False
        damping = 1.0
        if self.on["use_tam"]:
            both = m.norm() * g.norm()
            cosine = ((m * g).sum() / both).item() if both > 0 else 0.0
            self.s[name] = TAM_BETA * self.s[name] + (1 - TAM_BETA) * cosine
            damping = (1 + self.s[name]) / 2 + EPS
        self.v[name] = beta2 * v + (1 - beta2) * g**2
        if self.on["use_adopt_stability"]:
            clip = (t - 1) ** 0.25
            entering = (g / v.sqrt().clamp_min(EPS)).clamp(-clip, clip)
            self.m[name] = beta1 * m + (1 - beta1) * damping * entering
            return self.m[name], True
        self.m[name] = beta1 * m + (1 - beta1) * damping * g
        m_hat = self.m[name] / (1 - beta1**t)
        v_hat = self.v[name] / (1 - beta2**t)
        return m_hat / (v_hat.sqrt() + EPS), True

    def decay_multiplier(self, kind: str, t: int) -> float:
        if not self.on["dynamic_weight_decay"] or t <= TRANSITION or kind == "other":
            return 1.0
        q = (t - TRANSITION) / TRANSITION
        if kind == "lora":
            return max(MIN_RATIO, FACTOR ** min(q, 2))
        return max(1.5 * MIN_RATIO, (FACTOR**0.7) ** min(q, 1.5))


def train(on: dict[str, bool], steps: int = STEPS, **options) -> dict[str, Tensor]:
    params = {name: torch.nn.Parameter(p) for name, p in initial_parameters().items()}
    optimizer = HinaAdamWOptimizer(
        params.items(),
        lr=LR,
        betas=BETAS,
        eps=EPS,
        weight_decay=DECAY,
        tam_beta=TAM_BETA,
        spd_lambda=SPD_LAMBDA,
        alora_ratio=RATIO,
        wd_transition_steps=TRANSITION,
        wd_decay_factor=FACTOR,
        wd_min_ratio=MIN_RATIO,
        **{"optim_bits": 32, **NOTHING_ON, **on, **options},
    )
    for step in range(1, steps + 1):
        for name, g in gradients(step).items():
            params[name].grad = g
        optimizer.step()
    return {name: p.detach() for name, p in params.items()}


def distance(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Largest difference, in units of the largest entry of each tensor."""
    return max(
        (
            (ours[name].double() - theirs[name].double()).abs().max() / theirs[name].abs().max()
        ).item()
        for name in ours
    )


@cache
def plain_adam() -> dict[str, Tensor]:
    return Reference({}).run()


@each_backend
@pytest.mark.parametrize("switch", HinaAdamWOptimizer.SWITCHES)
def test_alone_follows_its_paper(backend, switch):
    reference = Reference({switch: True}).run()
    assert distance(train({switch: True}, backend=backend), reference) < 3e-6
    assert distance(reference, plain_adam()) > 1e-4  # the switch does something


@pytest.mark.parametrize("orthogonal", [False, True])
def test_all_together_follow_the_chain(orthogonal):
    on = {**dict.fromkeys(HinaAdamWOptimizer.SWITCHES, True), "use_orthogonal_grad": orthogonal}
    assert distance(train(on), Reference(on).run()) < 1e-5


def test_nothing_on_is_adamw():
    params = {name: torch.nn.Parameter(p) for name, p in initial_parameters().items()}
    adamw = torch.optim.AdamW(params.values(), lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY)
    for step in range(1, STEPS + 1):
        for name, g in gradients(step).items():
            params[name].grad = g
        adamw.step()
    assert distance(train({}), {name: p.detach() for name, p in params.items()}) < 2e-6


def test_cautious_masks_nothing_after_grams():
    both = train({"use_grams": True, "use_cautious": True})
    grams = train({"use_grams": True})
    # n/(n+1) is all that is left of the cautious factor: with large n the two agree.
    assert distance({"big": both["big"]}, {"big": grams["big"]}) < 1e-3


def test_zero_parameters_and_zero_gradients_stay_defined():
    on = dict.fromkeys(HinaAdamWOptimizer.SWITCHES, True)
    p = torch.nn.Parameter(torch.zeros(300))
    optimizer = HinaAdamWOptimizer([("x.lora_down.weight", p)], optim_bits=32, **on)
    for _ in range(3):
        p.grad = torch.zeros(300)
        optimizer.step()
    assert (p == 0).all()


def test_orthogonal_gradient_keeps_its_length_and_leaves_a_parallel_one_nothing():
    p = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    options = {**NOTHING_ON, "use_orthogonal_grad": True, "optim_bits": 32, "weight_decay": 0.0}
    optimizer = HinaAdamWOptimizer([("p", p)], **options)
    p.grad = torch.tensor([6.0, 8.0])  # parallel to p
    optimizer.step()
    assert optimizer.state[p]["exp_avg"].abs().max() == 0
    p.grad = torch.tensor([5.0, 0.0])
    optimizer.step()
    moment = optimizer.state[p]["exp_avg"] / 0.1
    assert moment.norm().item() == pytest.approx(5.0, rel=1e-5)
    assert torch.dot(moment, p.detach()).item() == pytest.approx(0.0, abs=0.1)


@pytest.mark.parametrize("switch", ["use_agr", "use_orthogonal_grad"])
def test_a_single_element_still_learns(switch):
    p = torch.nn.Parameter(torch.tensor(1.0))
    optimizer = HinaAdamWOptimizer([("scalar", p)], optim_bits=32, **{**NOTHING_ON, switch: True})
    p.grad = torch.tensor(0.5)
    optimizer.step()
    assert p.item() < 0.9995


def pairs_of(tensors: dict[str, Tensor]) -> Roles:
    names, params = zip(*tensors.items(), strict=True)
    return Roles([{"params": list(params), "param_names": list(names)}])


def test_row_norms_of_lora_products():
    torch.manual_seed(0)
    tensors = {
        "linear.lora_A.default.weight": torch.randn(4, 20),
        "linear.lora_B.default.weight": torch.randn(30, 4),
        "conv.lora_down.weight": torch.randn(4, 5, 3, 3),
        "conv.lora_up.weight": torch.randn(6, 4, 1, 1),
        "tucker.lora_down.weight": torch.randn(4, 5, 1, 1),
        "tucker.lora_mid.weight": torch.randn(4, 4, 3, 3),
        "tucker.lora_up.weight": torch.randn(6, 4, 1, 1),
    }
    expected = {
        "linear": tensors["linear.lora_B.default.weight"] @ tensors["linear.lora_A.default.weight"],
        "conv": tensors["conv.lora_up.weight"].flatten(1)
        @ tensors["conv.lora_down.weight"].flatten(1),
        "tucker": torch.einsum(
            "or,rskl,si->oikl",
            tensors["tucker.lora_up.weight"].flatten(1),
            tensors["tucker.lora_mid.weight"],
            tensors["tucker.lora_down.weight"].flatten(1),
        ).flatten(1),
    }
    pairs = pairs_of(tensors).lora_pairs
    for pair, norm in zip(pairs, lora_row_norms(pairs), strict=True):
        assert norm.item() == pytest.approx(expected[pair.base].norm(dim=1).mean().item(), rel=1e-5)
    assert len(pairs) == 3


def test_norms_of_kronecker_products():
    torch.manual_seed(0)
    w1, a, b = torch.randn(3, 4), torch.randn(7, 2), torch.randn(2, 9)
    core, out, into = torch.randn(2, 2, 3, 3), torch.randn(2, 7), torch.randn(2, 5)
    one_a, one_b = torch.randn(3, 2), torch.randn(2, 4)
    whole = torch.randn(5, 6, 3, 3)
    tensors = {
        "both.lokr_w1_a": one_a,
        "both.lokr_w1_b": one_b,
        "both.lokr_w2_a": a,
        "both.lokr_w2_b": b,
        "full.lokr_w1": w1,
        "full.lokr_w2": whole,
        "tucker.lokr_w1": w1,
        "tucker.lokr_t2": core,
        "tucker.lokr_w2_a": out,
        "tucker.lokr_w2_b": into,
    }
    # As in the formula of the Tucker form: the core's first index goes with a, its second with b.
    tucker = torch.einsum("ijkl,ip,jr->prkl", core, out, into)
    expected = {
        "both": torch.kron(one_a @ one_b, a @ b).norm(),
        "full": torch.kron(w1, whole.flatten(1)).norm(),
        "tucker": torch.kron(w1, tucker.flatten(1)).norm(),
    }
    tensors["tucker.lokr_w1"] = w1.clone()  # each name its own tensor
    pairs = pairs_of(tensors).lokr_pairs
    for pair, norm in zip(pairs, lokr_norms(pairs), strict=True):
        assert norm.item() == pytest.approx(expected[pair.base].item(), rel=1e-5)
    assert len(pairs) == 3


def test_tucker_norm_is_that_of_the_real_lokr_weight():
    lokr = pytest.importorskip("lycoris.modules.lokr")
    torch.manual_seed(0)
    module = lokr.LokrModule(
        "x", torch.nn.Conv2d(32, 48, 3), lora_dim=2, use_tucker=True, decompose_both=True, alpha=2
    )
    with torch.no_grad():
        for p in module.parameters():
            p.normal_()
    named = {f"x.{n}": p for n, p in module.named_parameters() if n.startswith("lokr_")}
    pairs = pairs_of(named).lokr_pairs
    assert "x.lokr_t2" in named
    norm = module.get_weight(None).norm().item()
    assert lokr_norms(pairs).item() == pytest.approx(norm, rel=1e-4)


def test_dynamic_weight_decay_by_family():
    decay = DynamicWeightDecay(1000, 0.7, 0.1)
    assert decay.schedule("lora", 1000) == 1
    assert decay.schedule("other", 9000) == 1
    assert decay.schedule("lora", 2000) == pytest.approx(0.7)
    assert decay.schedule("lora", 9000) == pytest.approx(0.49)
    assert decay.schedule("lokr", 2000) == pytest.approx(0.7**0.7)
    assert decay.schedule("lokr", 9000) == pytest.approx(0.7 ** (0.7 * 1.5))
    assert DynamicWeightDecay(10, 0.1, 0.2).schedule("lora", 30) == pytest.approx(0.2)
    assert DynamicWeightDecay(10, 0.1, 0.2).schedule("lokr", 30) == pytest.approx(0.3)


def test_anchors():
    assert anchor_for("lora_a", "auto") == anchor_for("lokr_w2", "auto") == "zero"
    assert anchor_for("regular", "auto") == anchor_for("dora_scale", "auto") == "initial"
    assert anchor_for("regular", "zero") == "zero"
    assert anchor_for("lora_a", "initial") == "initial"


def test_batching_with_other_tensors_changes_no_bit():
    torch.manual_seed(0)
    x = torch.randn(5000)
    cpu = torch.device("cpu")
    alone = layout_of((5000,), cpu)
    sum_alone = alone.sum(alone.gather([x], torch.float32))
    others = [torch.randn(n) for n in (3, 256, 1000)]
    among = layout_of((3, 256, 5000, 1000), cpu)
    matrix = among.gather([others[0], others[1], x, others[2]], torch.float32)
    assert among.sum(matrix)[2] == sum_alone[0]
    shapes = [torch.Size([n]) for n in (3, 256, 5000, 1000)]
    assert torch.equal(among.split(matrix, shapes)[2], x)
