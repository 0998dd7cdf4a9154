"""Quilting: seams against all paths, images that are sewn from their own patches, and both attacks."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import saddlepoint as sp
from saddlepoint.defenses.purification import Quilting
from saddlepoint.defenses.purification.quilting import seam
from saddlepoint.errors import InputError

DIGITS = sp.data.load("digits")
X, Y = DIGITS.test.x[:60], DIGITS.test.y[:60]


def test_no_path_is_cheaper_than_the_seam() -> None:
    errors = torch.rand(40, 5, 3, generator=torch.Generator().manual_seed(0))
    found = seam(errors)
    assert bool((found.diff(dim=1).abs() <= 1).all())
    paths = [p for p in itertools.product(range(3), repeat=5) if all(abs(a - b) <= 1 for a, b in itertools.pairwise(p))]
    costs = torch.stack([errors[:, range(5), p].sum(1) for p in map(list, paths)])
    torch.testing.assert_close(errors.gather(2, found[..., None]).sum((1, 2)), costs.amin(0))


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 9, 7), (2, 5, 5)])
def test_an_image_is_sewn_from_its_own_patches(shape: tuple[int, ...]) -> None:
    x = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0))
    quilting = Quilting.of(x, size=5, neighbours=1)
    assert len(quilting.patches) == 2 * (shape[1] - 4) * (shape[2] - 4)
    torch.testing.assert_close(quilting(x), x)


def test_every_pixel_is_a_clean_patchs() -> None:
    quilting = Quilting(torch.tensor([0.25, 0.75])[:, None, None, None].expand(2, 1, 3, 3), neighbours=1)
    found = quilting(X)
    assert set(found.unique().tolist()) == {0.25, 0.75}
    bright = torch.nn.functional.avg_pool2d(X, 3, stride=1)[:, 0, 0, 0] > 0.5  # the first patch has no neighbours yet
    assert torch.equal(found[:, 0, 0, 0] > 0.5, bright)


def test_draws_differ_and_follow_the_seed() -> None:
    quilting = Quilting.of(DIGITS.train.x, size=4, count=3000)

    def drawn(seed: int) -> Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return quilting(X[:4])

    assert torch.equal(drawn(0), drawn(0))
    assert not torch.equal(drawn(0), drawn(1))
    again = Quilting(torch.zeros_like(quilting.patches))
    again.load_state_dict(quilting.state_dict())
    assert torch.equal(again.patches, quilting.patches)


def test_it_repairs_what_was_made_for_the_bare_model_and_falls_to_what_was_made_for_it() -> None:
    net = sp.zoo.build("digits-cnn", seed=0)
    sp.train(net, DIGITS.train, epochs=8)
    classifier = sp.Model(net)
    defended = sp.Defended(classifier, [Quilting.of(DIGITS.train.x, size=4, count=20_000, neighbours=3).transform()], draws=4)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        naive = sp.attack(classifier, X, Y, sp.attacks.PGD(steps=20), sp.Linf(0.2)).adversarial
        bare, repaired = (float((model.predict(naive) == Y).double().mean()) for model in (classifier, defended))
        clean = float((defended.predict(X) == Y).double().mean())
        adaptive = sp.attack(defended, X, Y, sp.attacks.PGD(steps=20), sp.Linf(0.2)).robust_accuracy
    assert clean > 0.7
    assert repaired > bare + 0.15
    assert adaptive < repaired - 0.1


def test_what_cannot_be_quilted() -> None:
    for patches in (torch.rand(4, 1, 3, 4), torch.rand(4, 1, 1, 1), torch.rand(4, 9), 2 * torch.ones(4, 1, 3, 3)):
        with pytest.raises(InputError, match="patches"):
            Quilting(patches)
    with pytest.raises(InputError, match="neighbours"):
        Quilting(torch.rand(4, 1, 3, 3), neighbours=5)
    with pytest.raises(InputError, match="size"):
        Quilting.of(X, size=9)
    for x in (torch.rand(1, 3, 8, 8), torch.rand(1, 1, 2, 8)):
        with pytest.raises(InputError, match="images"):
            Quilting(torch.rand(20, 1, 3, 3))(x)
