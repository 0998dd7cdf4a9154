"""Input transformations do what their papers say, and are attacked as they declare."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import fft, ndimage
from scipy.optimize import minimize
from torch import Tensor, nn

import saddlepoint as sp
from saddlepoint.defenses.transforms import (
    JPEG,
    Bilateral,
    BitDepth,
    CropRescale,
    Gaussian,
    GaussianNoise,
    Mean,
    Median,
    NonLocalMeans,
    RandomResizePad,
    Thermometer,
    TotalVariance,
    least_variation,
)
from saddlepoint.errors import InputError
from saddlepoint.models import InputTransform, TransformLayer
from saddlepoint.models.freeze import global_random_state_kept

DIGITS = sp.data.load("digits")
UNIT = (0.0, 1.0)
EXACT: list[InputTransform] = [Median(3), Mean(3), Gaussian(0.8), Bilateral(3, 0.3), NonLocalMeans(5, 3, 0.4)]
IMAGES: list[InputTransform] = [*EXACT, JPEG(), TotalVariance(steps=20), RandomResizePad(5, 8), CropRescale(6)]
ANY: list[InputTransform] = [BitDepth(3), GaussianNoise(0.1), Thermometer(8)]
SAME_RANGE = [t for t in [BitDepth(2), *IMAGES] if not isinstance(t, RandomResizePad)]


def images(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def smooth(*shape: int, seed: int = 0) -> Tensor:
    """Colours that change slowly, as in photographs."""
    return torch.from_numpy(ndimage.gaussian_filter(images(*shape, seed=seed).numpy(), 3, axes=(2, 3)) * 3 - 1).clamp(0, 1)


def seeded(transform: InputTransform, x: Tensor, seed: int = 0, bounds: tuple[float, float] = UNIT) -> Tensor:
    with global_random_state_kept():
        torch.manual_seed(seed)
        return transform(x, bounds)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_median_and_mean_are_scipys(size: int) -> None:
    x = images(2, 3, 9, 7)
    assert np.array_equal(Median(size)(x).numpy(), ndimage.median_filter(x.numpy(), size=(1, 1, size, size)))
    np.testing.assert_allclose(Mean(size)(x).numpy(), ndimage.uniform_filter(x.numpy(), size=(1, 1, size, size)), atol=1e-12)


@pytest.mark.parametrize("sigma", [0.3, 0.8, 3.0])
def test_gaussian_is_scipys_also_where_windows_exceed_the_image(sigma: float) -> None:
    x = images(2, 3, 9, 7)
    np.testing.assert_allclose(Gaussian(sigma)(x).numpy(), ndimage.gaussian_filter(x.numpy(), sigma, axes=(2, 3)), atol=1e-12)


def padded(image: np.ndarray, edge: int) -> np.ndarray:
    return np.pad(image, ((0, 0), (edge, edge), (edge, edge)), mode="symmetric")


def test_bilateral_by_its_equation() -> None:
    x, color, space = images(2, 3, 5, 4), 0.3, 1.2
    expected = np.zeros(x.shape)
    for n, image in enumerate(x.numpy()):
        around = padded(image, 2)
        for i in range(5):
            for j in range(4):
                weights, values = 0.0, np.zeros(3)
                for a in range(-2, 3):
                    for b in range(-2, 3):
                        other = around[:, i + 2 + a, j + 2 + b]
                        unlike = ((other - image[:, i, j]) ** 2).sum() / (2 * color**2)
                        weight = np.exp(-(a * a + b * b) / (2 * space**2) - unlike)
                        weights, values = weights + weight, values + weight * other
                expected[n, :, i, j] = values / weights
    np.testing.assert_allclose(Bilateral(5, color, space)(x).numpy(), expected, atol=1e-12)


def test_non_local_means_by_their_equation() -> None:
    x, strength = images(2, 2, 5, 4), 0.4
    expected = np.zeros(x.shape)
    for n, image in enumerate(x.numpy()):
        around = padded(image, 3)  # 2 for the search window of 5, 1 for the patch of 3
        for i in range(5):
            for j in range(4):
                weights, values = 0.0, np.zeros(2)
                for a in range(-2, 3):
                    for b in range(-2, 3):
                        mine = around[:, i + 2 : i + 5, j + 2 : j + 5]
                        other = around[:, i + a + 2 : i + a + 5, j + b + 2 : j + b + 5]
                        weight = np.exp(-((mine - other) ** 2).mean() / strength**2)
                        weights, values = weights + weight, values + weight * other[:, 1, 1]
                expected[n, :, i, j] = values / weights
    np.testing.assert_allclose(NonLocalMeans(5, 3, strength)(x).numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("transform", EXACT, ids=repr)
def test_exact_gradients_are_those_of_finite_differences(transform: InputTransform) -> None:
    assert transform.transform(UNIT).attacked == "its own gradients"
    x = images(1, 2, 5, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: transform(x), x, eps=1e-7, atol=1e-5)


@pytest.mark.parametrize("transform", [RandomResizePad(4, 6), CropRescale(4), GaussianNoise(0.1)], ids=repr)
def test_random_ones_are_exact_for_the_draw_that_was_made(transform: InputTransform) -> None:
    assert transform.transform(UNIT).attacked == "its own gradients, averaged over draws"
    x = images(2, 2, 5, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: seeded(transform, x), x, eps=1e-7, atol=1e-5)


@pytest.mark.parametrize("transform", [JPEG(), Thermometer(4)], ids=repr)
def test_substitutes_have_the_gradient_of_finite_differences(transform: InputTransform) -> None:
    bound = transform.transform(UNIT)
    assert bound.attacked == "BPDA, a differentiable substitute"
    for channels in (1, 3):
        x = images(1, channels, 3, 5).requires_grad_()
        assert torch.autograd.gradcheck(bound.backward, x, eps=1e-8, atol=1e-4)
        cotangent = images(*bound.apply(x.detach()).shape, seed=1)
        (declared,) = torch.autograd.grad((bound(x) * cotangent).sum(), x)
        (own,) = torch.autograd.grad((bound.backward(x) * cotangent).sum(), x)
        assert torch.equal(declared, own)


@pytest.mark.parametrize("transform", [BitDepth(3), TotalVariance()], ids=repr)
def test_identity_passes_the_gradient_on(transform: InputTransform) -> None:
    x = images(2, 1, 4, 4).requires_grad_()
    cotangent = images(2, 1, 4, 4, seed=1)
    out = transform(x)
    assert not torch.equal(out, x)
    assert torch.equal(torch.autograd.grad((out * cotangent).sum(), x)[0], cotangent)


@pytest.mark.parametrize("transform", SAME_RANGE, ids=repr)
@pytest.mark.parametrize("bounds", [(-1.0, 1.0), (0.0, 255.0)], ids=str)
def test_other_ranges_are_the_same_in_other_units(transform: InputTransform, bounds: tuple[float, float]) -> None:
    low, high = bounds
    x = images(3, 1, 8, 8)
    there = seeded(transform, x * (high - low) + low, bounds=bounds)
    torch.testing.assert_close(there, seeded(transform, x) * (high - low) + low, atol=1e-9 * (high - low), rtol=0)
    assert bool(((there >= low) & (there <= high)).all())


@pytest.mark.parametrize("transform", [*ANY, *IMAGES], ids=repr)
def test_dtypes_batches_and_what_is_left_alone(transform: InputTransform) -> None:
    x = images(5, 1, 8, 8)
    before = x.clone()
    state = torch.get_rng_state()
    double = seeded(transform, x)
    assert torch.equal(x, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(double, seeded(transform, x))
    single = seeded(transform, x.float())
    assert (double.dtype, single.dtype) == (torch.float64, torch.float32)
    assert len(transform(x[:0])) == 0
    if not transform.transform(UNIT).random:
        torch.testing.assert_close(single.double(), double, atol=1e-3, rtol=0)
        torch.testing.assert_close(torch.cat([transform(x[:2]), transform(x[2:])]), double)


@pytest.mark.parametrize("transform", [t for t in [*ANY, *IMAGES] if t.transform(UNIT).random], ids=repr)
def test_random_ones_draw_for_each_row(transform: InputTransform) -> None:
    rows = seeded(transform, images(1, 1, 8, 8).expand(40, -1, -1, -1))
    assert len(rows.flatten(1).unique(dim=0)) > 8


def test_settings_rebuild_and_describe_the_model() -> None:
    transforms = [*ANY, *IMAGES]
    assert all(eval(repr(transform)) == transform for transform in transforms)
    model = sp.Defended(sp.Model(nn.Flatten()), [BitDepth(4), Median(2), TotalVariance()])
    assert json.loads(json.dumps(model.describe()))["transforms"] == [
        "BitDepth(bits=4)", "Median(size=2)", "TotalVariance(drop=0.5, weight=0.03, steps=100)",
    ]  # fmt: skip
    assert model.draws == 10
    assert model.transforms[2].attacked == "BPDA, identity, averaged over draws"
    x = images(2, 1, 8, 8)
    composed = sp.Defended(sp.Model(nn.Flatten()), [BitDepth(4), Median(2)])
    assert torch.equal(composed.logits(x), Median(2)(BitDepth(4)(x)).flatten(1))


def encoded(x: Tensor, quality: int) -> Tensor:
    """By hand through Pillow, one image at a time."""
    decoded = []
    for image in x:
        file = io.BytesIO()
        pixels = (image * 255).round().byte()
        Image.fromarray(pixels[0].numpy() if len(image) == 1 else pixels.permute(1, 2, 0).numpy()).save(
            file, "JPEG", quality=quality
        )
        found = torch.tensor(np.array(Image.open(file)), dtype=torch.float64) / 255
        decoded.append(found[None] if len(image) == 1 else found.permute(2, 0, 1))
    return torch.stack(decoded)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("quality", [10, 75, 100])
def test_jpeg_is_pillows_and_its_substitute_comes_close(channels: int, quality: int) -> None:
    x = smooth(2, channels, 21, 34)
    value = JPEG(quality)(x)
    assert torch.equal(value, encoded(x, quality))
    away = (JPEG(quality).transform(UNIT).backward(x) - value).abs() * 255
    assert float(away.mean()) < {10: 7, 75: 3, 100: 0.8}[quality]
    assert float((value - x).abs().mean()) * 255 > float(away.mean()) or quality == 100


def test_jpegs_substitute_is_libjpeg_but_for_the_rounding() -> None:
    """Written out by scipy's cosine transform: with whole coefficients it is Pillow's, with soft ones the substitute."""
    x = (smooth(1, 1, 24, 16) * 255).round() / 255
    file = io.BytesIO()
    Image.fromarray((x[0, 0] * 255).byte().numpy()).save(file, "JPEG", quality=50)
    table = np.array(Image.open(file).quantization[0]).reshape(8, 8)

    def by_hand(rounding: Callable[[np.ndarray], np.ndarray]) -> Tensor:
        pixels = x[0, 0].numpy() * 255 - 128
        for i in range(0, 24, 8):
            for j in range(0, 16, 8):
                block = fft.dctn(pixels[i : i + 8, j : j + 8], norm="ortho") / table
                pixels[i : i + 8, j : j + 8] = fft.idctn(rounding(block) * table, norm="ortho")
        return torch.from_numpy(pixels + 128)[None, None] / 255

    def soft(c: np.ndarray) -> np.ndarray:
        return c.round() + ((c - c.round()) + (c - c.round()) ** 3) / 2

    assert float((by_hand(np.round) - JPEG(50)(x)).abs().max()) * 255 < 3  # libjpeg's arithmetic has fixed points
    torch.testing.assert_close(JPEG(50).transform(UNIT).backward(x), by_hand(soft), atol=1e-9, rtol=0)


def test_least_variation_is_scipys_minimum() -> None:
    x = DIGITS.test.x[:2].double()
    kept = (images(*x.shape) >= 0.5).double()
    for weight in (0.03, 0.2):
        found = least_variation(x, kept, weight, 3000)

        def objective(z: Tensor, rounded: float = 0.0, weight: float = weight) -> Tensor:
            rows, columns = z.diff(dim=2).square().sum(3) + rounded**2, z.diff(dim=3).square().sum(2) + rounded**2
            return 0.5 * (kept * (z - x) ** 2).sum() + weight * (rows.sqrt().sum() + columns.sqrt().sum())

        def with_slope(values: np.ndarray) -> tuple[float, np.ndarray]:
            z = torch.from_numpy(values).view_as(x).requires_grad_()
            loss = objective(z, 1e-5)
            return float(loss.detach()), torch.autograd.grad(loss, z)[0].numpy().ravel()

        best = minimize(
            with_slope, x.numpy().ravel(), jac=True, method="L-BFGS-B",
            options={"maxiter": 5000, "maxfun": 9000, "ftol": 1e-15, "gtol": 1e-9},
        )  # fmt: skip
        assert float(objective(found)) == pytest.approx(best.fun, rel=2e-4)
        assert float(objective(found)) <= best.fun * (1 + 1e-6)
        quick = least_variation(x, kept, weight, 100)
        assert float((quick - found).abs().max()) < 0.01
        assert bool(((found >= -1e-9) & (found <= 1 + 1e-9)).all())


def test_total_variance_forgets_what_is_dropped() -> None:
    x = images(1, 1, 6, 6)
    kept = torch.ones_like(x)
    kept[0, 0, 2, 3] = 0
    other = x.clone()
    other[0, 0, 2, 3] = 9.0
    torch.testing.assert_close(least_variation(x, kept, 0.03, 50), least_variation(other, kept, 0.03, 50))
    assert not TotalVariance(drop=0.0).transform(UNIT).random
    flat = torch.full((1, 1, 6, 6), 0.3)
    torch.testing.assert_close(TotalVariance()(flat), flat)


def test_random_resize_pad_against_interpolate() -> None:
    """Each output is the image, resized by nearest neighbours, somewhere on an empty canvas; all sizes and corners come up."""
    x = images(1, 2, 5, 7) / 2 + 0.5  # nothing is 0
    seen = set()
    for image in seeded(RandomResizePad(6, 10), x.expand(600, -1, -1, -1)):
        inside = image[0].nonzero()
        (top, left), (bottom, right) = inside.amin(0).tolist(), inside.amax(0).tolist()
        side = bottom - top + 1
        assert right - left + 1 == side
        resized = nn.functional.interpolate(x, size=(side, side), mode="nearest")[0]
        assert torch.equal(image[:, top : bottom + 1, left : right + 1], resized)
        assert int((image != 0).sum()) == 2 * side * side
        seen.add((side, top, left))
    assert seen == {(s, i, j) for s in (6, 7, 8, 9) for i in range(11 - s) for j in range(11 - s)}
    assert float(RandomResizePad(6, 10)(x, (-1.0, 1.0)).amin()) == -1.0


def test_crop_rescale_against_slices() -> None:
    x = images(1, 2, 5, 6)
    crops = [x[..., i : i + 4, j : j + 4] for i in range(2) for j in range(3)]
    wanted = torch.cat([nn.functional.interpolate(crop, size=(5, 6), mode="bilinear") for crop in crops])
    found = seeded(CropRescale(4), x.expand(200, -1, -1, -1))
    away = (found[:, None] - wanted).abs().flatten(2).amax(2)
    assert float(away.amin(1).amax()) < 1e-12
    assert set(away.argmin(1).tolist()) == set(range(6))


def test_thermometer_by_the_paper() -> None:
    x = torch.tensor([[0.13, 0.66, 0.92, 0.0, 1.0]])
    codes = Thermometer(10)(x).view(5, 10)
    assert codes.sum(1).tolist() == [1, 6, 9, 0, 9]  # x > 1, the last one, is never true
    assert bool((codes.diff(dim=1) <= 0).all())
    assert torch.equal(Thermometer(10)(2 * x - 1, (-1, 1)), Thermometer(10)(x))
    pixels = images(2, 3, 4, 5)
    many = Thermometer(4)(pixels)
    assert many.shape == (2, 12, 4, 5)
    assert torch.equal(many[:, 4:8].sum(1), sum((pixels[:, 1] > k / 4).double() for k in (1, 2, 3)))


def test_a_network_is_trained_and_attacked_behind_its_codes() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        inner = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 10))
    layer = TransformLayer(Thermometer(8))
    trained = sp.train(nn.Sequential(layer, inner), DIGITS.train.take(800), epochs=5, batch_size=64).model
    x, y = DIGITS.test.x[:60], DIGITS.test.y[:60]
    model = sp.Defended(sp.Model(inner), [Thermometer(8)])
    assert torch.equal(model.logits(x), trained.logits(x))
    attack, threat = sp.attacks.PGD(steps=20), sp.Linf(0.15)
    hidden = replace(layer.transform, backward="exact")
    assert sp.attack(model, x, y, attack, threat).robust_accuracy < 0.5 * float((model.predict(x) == y).double().mean())
    assert torch.autograd.grad(layer.transform(x.requires_grad_()).sum(), x)[0].abs().sum() > 0
    assert not hidden(x).requires_grad
    assert "Thermometer(levels=8)" in repr(layer)


def test_layers_own_the_networks_in_them() -> None:
    denoiser = nn.Linear(3, 3)
    layer = TransformLayer(sp.Transform(name="denoise", apply=denoiser))
    assert {id(p) for p in layer.parameters()} == {id(p) for p in denoiser.parameters()}
    assert torch.equal(layer(torch.ones(2, 3)), denoiser(torch.ones(2, 3)))


@pytest.mark.parametrize("transform", IMAGES, ids=repr)
def test_images_are_needed(transform: InputTransform) -> None:
    with pytest.raises(InputError, match=r"images \(N, C, H, W\).*\(4, 64\)"):
        transform(torch.zeros(4, 64))


@pytest.mark.parametrize(
    "transform", [BitDepth(), JPEG(), Bilateral(), NonLocalMeans(), TotalVariance(), Thermometer()], ids=repr
)
def test_a_range_is_needed(transform: InputTransform) -> None:
    with pytest.raises(InputError, match="bounds"):
        sp.Defended(sp.Model(nn.Flatten(), bounds=None), [transform])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BitDepth(0), "bits"), (lambda: BitDepth(17), "bits"), (lambda: Median(0), "size"), (lambda: Mean(0), "size"),
        (lambda: Gaussian(0.0), "sigma"), (lambda: Gaussian(float("nan")), "sigma"), (lambda: GaussianNoise(-1.0), "sigma"),
        (lambda: Bilateral(3, 0.0), "sigma_color"), (lambda: Bilateral(3, 0.1, -1), "sigma_space"),
        (lambda: NonLocalMeans(4), "search must be odd"), (lambda: NonLocalMeans(5, 2), "patch must be odd"),
        (lambda: NonLocalMeans(5, 3, 0.0), "strength"), (lambda: JPEG(0), "quality"), (lambda: JPEG(101), "quality"),
        (lambda: TotalVariance(1.1), "drop"), (lambda: TotalVariance(weight=0.0), "weight"),
        (lambda: TotalVariance(steps=0), "steps"),
        (lambda: RandomResizePad(8, 8), "smallest < size"), (lambda: RandomResizePad(0, 8), "smallest"),
        (lambda: CropRescale(0), "size"), (lambda: CropRescale(9)(torch.zeros(1, 1, 8, 8)), "fit into"),
        (lambda: Thermometer(1), "levels"), (lambda: JPEG()(torch.zeros(1, 2, 8, 8)), "1 or 3 channels"),
        (lambda: sp.Defended(sp.Model(nn.Flatten()), [torch.round]), "sp.Transform"),
    ],
)  # fmt: skip
def test_refused(make, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()
