"""A misspelt word is answered with the known one that it is most like."""

import pytest

from library.optim.spelling import closest, did_you_mean

KNOWN = ("HinaAdamW", "Lion", "network_dim")


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("hinaadamw", "HinaAdamW"),
        ("LION", "Lion"),
        ("HinaAdaW", "HinaAdamW"),
        ("network-dims", "network_dim"),
        ("Prodigy", None),
        ("", None),
    ],
)
def test_the_closest_word(word: str, meant: str | None) -> None:
    assert closest(word, KNOWN) == meant


def test_the_sentence() -> None:
    assert did_you_mean("Loin", KNOWN) == " Did you mean 'Lion'?"
    assert did_you_mean("network-dims", KNOWN, "--{}") == " Did you mean --network_dim?"
    assert did_you_mean("Prodigy", KNOWN) == ""
