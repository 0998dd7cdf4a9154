"""Figures that could mislead: what counts as robust, and what a result says of itself."""

import pytest
import torch
from torch import nn

import saddlepoint as sp

DIGITS = sp.data.load("digits")
X = DIGITS.test.take(60).x
Y = DIGITS.test.take(60).y


@pytest.fixture(scope="module")
def model():
    return sp.train(sp.zoo.build("softmax", in_shape=(1, 8, 8)), DIGITS.train, epochs=3, learning_rate=5e-3).model


def test_targeted_attacks_leave_no_wrong_sample_robust(model):
    y = Y.clone()
    y[:20] = (y[:20] + 1) % 10  # now the model errs on these
    result = sp.attack(model, X, y, sp.attacks.BIM(), sp.Linf(1e-6), sp.Targeted("next"))
    assert result.robust_accuracy == pytest.approx(result.clean_accuracy)
    assert result.robust_accuracy < 0.7


def test_a_sample_is_robust_to_all_targets_or_not_at_all(model):
    result = sp.attack(model, X, Y, sp.attacks.PGD(steps=10), sp.Linf(0.1), sp.Targeted("all"))
    assert len(result) == 9 * len(X)
    by_sample = result.success.view(len(X), 9).any(1) | (model.predict(X) != Y)
    assert result.robust_accuracy == pytest.approx(1 - float(by_sample.double().mean()))
    assert f"{len(X)} towards 9 targets" in result.summary()


def test_without_labels_nothing_is_said_of_accuracy(model):
    result = sp.attack(model, X, None, sp.attacks.PGD(steps=5), sp.Linf(0.01), sp.FalsePositive(probability=0.999))
    assert result.clean_accuracy != result.clean_accuracy
    assert "clean accuracy                    -" in result.summary()
    assert result.robust_accuracy == pytest.approx(1 - float(result.success.double().mean()))


def test_nan_is_neither_right_nor_robust():
    class Broken(nn.Module):
        def forward(self, x):
            return x.flatten(1)[:, :10] * torch.nan

    with pytest.warns(sp.SaddlepointWarning, match="NaN"):
        result = sp.attack(sp.Model(Broken()), X, Y * 0, sp.attacks.FGSM(), sp.Linf(0.1))
    assert (result.status == "error").all()
    assert result.clean_accuracy == 0
    assert result.robust_accuracy == 0


def test_a_budget_that_ends_the_attack_is_said(model):
    cut = sp.attack(model, X, Y, sp.attacks.PGD(steps=40), sp.Linf(0.01), budget=sp.Budget(passes=7))
    assert any("budget" in note and "of 40 steps" in note for note in cut.notes)
    whole = sp.attack(model, X, Y, sp.attacks.PGD(steps=3), sp.Linf(0.01), budget=sp.Budget(passes=100))
    assert not any("budget" in note for note in whole.notes)


def test_eps_beyond_the_input_range_is_said(model):
    assert any("1/255" in note for note in sp.attack(model, X, Y, sp.attacks.FGSM(), sp.Linf(8)).notes)
    assert not any("1/255" in note for note in sp.attack(model, X, Y, sp.attacks.FGSM(), sp.Linf(0.5)).notes)


def test_sigmoid_outputs_are_noticed(model):
    with pytest.warns(sp.SaddlepointWarning, match="sigmoid"):
        sp.attack(sp.Model(nn.Sequential(Scaled(model.networks()[0]), nn.Sigmoid())), X, Y, "fgsm", sp.Linf(0.1))


class Scaled(nn.Module):
    """A network with large logits, as a trained one has."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return 20 * self.net(x)


def test_a_finished_result_is_not_taken_for_another_run(model):
    result = sp.attack(model, X, Y, sp.attacks.FGSM(), sp.Linf(0.3))
    with pytest.raises(sp.InputError, match="threat"):
        sp.attack(model, X, Y, sp.attacks.FGSM(), sp.Linf(0.01), resume=result)
    with pytest.raises(sp.InputError, match="data"):
        sp.attack(model, X.flip(0), Y, sp.attacks.FGSM(), sp.Linf(0.3), resume=result)
    again = sp.attack(model, X, Y, sp.attacks.FGSM(), sp.Linf(0.3), resume=result)
    assert torch.equal(again.adversarial, result.adversarial)


def test_training_does_not_continue_on_other_data(tmp_path):
    path = tmp_path / "run.pt"
    sp.train(sp.zoo.build("softmax", in_shape=(1, 8, 8)), (X, Y), epochs=1, checkpoint=path)
    with pytest.raises(sp.DataError, match="data"):
        sp.train(sp.zoo.build("softmax", in_shape=(1, 8, 8)), (X.flip(0), Y), epochs=1, checkpoint=path)


def test_perturb_stays_on_the_grid(model):
    x = torch.round(X * 255) / 255
    threat = sp.Linf(8 / 255, grid=1 / 255)
    moved = sp.perturb(model, x, Y, sp.attacks.PGD(steps=3), threat)
    assert bool(threat.contains(moved, x).all())
    assert not torch.equal(moved, x)


def test_the_own_label_is_no_target_in_a_set_either(model):
    with pytest.raises(sp.InputError, match="own label"):
        sp.attack(model, X, Y, sp.attacks.BIM(), sp.Linf(0.1), sp.Targeted({int(Y[0]), 1}))


def test_crafted_examples_are_those_that_were_right_before(model):
    outcome = sp.harden(model, DIGITS.train.take(200), DIGITS.test.take(100), "fgsm", sp.Linf(0.02), epochs=1)
    before = sp.attack(model, DIGITS.train.take(200).x, DIGITS.train.take(200).y, "fgsm", sp.Linf(0.02))
    assert outcome.crafted == int(before.having("fooled").sum()) < int(before.success.sum())


@pytest.mark.parametrize(
    "call",
    [
        lambda m: sp.attack(m, X.numpy(), Y, "fgsm", sp.Linf(0.1)),
        lambda m: sp.attack(m, [(X, Y, Y)], None, "fgsm", sp.Linf(0.1)),
        lambda m: sp.attack(m, X, Y, "fgsm", 0.1),
        lambda m: sp.attack(m, X, Y, "fgsm", sp.Linf(0.1), "targeted"),
        lambda m: sp.perturb(m, X, Y, "fgm", 0.1),
        lambda m: sp.compare(m, X, Y, ["fgsm"], [sp.Linf(0.1)]),
        lambda m: sp.compare({"m": m}, X, Y, ["fgsmm"], [sp.Linf(0.1)]),
        lambda m: sp.attacks.Restarts(sp.attacks.PGD, 2),
        lambda m: sp.attacks.PGD(steps=2.5),
        lambda m: sp.Adversarial(attack="fgsm", threat=0.1),
        lambda m: sp.train(m, (X, Y), adversary=sp.attacks.PGD()),
        lambda m: sp.train(m, (X, Y + 90)),
    ],
)
def test_wrong_arguments_are_input_errors(model, call):
    with pytest.raises(sp.InputError):
        call(model)


def test_names_of_attacks_work_wherever_attacks_do(model):
    assert sp.perturb(model, X, Y, "fgsm", sp.Linf(0.1)).shape == X.shape
    assert len(sp.compare({"m": model}, X, Y, ["fgsm", "pgd"], [sp.Linf(0.1)]).cells) == 2
    assert sp.Adversarial(attack="fgsm", threat=sp.Linf(0.1)).adversary[0] == sp.attacks.FGSM()
    assert sp.attacks.Restarts("pgd", 2).attack == sp.attacks.PGD()
