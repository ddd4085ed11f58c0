"""Partners are found in gradients that flowed through products, and only there."""

import itertools
from collections.abc import Sequence

import pytest
import torch
from factored_models import WIDTHS, Adapter, ConvNet, Transformer, train
from optimizers import drawn
from torch import Tensor, nn

from library.custom_hina_adaptive_adamw_optimizer import AdaptiveHinaAdamW
from library.optim.discovery import (
    PRODUCTS,
    Relation,
    compatibility,
    discover,
    fitting_products,
    product_norms,
)
from library.optim.scratch import ScratchPool

THRESHOLD = 0.3


def multiply(product: str, p: Tensor, q: Tensor) -> Tensor:
    """What the name of a product says."""
    return {
        "P·Q": lambda: p @ q,
        "Q·P": lambda: q @ p,
        "P·Qᵀ": lambda: p @ q.T,
        "Pᵀ·Q": lambda: p.T @ q,
    }[product]()


def found_in(
    matrices: Sequence[Tensor],
    gradients: Sequence[Tensor],
    known: Sequence[tuple[int, int]] = (),
    threshold: float = THRESHOLD,
) -> dict[int, Relation]:
    flat = [matrix.detach().flatten(1) for matrix in matrices]
    return discover(flat, [grad.flatten(1) for grad in gradients], known, threshold, ScratchPool())


def found_by_name(
    model: nn.Module, dtype: torch.dtype = torch.float32
) -> dict[str, tuple[str, str]]:
    """Each matrix's partner and product in the gradients that the model has, rounded to a type."""
    named = {name: p for name, p in model.named_parameters() if p.ndim > 1 and p.grad is not None}
    names = list(named)
    related = found_in(list(named.values()), [p.grad.to(dtype) for p in named.values()])
    return {names[k]: (names[r.partner], PRODUCTS[r.product]) for k, r in related.items()}


def trained(model: nn.Module, steps: int = 20, **options: object) -> nn.Module:
    """After some steps, with the next gradients at hand."""
    optimizer = AdaptiveHinaAdamW(
        model.parameters(), lr=1e-3, relationship_discovery_interval=10_000, **options
    )
    for _ in train(model, optimizer, steps):
        pass
    optimizer.zero_grad()
    model.loss(steps).backward()
    return model


def both_ways(pairs: Sequence[tuple[str, str, str]]) -> dict[str, tuple[str, str]]:
    turned = {"P·Q": "Q·P", "Pᵀ·Q": "Pᵀ·Q"}
    there = {one: (other, product) for one, other, product in pairs}
    return there | {other: (one, turned[product]) for one, other, product in pairs}


def true_partners(adapter: Adapter) -> dict[str, tuple[str, str]]:
    """The half that is multiplied from the left is P of P·Q."""
    left = ("lora_up", "lokr_w2_a")
    return {
        name: (partner, "P·Q" if any(half in name for half in left) else "Q·P")
        for name, partner in adapter.partners().items()
    }


def test_fitting_products_are_those_that_can_be_formed():
    for shape in itertools.product((1, 2, 3), repeat=2):
        for other in itertools.product((1, 2, 3), repeat=2):
            wanted = []
            for k, product in enumerate(PRODUCTS):
                try:
                    multiply(product, torch.zeros(shape), torch.zeros(other))
                    wanted.append(k)
                except RuntimeError:
                    pass
            assert fitting_products(shape, other) == wanted


@pytest.mark.parametrize(
    ("products", "likeness", "wanted"),
    [(0, 0.0, 0.0), (1, 1.0, 0.475), (2, 0.5, 0.5), (4, 0.0, 0.7), (4, 1.0, 1.0)],
)
def test_compatibility_is_seven_parts_shape_and_three_likeness(
    products: int, likeness: float, wanted: float
):
    assert compatibility(products, likeness) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("product", PRODUCTS)
def test_product_norms_are_those_of_the_products(product: str):
    shapes = {
        "P·Q": ((30, 7), (7, 90)),
        "Q·P": ((7, 90), (30, 7)),
        "P·Qᵀ": ((30, 7), (11, 7)),
        "Pᵀ·Q": ((7, 30), (7, 11)),
    }[product]
    p, q = drawn(*shapes)
    norms = product_norms([p, q], {0: Relation(1, PRODUCTS.index(product), 0.5)})
    formed = multiply(product, p.double(), q.double())
    assert norms == {0: pytest.approx(float(torch.linalg.norm(formed)), rel=1e-5)}


def test_product_norms_of_convolutions_types_and_zeros():
    up, down = drawn((40, 4, 1, 1), (4, 16, 3, 3))
    half, zero = up.bfloat16(), torch.zeros(40, 4)
    matrices = [each.flatten(1) for each in (up, down, half, zero)]
    there, back = PRODUCTS.index("P·Q"), PRODUCTS.index("Q·P")
    relations = {
        0: Relation(1, there, 0.5),
        1: Relation(0, back, 0.5),
        2: Relation(1, there, 0.5),
        3: Relation(1, there, 0.5),
    }
    norms = product_norms(matrices, relations)
    wanted = float(torch.linalg.norm(matrices[0] @ matrices[1]))
    assert norms[0] == norms[1] == pytest.approx(wanted, rel=1e-5)
    rounded = float(torch.linalg.norm(matrices[2].float() @ matrices[1]))
    assert norms[2] == pytest.approx(rounded, rel=1e-5)
    assert norms[3] == 0.0


KINDS = {
    "rank 2": {"rank": 2},
    "rank 4": {"rank": 4},
    "rank 16": {"rank": 16},
    "rank 40, diagonals": {"rank": 40},
    "convolutions, rank 4": {"algo": "conv"},
    "convolutions, rank 16": {"algo": "conv", "rank": 16},
    "LoKr, w2 in factors": {"algo": "lokr"},
    "dropout between the halves": {"dropout": 0.1},
    "dropout, rank 16": {"dropout": 0.1, "rank": 16},
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))
def test_every_pair_of_an_adapter_is_found_and_none_wrong(kind: dict):
    adapter = trained(Adapter(**kind))
    assert len(adapter.layers) == 12
    wanted = true_partners(adapter)
    assert len(wanted) == 24
    assert found_by_name(adapter) == wanted
    assert found_by_name(adapter, torch.bfloat16) == wanted


def test_pairs_of_rank_1():
    """A single number a trace: one as near by chance is common among many, in bfloat16 even among
    few, where pairs may be missed. None is wrong."""
    adapter = trained(Adapter(rank=1))
    wanted = true_partners(adapter)
    assert found_by_name(adapter) == wanted
    assert found_by_name(adapter, torch.bfloat16).items() <= wanted.items()


@pytest.mark.parametrize("rank", [16, 40])
def test_modules_that_learn_the_same_are_told_apart(rank: int):
    """One teacher for all layers of a shape: their gradients have much in common, and layers of
    equal shapes fit each other better than their true partners do."""
    adapter = trained(Adapter(rank=rank, repeats=8, one_teacher=True), 30)
    wanted = true_partners(adapter)
    assert found_by_name(adapter) == wanted
    assert found_by_name(adapter, torch.bfloat16) == wanted


def test_gradients_of_a_model_that_computes_in_bfloat16():
    adapter = Adapter(rank=16)
    plain = adapter.loss

    def rounded(seed: int) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return plain(seed)

    adapter.loss = rounded
    assert found_by_name(trained(adapter)) == true_partners(adapter)


@pytest.mark.parametrize("trains", ["lora_up", "lora_down"])
def test_where_the_partner_is_frozen_no_other_takes_its_place(trains: str):
    adapter = Adapter(rank=16, repeats=8)
    for name, p in adapter.named_parameters():
        p.requires_grad_(trains in name or "layers.3." in name)
    for layer in adapter.layers:
        nn.init.normal_(layer.lora_up.weight, std=0.01)
    whole = ("layers.3.lora_up.weight", "layers.3.lora_down.weight")
    assert found_by_name(trained(adapter)) == both_ways([(*whole, "P·Q")])


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize(("width", "hidden"), [(24, 30), (40, 48)])
def test_a_transformers_products_are_found(heads: int, width: int, hidden: int):
    """Of wide layers diagonals tell, which hold for each of several heads and for ReLU."""
    model = trained(Transformer(width, hidden, heads))
    assert found_by_name(model) == both_ways(Transformer.PARTNERS)


def test_a_convolution_and_the_1x1_behind_it_are_found():
    assert found_by_name(trained(ConvNet())) == both_ways(ConvNet.PARTNERS)


@pytest.mark.parametrize("width", [6, 50])
def test_consecutive_linear_layers(width: int):
    class Chain(nn.Sequential):
        def loss(self, seed: int) -> Tensor:
            x, wanted = drawn((16, 20), (16, 9), seed=seed)
            return (self(x) - wanted).square().mean()

    torch.manual_seed(0)
    chain = Chain(nn.Linear(20, width, bias=False), nn.Linear(width, 9, bias=False))
    assert found_by_name(trained(chain)) == both_ways([("1.weight", "0.weight", "P·Q")])


def test_a_parameter_between_two_has_one_of_them():
    torch.manual_seed(0)
    sizes = [(10, 7), (8, 10), (6, 8)]
    first, second, third = (torch.randn(size, requires_grad=True) for size in sizes)
    x = torch.randn(5, 7)
    (x @ first.mT @ second.mT @ third.mT).square().sum().backward()
    related = found_in([first, second, third], [first.grad, second.grad, third.grad])
    assert related[0].partner == related[2].partner == 1
    assert related[1].partner in (0, 2)


def test_each_of_the_four_products_is_recognised():
    torch.manual_seed(0)
    for product, (one, other) in {
        "P·Q": ((30, 5), (5, 20)),
        "Q·P": ((5, 20), (30, 5)),
        "P·Qᵀ": ((30, 5), (20, 5)),
        "Pᵀ·Q": ((5, 30), (5, 20)),
    }.items():
        p, q = torch.randn(one, requires_grad=True), torch.randn(other, requires_grad=True)
        multiply(product, p, q).sin().sum().backward()
        related = found_in([p, q], [p.grad, q.grad])
        assert PRODUCTS[related[0].product] == product
        assert related[0].partner == 1
        fitting = len(fitting_products(one, other))
        assert related[0].compatibility == pytest.approx(compatibility(fitting, 1.0), abs=1e-6)


def test_the_most_alike_is_the_partner_even_if_more_products_fit_another():
    torch.manual_seed(0)
    up, down = torch.randn(60, 40, requires_grad=True), torch.randn(40, 50, requires_grad=True)
    (up @ down).sin().sum().backward()
    twin, nearly = up.detach().clone(), up.grad * (1 + 0.01 * torch.randn(60, 40))
    related = found_in([up, down, twin], [up.grad, down.grad, nearly])
    assert related[0].partner == 1
    assert related[1].partner == 0
    assert related[2].partner in (0, 1)  # all but the same matrix as one that has a partner


def test_whole_traces_of_the_same_side_are_compared():
    """Of rank 2, with gradients so inexact that the two numbers of a diagonal would not do."""
    torch.manual_seed(0)
    for product, shape in (("P·Qᵀ", (30, 2)), ("Pᵀ·Q", (2, 30))):
        matrices = [torch.randn(shape, requires_grad=True) for _ in range(80)]
        for p, q in zip(matrices[::2], matrices[1::2], strict=True):
            multiply(product, p, q).sin().sum().backward()
        grads = [p.grad * (1 + 4e-3 * torch.randn(shape)) for p in matrices]
        related = found_in(matrices, grads)
        right = [k for k, each in related.items() if each.partner == k ^ 1]
        assert len(right) > 0.9 * len(matrices)
        assert {PRODUCTS[related[k].product] for k in right} == {product}


def test_names_decide_first():
    """Even where gradients say nothing, or something else."""
    up, down, other = drawn((30, 4), (4, 20), (4, 20))
    silent = [torch.zeros(30, 4), torch.zeros(4, 20), torch.zeros(4, 20)]
    wanted = {0: Relation(1, 0, 0.475), 1: Relation(0, 1, 0.475)}
    assert found_in([up, down, other], silent, [(0, 1)]) == pytest.approx(wanted)
    up.requires_grad_()
    other.requires_grad_()
    (up @ other).sin().sum().backward()
    telling = [up.grad, torch.zeros(4, 20), other.grad]
    assert found_in([up, down, other], telling)[0].partner == 2
    assert found_in([up, down, other], telling, [(0, 1)]) == pytest.approx(wanted)


def test_matrices_with_correlated_entries_are_found():
    torch.manual_seed(0)
    matrices = drawn(*[(12, 20)] * 6, (30, 12))
    matrices[4] = -3 * matrices[1] + 0.5 * torch.randn(12, 20)
    # Over the common length: the entries of the shorter one.
    matrices.append(matrices[2][:5] + 0.1 * torch.randn(5, 20))
    silent = [torch.zeros_like(matrix) for matrix in matrices]
    related = found_in(matrices, silent)
    assert {one: each.partner for one, each in related.items()} == {1: 4, 4: 1, 2: 7, 7: 2}
    entries = torch.stack([matrices[1].flatten(), matrices[4].flatten()])
    likeness = float(torch.corrcoef(entries)[0, 1].abs())
    assert related[1].compatibility == pytest.approx(compatibility(2, likeness), rel=1e-6)
    assert found_in(matrices, silent, threshold=compatibility(2, likeness) + 1e-6).keys() <= {2, 7}


def test_both_of_a_correlated_pair_tell_the_same_product():
    one = drawn((12, 20))[0]
    related = found_in([one, 2 * one.view(20, 12)], [torch.zeros(12, 20), torch.zeros(20, 12)])
    assert PRODUCTS[related[0].product] == "P·Q"
    assert PRODUCTS[related[1].product] == "Q·P"


def test_a_correlation_of_the_first_entries_alone_is_none():
    one, other = drawn((40, 50), (40, 50))
    other.view(-1)[:600] = one.view(-1)[:600]
    assert found_in([one, other], [torch.zeros(40, 50)] * 2) == {}


@pytest.mark.parametrize("rank", [3, 4, 16, 40])
def test_independent_matrices_of_equal_shapes_have_no_partner(rank: int):
    shapes = [(rank, 50), (50, rank)] * 100
    assert found_in(drawn(*shapes), drawn(*shapes, seed=1)) == {}


def test_short_traces_are_taken_for_chance_in_one_of_a_hundred_cases_at_most():
    """One or four numbers a trace are near others' now and then."""
    for rank in (1, 2):
        shapes = [(rank, 50), (50, rank)] * 150
        assert len(found_in(drawn(*shapes), drawn(*shapes, seed=1))) <= 6


def test_what_says_nothing_has_no_partner():
    torch.manual_seed(0)
    same = [torch.full((100, 9), value, dtype=torch.float64) for value in (0.1, 0.3, 0.7)]
    assert found_in(same, [torch.zeros_like(each) for each in same]) == {}
    zeros = [torch.zeros(6, 4)] * 3
    assert found_in(zeros, zeros) == {}
    assert found_in(zeros, drawn(*[(6, 4)] * 3)) == {}
    assert found_in(drawn(*[(6, 4)] * 3), zeros) == {}
    assert found_in([], []) == {}
    assert found_in([torch.ones(1, 1)] * 2, [torch.ones(1, 1)] * 2, threshold=1.0) == {}


def test_size_and_type_of_gradients_do_not_matter():
    adapter = trained(Adapter(rank=4, widths=WIDTHS[:1]))
    wanted = true_partners(adapter)
    for size in (1e-15, 1e10):
        for p in adapter.parameters():
            p.grad.mul_(size)
        assert found_by_name(adapter) == wanted
        for p in adapter.parameters():
            p.grad.div_(size)
    assert found_by_name(adapter.double(), torch.float64) == wanted


def test_nothing_above_the_threshold():
    adapter = trained(Adapter(widths=WIDTHS[:1]))
    params = list(adapter.parameters())
    grads = [p.grad for p in params]
    reached = [each.compatibility for each in found_in(params, grads).values()]
    assert reached == pytest.approx([compatibility(1, 1.0)] * len(params))
    assert found_in(params, grads, threshold=compatibility(1, 1.0)) == {}
    pairs = [(2 * k + 1, 2 * k) for k in range(len(params) // 2)]
    assert found_in(params, grads, pairs, threshold=0.48) == {}


@pytest.mark.parametrize("bias", [False, True])
def test_a_bias_between_two_layers_is_part_of_their_symmetry(bias: bool) -> None:
    """Then the traces of the matrices alone differ, and no partner is found."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20, bias=bias), nn.Linear(20, 9, bias=False))
    model(torch.randn(30, 12)).square().sum().backward()
    weights = [layer.weight for layer in model]
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    found = discover([w.detach() for w in weights], gradients, [], 0.1, ScratchPool())
    assert {one: relation.partner for one, relation in found.items()} == (
        {} if bias else {0: 1, 1: 0}
    )
