"""What the entries for purification count; the entries themselves run in test_reproduce.py."""

import torch

import saddlepoint as sp
from saddlepoint.data import Split
from saddlepoint.reproduce import ENTRIES, Context
from saddlepoint.reproduce.purification import _last_hidden, _seen

DIGITS = sp.data.load("digits")


def test_epochs_are_those_in_which_so_many_images_are_seen():
    split = Split(torch.zeros(100, 1), torch.zeros(100, dtype=torch.int64))
    assert [_seen(Context(data=DIGITS, quick=quick), split, 5000) for quick in (False, True)] == [50, 10]
    assert _seen(Context(data=DIGITS, quick=True), split, 10) == 1


def test_features_are_those_before_the_last_layer():
    model, x = sp.Model(sp.zoo.build("digits-cnn")), DIGITS.test.x[:2]
    features = model.features(x, _last_hidden(model))
    torch.testing.assert_close(model.net[-1](features), model.net.eval()(x))


def test_they_are_registered():
    assert {"R26", "R27", "R28", "R29"} <= set(ENTRIES)
