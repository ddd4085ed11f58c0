"""The digits, how they are dealt to clients, and the tiny CLIP that was pretrained on some."""

import hashlib
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, kstest
from sklearn.datasets import load_digits
from torch import Tensor
from transformers import AutoTokenizer, CLIPModel, CLIPTokenizer

from library.training.errors import UserError
from lora.federated.data import (
    MEAN,
    STD,
    TINY_CLIP,
    Pictures,
    Random,
    _dirichlet_sample,
    digits,
    dirichlet,
    shares,
)

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))  # scripts, not a package

from make_tiny_clip import (
    NAMES,
    PER_CLASS,
    TEMPLATES,
    batches,
    captions_of,
    make_config,
    pretrain,
    shifted,
    zero_shot_accuracy,
)


def rows(pictures: Pictures) -> set[bytes]:
    """Each picture as bytes, to compare by."""
    return {image.numpy().tobytes() for image in pictures.images}


def test_digits_are_scikit_learns_normalised_as_clip_expects() -> None:
    pictures = digits(8)
    assert pictures.images.dtype == torch.float32
    assert pictures.labels.dtype == torch.int64
    back = pictures.images * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    known = load_digits()
    for channel in back.unbind(1):
        torch.testing.assert_close(channel * 16, torch.tensor(known.images, dtype=torch.float32))
    assert pictures.labels.tolist() == known.target.tolist()


@pytest.mark.parametrize("size", [4, 32])
def test_digits_of_another_size_look_the_same(size: int) -> None:
    small, resized = digits(8), digits(size)
    assert resized.images.shape == (1797, 3, size, size)
    black, white = (
        (torch.tensor(MEAN) * -1) / torch.tensor(STD),
        (1 - torch.tensor(MEAN)) / torch.tensor(STD),
    )
    low, high = (limit.view(3, 1, 1) for limit in (black, white))
    assert (resized.images >= low - 1e-5).all()
    assert (resized.images <= high + 1e-5).all()
    assert torch.equal(resized.labels, small.labels)
    coarse = [
        torch.nn.functional.adaptive_avg_pool2d(p.images, 4).flatten() for p in (small, resized)
    ]
    assert torch.corrcoef(torch.stack(coarse))[0, 1] > 0.98


def test_digits_without_scikit_learn_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"pip install -r requirements-federated\.txt"):
        digits(8)


def test_an_impossible_size_is_refused() -> None:
    with pytest.raises(UserError, match="0 pixels"):
        digits(0)


def test_shares_are_disjoint_and_together_everything() -> None:
    parts = shares(8)
    of_each = [rows(part) for part in (parts.pretraining, parts.clients, parts.test)]
    assert [len(one) for one in of_each] == [360, 1078, 359]
    assert set.union(*of_each) == rows(digits(8))
    assert sum(map(len, of_each)) == 1797  # so that no picture is in two


def test_shares_are_stratified_and_pretraining_has_only_five_classes() -> None:
    parts = shares(8)
    assert parts.pretraining.labels.bincount().tolist() == [71, 73, 71, 73, 72]
    every = digits(8).labels.bincount()
    assert (parts.test.labels.bincount() - every / 5).abs().max() <= 0.5
    assert (parts.clients.labels.bincount() >= 70).all()


def test_the_test_share_is_the_one_that_the_shipped_model_never_saw() -> None:
    """Another split would hand pictures that `TINY_CLIP` was trained on to its test."""
    of_pixels = (shares(8).test.images * 1000).round().to(torch.int32)
    digest = hashlib.sha256(of_pixels.numpy().tobytes()).hexdigest()
    assert digest == "9a82e5274596eab90b21a4cfa77f3740b2debd7954c26005b33e308a3cdfa164"


def test_shares_hold_the_same_digits_whatever_their_size() -> None:
    for small, large in zip(vars(shares(8)).values(), vars(shares(16)).values(), strict=True):
        assert torch.equal(small.labels, large.labels)
    everything, labels = digits(16), shares(16).clients
    assert rows(labels) <= rows(everything)


def test_pictures_are_picked_by_index_or_mask() -> None:
    pictures = digits(8)
    picked = pictures[torch.tensor([5, 2])]
    assert len(picked) == 2
    assert torch.equal(picked.images[1], pictures.images[2])
    fives = pictures[pictures.labels == 5]
    assert len(fives) == 182
    assert (fives.labels == 5).all()


@pytest.mark.parametrize("alpha", [1e-4, 0.1, 1.0, 1e6])
@pytest.mark.parametrize("clients", [1, 4, 30])
def test_a_deal_uses_every_picture_once(alpha: float, clients: int) -> None:
    labels = shares(8).clients.labels
    hands = dirichlet(labels, clients, alpha, seed=3)
    assert len(hands) == clients
    assert torch.cat(hands).sort().values.tolist() == list(range(len(labels)))
    assert min(map(len, hands)) >= 8
    assert all(torch.equal(hand, hand.sort().values) for hand in hands)


def test_the_same_seed_deals_alike_and_another_does_not() -> None:
    labels = shares(8).clients.labels
    first, again, other = (dirichlet(labels, 4, 0.5, seed) for seed in (1, 1, 2))
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
    assert any(not torch.equal(one, two) for one, two in zip(first, other, strict=True))


@pytest.mark.parametrize("alpha", [0.1, 0.5, 2.0])
def test_proportions_have_dirichlets_marginal_distribution(alpha: float) -> None:
    """One client's proportion is Beta(alpha, (clients - 1) alpha); they add up to 1."""
    random = Random(0)
    drawn = np.stack([_dirichlet_sample(4, alpha, random) for _ in range(1000)])
    np.testing.assert_allclose(drawn.sum(1), 1)
    for client in range(4):
        assert kstest(drawn[:, client], "beta", (alpha, 3 * alpha)).pvalue > 0.01


def skew(labels: Tensor, hands: list[Tensor]) -> float:
    """Mean total variation distance of the clients' classes from everybody's."""
    everybody = labels.bincount(minlength=10) / len(labels)
    own = [labels[hand].bincount(minlength=10) / len(hand) for hand in hands]
    return torch.stack([(one - everybody).abs().sum() / 2 for one in own]).mean().item()


def test_a_smaller_alpha_skews_more() -> None:
    labels = shares(8).clients.labels
    by_alpha = [
        [skew(labels, dirichlet(labels, 4, alpha, seed)) for seed in range(20)]
        for alpha in (0.1, 1.0, 100.0)
    ]
    strong, middle, weak = (torch.tensor(one) for one in by_alpha)
    assert strong.min() > middle.max() > weak.max() * 2


def test_a_large_alpha_deals_evenly() -> None:
    labels = shares(8).clients.labels
    hands = dirichlet(labels, 4, 1e6, seed=0)
    for label in range(10):
        counts = [int((labels[hand] == label).sum()) for hand in hands]
        assert chisquare(counts).pvalue > 0.9


def test_small_hands_are_filled_from_the_largest() -> None:
    labels = torch.zeros(40, dtype=torch.int64)
    lean = dirichlet(labels, 4, 1e-3, seed=0, least=0)
    assert sorted(map(len, lean)) == [0, 0, 0, 40]
    assert sorted(map(len, dirichlet(labels, 4, 1e-3, seed=0, least=8))) == [8, 8, 8, 16]
    assert [len(hand) for hand in dirichlet(labels, 4, 1e-3, seed=0, least=10)] == [10] * 4


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"clients": 0}, "0 clients"),
        ({"alpha": 0.0}, "alpha"),
        ({"alpha": -1.0}, "-1.0"),
        ({"alpha": float("nan")}, "nan"),
        ({"alpha": float("inf")}, "inf"),
        ({"least": -1}, "-1"),
        ({"least": 11}, "40 pictures are too few for 4 clients with at least 11 each"),
    ],
)
def test_an_impossible_deal_is_refused(given: dict[str, float], said: str) -> None:
    arguments = {"clients": 4, "alpha": 0.5, "seed": 0, "least": 8} | given
    with pytest.raises(UserError, match=re.escape(said)):
        dirichlet(torch.zeros(40, dtype=torch.int64), **arguments)


@pytest.fixture(scope="module")
def shipped() -> CLIPModel:
    return CLIPModel.from_pretrained(TINY_CLIP, dtype=torch.float32, local_files_only=True).eval()


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return AutoTokenizer.from_pretrained(TINY_CLIP, local_files_only=True)


def test_the_shipped_models_zero_shot_accuracies_are_those_in_its_readme(
    shipped: CLIPModel, tokenizer: CLIPTokenizer
) -> None:
    readme = (TINY_CLIP / "README.md").read_text(encoding="utf-8")
    test = shares(8).test
    seen = test[test.labels < 5]
    of_five = zero_shot_accuracy(shipped, tokenizer, seen, range(5))
    of_ten = zero_shot_accuracy(shipped, tokenizer, test, range(10))
    assert of_five > 0.9
    assert f"{100 * of_five:.1f} % of the {len(seen)} test" in readme
    assert f"{100 * of_ten:.1f} % of the {len(test)} test" in readme


def test_the_shipped_model_is_small_and_finite(shipped: CLIPModel) -> None:
    assert sum(file.stat().st_size for file in TINY_CLIP.iterdir()) < 6_000_000
    assert all(tensor.isfinite().all() for tensor in shipped.state_dict().values())
    assert shipped.dtype == torch.float32
    assert 2_000_000 < sum(weight.numel() for weight in shipped.parameters()) < 2_800_000


def test_the_shipped_model_is_the_tools_architecture(
    shipped: CLIPModel, tokenizer: CLIPTokenizer
) -> None:
    made = CLIPModel(make_config(tokenizer)).state_dict()
    assert {name: weight.shape for name, weight in made.items()} == {
        name: weight.shape for name, weight in shipped.state_dict().items()
    }


def test_every_word_of_the_captions_is_one_token(tokenizer: CLIPTokenizer) -> None:
    assert isinstance(tokenizer, CLIPTokenizer)
    for template in TEMPLATES:
        for name in NAMES:
            caption = template.format(name)
            ids = tokenizer(caption)["input_ids"]
            assert len(ids) == 2 + len(re.findall(r"\w+|,", caption))
            assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ,", ",") == caption
    assert len(tokenizer("zebra").input_ids) > 3  # unknown words come in pieces


def test_pretraining_is_shown_its_own_share_only() -> None:
    pictures = shares(8).pretraining
    shown = list(batches(pictures, 20))
    for batch in shown:
        assert batch.labels.tolist() == sorted([*range(5)] * PER_CLASS)
    assert set.union(*map(rows, shown)) <= rows(pictures)
    assert len(set.union(*map(rows, shown[:17]))) == 17 * PER_CLASS * 5  # none comes twice early
    for label, caption in enumerate(captions_of(torch.arange(5))):
        assert NAMES[label] in caption


def test_shifts_move_a_picture_by_a_pixel_over_black() -> None:
    black = ((0 - torch.tensor(MEAN)) / torch.tensor(STD)).view(1, 3, 1, 1)
    dot = black.repeat(64, 1, 8, 8)
    dot[:, :, 4, 4] += 1
    torch.manual_seed(0)
    moved = shifted(dot)
    lit = (moved - black)[:, 0] > 0.5
    assert lit.sum() == 64
    assert lit.any(0).nonzero().tolist() == [[y, x] for y in (3, 4, 5) for x in (3, 4, 5)]
    assert ((moved - black).abs() < 1e-6).sum() == moved.numel() - 3 * 64


def test_pretraining_learns_and_repeats_itself(tokenizer: CLIPTokenizer) -> None:
    ends = []
    for _ in range(2):
        torch.manual_seed(0)
        model = CLIPModel(make_config(tokenizer))
        before = model.state_dict()["visual_projection.weight"].clone()
        pretrain(model, tokenizer, shares(8).pretraining, steps=3, lr=1e-3)
        ends.append(model.state_dict()["visual_projection.weight"])
        assert not torch.equal(ends[-1], before)
    assert torch.equal(*ends)
