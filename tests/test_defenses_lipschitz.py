"""1-Lipschitz layers: their constants by their Jacobians and by pairs, and the radii that follow from them."""

import math

import pytest
import torch
from torch import nn
from torch.func import jacrev

import saddlepoint as sp
from saddlepoint import defenses
from saddlepoint.defenses import (
    AOLConv2d,
    AOLLinear,
    FirstChannels,
    LipschitzMargin,
    MaxMin,
    SLLConv2d,
    SLLLinear,
    certified_radius,
)

DIGITS = sp.data.load("digits")
LAYERS = {
    "AOLLinear, narrower": (lambda: AOLLinear(12, 5), (12,)),
    "AOLLinear, wider": (lambda: AOLLinear(5, 12), (5,)),
    "AOLConv2d": (lambda: AOLConv2d(3, 6, 3), (3, 7, 7)),
    "AOLConv2d, strided": (lambda: AOLConv2d(3, 6, 5, stride=2), (3, 8, 8)),
    "SLLLinear": (lambda: SLLLinear(8), (8,)),
    "SLLLinear, wider": (lambda: SLLLinear(8, 20), (8,)),
    "SLLConv2d": (lambda: SLLConv2d(3, kernel=3), (3, 7, 7)),
    "SLLConv2d, wider": (lambda: SLLConv2d(2, 5, kernel=5), (2, 6, 6)),
    "MaxMin": (MaxMin, (6, 3)),
    "FirstChannels": (lambda: FirstChannels(5), (3, 4, 4)),
}


def made(name, scale):
    """A layer in float64 with random weights of some size, so that nothing is left of how it begins."""
    build, shape = LAYERS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = build().double()
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.copy_(scale * torch.randn(parameter.shape, dtype=torch.float64))
    return layer, shape


def steepest(layer, x):
    """The largest singular value of the Jacobian at x (1, ...)."""
    jacobian = jacrev(layer)(x)
    return torch.linalg.matrix_norm(jacobian.reshape(-1, x.numel()), 2).item()


@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_1_lipschitz(name, scale):
    layer, shape = made(name, scale)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _ in range(3):
            x = torch.randn(1, *shape, generator=generator, dtype=torch.float64)
            assert steepest(layer, x) <= 1 + 1e-9
        x = torch.randn(200, *shape, generator=generator, dtype=torch.float64)
        for size in (1e-3, 1.0, 30.0):
            y = x + size * torch.randn(x.shape, generator=generator, dtype=torch.float64)
            moved = (layer(x) - layer(y)).flatten(1).norm(dim=1)
            assert bool((moved <= (x - y).flatten(1).norm(dim=1) * (1 + 1e-9)).all())


@pytest.mark.parametrize("name", ["AOLLinear, narrower", "AOLConv2d", "SLLLinear", "SLLConv2d"])
def test_the_bound_is_not_idle(name):
    """Orthogonal weights are left as they are; residual layers begin near the identity, or reflect."""
    build, shape = LAYERS[name]
    torch.manual_seed(3)
    layer = build().double()
    x = torch.randn(1, *shape, dtype=torch.float64)
    with torch.no_grad():
        assert steepest(layer, x) > 0.5


def test_aol_is_the_papers_scaling():
    layer, _ = made("AOLLinear, wider", 1.0)
    w = layer.weight.detach()
    by_hand = [sum(abs(float(w[:, i] @ w[:, j])) for j in range(5)) ** -0.5 for i in range(5)]
    torch.testing.assert_close(layer.scaled().detach(), w * torch.tensor(by_hand, dtype=torch.float64))
    orthogonal = AOLLinear(4, 4).double()
    with torch.no_grad():
        orthogonal.weight.copy_(torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0])
    torch.testing.assert_close(orthogonal.scaled(), orthogonal.weight)


def test_sll_is_the_papers_equation_and_a_1x1_convolution_is_linear():
    layer, _ = made("SLLLinear, wider", 0.5)
    w, q = layer.weight.T, layer.log_q.exp()
    t = ((w.T @ w).abs() * q[None] / q[:, None]).sum(1)
    x = torch.randn(4, 8, dtype=torch.float64)
    torch.testing.assert_close(layer(x), x - 2 * (torch.relu(x @ w + layer.bias) / t) @ w.T)
    spatial = SLLConv2d(8, 20, kernel=1).double()
    with torch.no_grad():
        for name in ("bias", "log_q"):
            getattr(spatial, name).copy_(getattr(layer, name))
        spatial.weight.copy_(layer.weight[:, :, None, None])
    torch.testing.assert_close(spatial(x[:, :, None, None]).flatten(1), layer(x))


@pytest.mark.parametrize("name", ["AOLLinear, wider", "AOLConv2d, strided", "SLLLinear", "SLLConv2d"])
def test_gradients_pass_the_scaling(name):
    layer, shape = made(name, 0.5)
    x = torch.randn(2, *shape, dtype=torch.float64)

    def value(*parameters):
        state = dict(zip([n for n, _ in layer.named_parameters()], parameters, strict=True))
        return torch.func.functional_call(layer, state, (x,))

    parameters = tuple(parameter.detach().clone().requires_grad_() for parameter in layer.parameters())
    assert torch.autograd.gradcheck(value, parameters)


# ---- the certificate


def small_net(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            FirstChannels(4), SLLConv2d(4, 8, 3), AOLConv2d(4, 8, 3, stride=2), MaxMin(), nn.Flatten(),
            AOLLinear(128, 32), MaxMin(), SLLLinear(32), AOLLinear(32, 10),
        )  # fmt: skip


@pytest.fixture(scope="module")
def trained():
    objective = LipschitzMargin(threat=sp.L2(0.5))
    return sp.train(small_net(), DIGITS.train, adversary=objective, epochs=10, learning_rate=1e-2, batch_size=64).model


def test_no_attack_gets_inside_the_radius(trained):
    x, y = DIGITS.test.x[:200], DIGITS.test.y[:200]
    radii = certified_radius(trained, x)
    right = trained.predict(x) == y
    assert float(right.float().mean()) > 0.65
    assert float((radii[right] > 0.1).float().mean()) > 0.5
    nearest = sp.attack(trained, x[right], y[right], sp.attacks.DeepFool(), sp.Minimize("l2"))
    assert bool(nearest.success.any())
    fooled = nearest.success
    assert bool((nearest.distances["l2"][fooled] >= radii[right][fooled] - 1e-5).all())


def test_the_radius_is_that_of_each_pair_of_rows():
    head = nn.Linear(3, 3).double()
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 4]]))
        head.bias.zero_()
    x = torch.tensor([[0.9, 0.2, 0.1]], dtype=torch.float64)
    model = sp.Model(nn.Sequential(nn.Identity(), head))
    expected = min((0.9 - 0.2) / math.sqrt(2), (0.9 - 0.4) / math.sqrt(17))
    assert certified_radius(model, x).item() == pytest.approx(expected)
    # the distance to a linear boundary is exact: just beyond it the class changes
    w = head.weight[2] - head.weight[0]
    beyond = x + (expected + 1e-6) * w.detach() / w.detach().norm()
    assert model.predict(beyond).item() == 2
    scaled = sp.Model(nn.Sequential(nn.Identity(), head), std=[0.5])
    assert certified_radius(scaled, x).item() == pytest.approx(expected)  # logits are twice as large, and twice as steep
    bare = sp.Model(nn.Sequential(nn.Identity(), nn.Tanh()))
    margin = math.tanh(0.9) - math.tanh(0.2)
    assert certified_radius(bare, x).item() == pytest.approx(margin / math.sqrt(2))


def test_the_margin_loss_is_the_papers():
    net = nn.Linear(4, 3).double()
    x, y = torch.rand(5, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 1, 0])
    batch = defenses.Batch(sp.Model(net), x, y, torch.arange(5), 0, 0.0)
    z = net(x).clone()
    z[torch.arange(5), y] -= 0.7
    expected = 0.5 * nn.functional.cross_entropy(z / 0.5, y)
    torch.testing.assert_close(LipschitzMargin(threat=sp.L2(1.0), offset=0.7, temperature=0.5).loss(batch), expected)
    assert LipschitzMargin(threat=sp.L2(2.0)).margin == pytest.approx(2 * math.sqrt(2))


def test_layers_are_read_by_the_propagation():
    """The scaling depends on no input, so bounds of boxes see a plain convolution."""
    model = sp.Model(nn.Sequential(AOLConv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), AOLLinear(256, 10)))
    x, y = DIGITS.test.x[:4], DIGITS.test.y[:4]
    exact = defenses.lowest_margins(model, x, y, sp.Linf(0.0))
    logits = model.logits(x)
    other = logits.clone()
    other[torch.arange(4), y] = -math.inf
    torch.testing.assert_close(exact, logits[torch.arange(4), y] - other.amax(1), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("net", "text"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10)), "1 is Linear"),
        (nn.Sequential(nn.Flatten(), nn.Sequential(nn.BatchNorm1d(64)), AOLLinear(64, 10)), r"1\.0 is BatchNorm1d"),
        (nn.Sequential(nn.Flatten(), AOLLinear(64, 10), nn.Softmax(1)), "Softmax"),
    ],
)
def test_other_layers_are_refused(net, text):
    with pytest.raises(sp.ModelError, match=text):
        certified_radius(sp.Model(net), DIGITS.test.x[:2])


def test_models_that_are_more_than_a_network_are_refused():
    model = sp.Model(nn.Sequential(nn.Flatten(), AOLLinear(64, 10)))
    with pytest.raises(sp.ModelError, match="nothing before it"):
        certified_radius(sp.Defended(model, [sp.transforms.BitDepth(3)]), DIGITS.test.x[:2])
    with pytest.raises(sp.ModelError, match="logits"):
        certified_radius(sp.Model(model.net, gives="probabilities"), DIGITS.test.x[:2])
    one = sp.Model(nn.Sequential(nn.Flatten(), AOLLinear(64, 1)))
    with pytest.raises(sp.ModelError, match="2 logits"):
        certified_radius(one, DIGITS.test.x[:2])


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: AOLConv2d(1, 2, kernel=4), "odd"),
        (lambda: SLLConv2d(1, 2, kernel=2), "odd"),
        (lambda: MaxMin()(torch.zeros(1, 3)), "pairs"),
        (lambda: FirstChannels(2)(torch.zeros(1, 3)), "drop"),
        (lambda: LipschitzMargin(threat=sp.Linf(0.1)), "l2"),
        (lambda: LipschitzMargin(threat=sp.L2(1.0), temperature=0), "temperature"),
        (lambda: LipschitzMargin(threat=sp.L2(1.0), offset=-1), "offset"),
    ],
)
def test_bad_input(build, text):
    with pytest.raises(sp.InputError, match=text):
        build()
