"""lora/federated/aggregation.py: one adapter of many, against dense float64 references."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora.federated.aggregation import AGGREGATIONS, Array, Update, product_error

A, B = "encoder.q.lora_A.weight", "encoder.q.lora_B.weight"
HEAD = "classifier.weight"
fedavg, product, frozen_a = (AGGREGATIONS[name] for name in ("fedavg", "product", "frozen_a"))


def made(
    weights: Sequence[float],
    out: int = 7,
    rank: int = 3,
    inner: int = 9,
    seed: int = 0,
    same_a: bool = False,
    dtype: type = np.float64,
) -> list[Update]:
    """Random adapters of one pair and a head."""
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(rank, inner))
    updates = []
    for weight in weights:
        own = a if same_a else a + rng.normal(size=a.shape)
        tensors = {A: own, B: rng.normal(size=(out, rank)), HEAD: rng.normal(size=(4, 5))}
        updates.append((weight, {name: array.astype(dtype) for name, array in tensors.items()}))
    return updates


def dense_mean(updates: Sequence[Update], b: str = B, a: str = A) -> Array:
    """The weighted mean of B·A, made whole."""
    whole = sum(weight for weight, _ in updates)
    products = [w / whole * one[b].astype(float) @ one[a].astype(float) for w, one in updates]
    return np.sum(products, axis=0)


def rms_row(updates: Sequence[Update]) -> float:
    """The weighted root mean square of the lengths of A's rows."""
    squares = [np.square(np.linalg.norm(one[A], axis=1)).mean() for _, one in updates]
    return math.sqrt(np.average(squares, weights=[weight for weight, _ in updates]))


def rounding(updates: Sequence[Update]) -> float:
    """What float64 may leave of a sum of products that cancel."""
    whole = sum(weight for weight, _ in updates)
    norms = [w / whole * np.linalg.norm(one[B]) * np.linalg.norm(one[A]) for w, one in updates]
    return 1e-13 * float(np.sum(norms))


cases = st.builds(
    made,
    st.lists(st.floats(1, 1000), min_size=1, max_size=5),
    out=st.integers(1, 8),
    rank=st.integers(1, 5),
    inner=st.integers(1, 9),
    seed=st.integers(0, 1000),
    same_a=st.booleans(),
)


@settings(deadline=None, max_examples=60)
@given(cases)
def test_fedavg_is_the_weighted_mean_of_each_tensor(updates: list[Update]) -> None:
    combined = fedavg(updates)
    weights = [weight for weight, _ in updates]
    for name in (A, B, HEAD):
        expected = np.average([one[name] for _, one in updates], axis=0, weights=weights)
        np.testing.assert_allclose(combined[name], expected, rtol=1e-12, atol=1e-12)


@settings(deadline=None, max_examples=150)
@given(cases)
def test_product_is_the_best_of_its_rank(updates: list[Update]) -> None:
    combined, mean = product(updates), dense_mean(updates)
    rank = updates[0][1][A].shape[0]
    values = np.linalg.svd(mean, compute_uv=False)
    error = np.linalg.norm(combined[B] @ combined[A] - mean)
    assert error == pytest.approx(np.linalg.norm(values[rank:]), abs=rounding(updates))
    np.testing.assert_array_equal(combined[HEAD], fedavg(updates)[HEAD])
    assert [*combined] == [*updates[0][1]]


@settings(deadline=None, max_examples=100)
@given(cases)
def test_rows_of_a_are_orthogonal_and_keep_their_length(updates: list[Update]) -> None:
    a, length = product(updates)[A], rms_row(updates)
    assert math.sqrt(np.square(a).sum() / len(a)) == pytest.approx(length)
    if len(a) <= a.shape[1]:
        np.testing.assert_allclose(a @ a.T, length**2 * np.eye(len(a)), atol=1e-10 * length**2)


@settings(deadline=None, max_examples=100)
@given(cases)
def test_product_error_is_the_dense_one(updates: list[Update]) -> None:
    mean = dense_mean(updates)
    for aggregate in (fedavg, product):
        combined = aggregate(updates)
        error = np.linalg.norm(combined[B] @ combined[A] - mean) / np.linalg.norm(mean)
        assert product_error(updates, combined) == pytest.approx(
            error, abs=rounding(updates) / np.linalg.norm(mean)
        )


def test_fedavg_is_not_the_mean_of_products_and_product_is() -> None:
    updates = made([30, 50], rank=2)
    updates[1][1][B][:] = 0  # so the mean is of rank 2
    assert product_error(updates, fedavg(updates)) > 0.1
    assert product_error(updates, product(updates)) < 1e-14


def test_exact_where_the_ranks_of_the_clients_fit_in_one() -> None:
    updates = made([1, 2, 3], rank=6, seed=4)
    for k, (_, one) in enumerate(updates):  # two of six rows each
        one[B][:, : 2 * k] = one[B][:, 2 * k + 2 :] = 0
    assert np.linalg.matrix_rank(dense_mean(updates)) == 6
    assert product_error(updates, product(updates)) < 1e-13


def test_one_client_keeps_its_product() -> None:
    updates = made([12], dtype=np.float32)
    assert product_error(updates, product(updates)) < 5e-7
    for name, array in fedavg(updates).items():
        np.testing.assert_array_equal(array, updates[0][1][name])


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_results_have_the_dtype_of_the_tensors(aggregation: str, dtype: type) -> None:
    combined = AGGREGATIONS[aggregation](made([1, 2], same_a=True, dtype=dtype))
    assert {array.dtype for array in combined.values()} == {np.dtype(dtype)}


def test_sums_are_made_in_float64() -> None:
    updates: list[Update] = [(1.0, {HEAD: np.full(1, 2048, np.float16)}) for _ in range(40)]
    updates.append((40.0, {HEAD: np.full(1, -2040, np.float16)}))
    assert fedavg(updates)[HEAD] == 4  # 40 · 2048 is infinity in float16


@pytest.mark.parametrize("clients", [1, 3])
def test_zero_b_leaves_the_span_of_a(clients: int) -> None:
    """As before training: the product is zero, and A still is what B can be learned with."""
    updates = made([2.0, 5.0, 3.0][:clients], same_a=True)
    for _, one in updates:
        one[B][:] = 0
    combined, a = product(updates), updates[0][1][A]
    assert not combined[B].any()
    np.testing.assert_allclose(np.linalg.norm(combined[A], axis=1), rms_row(updates))
    inside = combined[A] @ np.linalg.pinv(a) @ a
    np.testing.assert_allclose(inside, combined[A], atol=1e-12)
    # Nearest to A of all with orthogonal rows of this length: the polar factor.
    u, _, vt = np.linalg.svd(a, full_matrices=False)
    np.testing.assert_allclose(combined[A], rms_row(updates) * u @ vt, atol=1e-7)


def test_directions_beside_the_product_are_of_the_clients_a() -> None:
    """A product of rank 1 leaves two rows to choose; the client without a product has a say."""
    updates = made([1, 1], inner=9)
    updates[0][1][A][:, 4:] = updates[1][1][A][:, 4:] = 0
    updates[0][1][B][:, 1:] = updates[1][1][B][:] = 0
    combined = product(updates)
    assert product_error(updates, combined) < 1e-14
    assert abs(combined[A][:, 4:]).max() < 1e-12
    np.testing.assert_allclose(np.linalg.norm(combined[A], axis=1), rms_row(updates))


def test_products_that_cancel_are_zero_and_not_noise() -> None:
    updates = made([1, 1], same_a=True)
    updates[1][1][B][:] = -updates[0][1][B]
    combined, a = product(updates), updates[0][1][A]
    assert not combined[B].any()
    np.testing.assert_allclose(combined[A] @ np.linalg.pinv(a) @ a, combined[A], atol=1e-12)


def test_a_that_is_zero_everywhere_makes_no_nan() -> None:
    updates = made([1, 3])
    for _, one in updates:
        one[A][:] = 0
    combined = product(updates)
    assert not combined[A].any()
    np.testing.assert_array_equal(combined[B], fedavg(updates)[B])
    assert product_error(updates, combined) == 0


def test_a_client_with_a_large_a_does_not_drown_another_with_a_large_b() -> None:
    updates = made([1, 1], rank=4)
    for (_, one), size, used in zip(updates, (1e9, 1e-9), (slice(2), slice(2, 4)), strict=True):
        one[A] *= size
        unused = np.ones(4, bool)
        unused[used] = False
        one[B][:, unused] = 0
        one[B] /= size
    combined, mean = product(updates), dense_mean(updates)
    np.testing.assert_allclose(combined[B] @ combined[A], mean, atol=1e-12 * abs(mean).max())


def test_a_stays_near_the_mean_of_a() -> None:
    """No other rotation of the same factors is nearer."""
    updates = made([1, 2, 4], seed=3)
    combined, mean = product(updates)[A], fedavg(updates)[A]
    distance = np.linalg.norm(combined - mean)
    rng = np.random.default_rng(0)
    for size in (1e-3, 0.1, 10):
        for _ in range(20):
            turn, _ = np.linalg.qr(np.eye(3) + size * rng.normal(size=(3, 3)))
            turn *= np.sign(np.diag(turn))
            assert np.linalg.norm(turn @ combined - mean) >= distance


def test_it_settles() -> None:
    """Aggregating what was aggregated changes nothing: no drift of A from round to round."""
    once = product(made([1, 2, 4], seed=3))
    again = product([(3.0, once), (1.0, once)])
    for name in once:
        np.testing.assert_allclose(again[name], once[name], atol=1e-7)


@settings(deadline=None, max_examples=40)
@given(st.permutations(range(4)), st.integers(0, 1000))
def test_the_order_of_updates_does_not_matter(order: list[int], seed: int) -> None:
    updates = made([1, 20, 3, 7], seed=seed)
    shuffled = [updates[k] for k in order]
    for aggregate in (fedavg, product):
        one, other = aggregate(updates), aggregate(shuffled)
        np.testing.assert_allclose(one[HEAD], other[HEAD], atol=1e-12)
        np.testing.assert_allclose(one[B] @ one[A], other[B] @ other[A], atol=1e-9)
    assert product_error(updates, one) == pytest.approx(product_error(shuffled, other))


@pytest.mark.parametrize("opposed", [False, True])
def test_the_factors_do_not_depend_on_the_order(opposed: bool) -> None:
    """Also where A's mean is zero but for rounding and says nothing about the rotation."""
    updates = made([1, 1, 1], rank=2, seed=8)
    if opposed:
        updates[2][1][A] = -(updates[0][1][A] + updates[1][1][A])
    one, other = product(updates), product(updates[::-1])
    np.testing.assert_allclose(one[A], other[A], atol=1e-6)
    np.testing.assert_allclose(one[B], other[B], atol=1e-6)


def test_frozen_a_equals_product_where_a_is_the_same() -> None:
    updates = made([10, 20, 40], same_a=True)
    frozen, exact = frozen_a(updates), product(updates)
    np.testing.assert_array_equal(frozen[A], updates[0][1][A])
    np.testing.assert_allclose(frozen[B] @ frozen[A], exact[B] @ exact[A], atol=1e-13)
    assert product_error(updates, frozen) < 1e-14


def test_frozen_a_averages_b_where_a_does_not_travel() -> None:
    whole = made([10, 20, 40], same_a=True)
    updates = [(weight, {B: one[B], HEAD: one[HEAD]}) for weight, one in whole]
    frozen, a = frozen_a(updates), whole[0][1][A]
    np.testing.assert_allclose(frozen[B] @ a, dense_mean(whole), atol=1e-13)
    assert product_error(updates, frozen) == 0
    np.testing.assert_array_equal(product(updates)[B], frozen[B])


def test_frozen_a_refuses_an_a_that_has_trained() -> None:
    updates = made([1, 1], same_a=True)
    updates[1][1][A] = updates[1][1][A] * (1 + 1e-15)
    with pytest.raises(ValueError, match=r"encoder\.q\.lora_A\.weight.*differs"):
        frozen_a(updates)


def test_errors_of_all_pairs_count_together() -> None:
    first, second = made([1, 2]), made([1, 2], out=4, inner=6, seed=1)
    b, a = B.replace("q", "v"), A.replace("q", "v")
    updates = [
        (weight, {**one, b: other[B], a: other[A]})
        for (weight, one), (_, other) in zip(first, second, strict=True)
    ]
    combined = fedavg(updates)
    means = [dense_mean(updates), dense_mean(updates, b, a)]
    apart = [combined[B] @ combined[A] - means[0], combined[b] @ combined[a] - means[1]]
    expected = math.hypot(*map(np.linalg.norm, apart)) / math.hypot(*map(np.linalg.norm, means))
    assert product_error(updates, combined) == pytest.approx(expected)


@pytest.mark.parametrize("size", [1e-3, 1e-6, 1e-9])
def test_small_errors_are_accurate(size: float) -> None:
    """From squared norms anything below 1e-8 would be lost."""
    updates = made([3], out=300, inner=200, rank=8)
    combined = dict(updates[0][1])
    combined[B] = combined[B] * (1 + size)
    assert product_error(updates, combined) == pytest.approx(size, rel=1e-5)


def test_an_error_beside_a_mean_of_zero() -> None:
    updates = made([1, 1])
    for _, one in updates:
        one[B][:] = 0
    assert product_error(updates, product(updates)) == 0
    assert product_error(updates, made([1])[0][1]) == math.inf


def without(name: str) -> list[Update]:
    updates = made([1, 2])
    del updates[1][1][name]
    return updates


def with_array(name: str, array: Array) -> list[Update]:
    updates = made([1, 2])
    updates[1][1][name] = array
    return updates


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize(
    ("updates", "message"),
    [
        ([], "no updates"),
        (made([1, 0]), "weight is 0"),
        (made([1, -2]), "weight is -2"),
        (made([1, math.nan]), "weight is nan"),
        (made([math.inf, 1]), "weight is inf"),
        (without(HEAD), r"'classifier\.weight' is in some"),
        (with_array("more", np.zeros(2)), "'more' is in some"),
        (with_array(HEAD, np.zeros((5, 4))), r"'classifier\.weight' is \(5, 4\) here and \(4, 5\)"),
        (with_array(HEAD, np.zeros((4, 5), int)), "holds int64"),
    ],
)
def test_what_cannot_be_averaged_is_named(
    aggregation: str, updates: list[Update], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        AGGREGATIONS[aggregation](updates)


@pytest.mark.parametrize(("a", "b"), [((3, 4), (5, 2)), ((2, 4, 3, 3), (5, 2, 1, 1))])
def test_a_pair_that_is_none_is_named(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    with pytest.raises(
        ValueError, match=r"lora_B\.weight' .*lora_A\.weight' .* are not \[out, r\]"
    ):
        product([(1.0, {A: np.ones(a), B: np.ones(b)})])


def test_combined_tensors_of_other_shapes_have_no_error_figure() -> None:
    with pytest.raises(ValueError, match="lora_A"):
        product_error(made([1, 2]), {**made([1])[0][1], A: np.ones((2, 9))})


def test_the_clients_tensors_are_left_as_they_are() -> None:
    updates = made([1, 2], same_a=True)
    before = [{name: array.copy() for name, array in one.items()} for _, one in updates]
    for aggregate in AGGREGATIONS.values():
        for array in aggregate(updates).values():
            array += 1
    for (_, one), then in zip(updates, before, strict=True):
        for name, array in one.items():
            np.testing.assert_array_equal(array, then[name])
