"""Estimators as models: their answers are scikit-learn's own, their gradients those of finite differences."""

from __future__ import annotations

import subprocess
import sys
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.calibration import CalibratedClassifierCV
from sklearn.compose import ColumnTransformer
from sklearn.datasets import load_iris
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis, QuadraticDiscriminantAnalysis
from sklearn.ensemble import (
    AdaBoostClassifier,
    BaggingClassifier,
    ExtraTreesClassifier,
    GradientBoostingClassifier,
    HistGradientBoostingClassifier,
    RandomForestClassifier,
    VotingClassifier,
)
from sklearn.linear_model import LinearRegression, LogisticRegression, Perceptron, RidgeClassifier, SGDClassifier
from sklearn.model_selection import FixedThresholdClassifier, GridSearchCV
from sklearn.multiclass import OneVsRestClassifier
from sklearn.naive_bayes import BernoulliNB, GaussianNB, MultinomialNB
from sklearn.neighbors import KNeighborsClassifier
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import (
    FunctionTransformer,
    KBinsDiscretizer,
    MaxAbsScaler,
    MinMaxScaler,
    Normalizer,
    PowerTransformer,
    RobustScaler,
    StandardScaler,
)
from sklearn.svm import SVC, LinearSVC, NuSVC
from sklearn.tree import DecisionTreeClassifier
from torch import Tensor, nn

import saddlepoint as sp
from saddlepoint.models import estimators

Estimator = Any
Array = Any


def product_kernel(first: Array, second: Array) -> Array:
    return first @ second.T


CLOSED = {
    "logistic regression": LogisticRegression(C=10),
    "linear SVC": LinearSVC(),
    "SGD, hinge": SGDClassifier(random_state=0),
    "SGD, log": SGDClassifier(loss="log_loss", random_state=0),
    "perceptron": Perceptron(random_state=0),
    "ridge": RidgeClassifier(),
    "LDA": LinearDiscriminantAnalysis(),
    "Gaussian naive Bayes": GaussianNB(),
    "MLP, relu": MLPClassifier((8, 6), max_iter=60, random_state=0),
    "MLP, tanh": MLPClassifier((5,), activation="tanh", max_iter=30, random_state=0),
    "MLP, logistic": MLPClassifier((5,), activation="logistic", max_iter=30, random_state=0),
    "MLP, identity": MLPClassifier((5,), activation="identity", max_iter=30, random_state=0),
    "SVC, rbf": SVC(C=5),
    "SVC, linear": SVC(kernel="linear"),
    "SVC, poly": SVC(kernel="poly", degree=3, coef0=0.5),
    "SVC, sigmoid": SVC(kernel="sigmoid", gamma=0.1),
    "SVC, ties broken": SVC(break_ties=True),
    "SVC, pairs": SVC(decision_function_shape="ovo"),
    "NuSVC": NuSVC(nu=0.2),
    "search": GridSearchCV(SVC(), {"C": [1, 10]}, cv=2),
    "standard scaler": make_pipeline(StandardScaler(), SVC()),
    "not centred": make_pipeline(StandardScaler(with_mean=False), StandardScaler(with_std=False), LogisticRegression()),
    "min-max, clipped": make_pipeline(MinMaxScaler((-1, 1), clip=True), LogisticRegression()),
    "max-abs": make_pipeline(MaxAbsScaler(), "passthrough", LinearSVC()),
    "robust": make_pipeline(RobustScaler(), RobustScaler(with_centering=False), GaussianNB()),
    "PCA": make_pipeline(PCA(3), FunctionTransformer(), SVC()),
    "PCA, whitened": make_pipeline(PCA(2, whiten=True), MLPClassifier((5,), max_iter=30, random_state=0)),
    "normalizer, l2": make_pipeline(Normalizer(), LogisticRegression(C=10)),
    "normalizer, l1": make_pipeline(Normalizer("l1"), LogisticRegression(C=10)),
    "normalizer, max": make_pipeline(Normalizer("max"), make_pipeline(StandardScaler(), LogisticRegression(C=10))),
}
SCORES = {
    "tree": DecisionTreeClassifier(max_depth=3, random_state=0),
    "forest": RandomForestClassifier(5, random_state=0),
    "extra trees": ExtraTreesClassifier(5, random_state=0),
    "boosting": GradientBoostingClassifier(n_estimators=4, random_state=0),
    "histograms": HistGradientBoostingClassifier(max_iter=4),
    "AdaBoost": AdaBoostClassifier(n_estimators=4, random_state=0),
    "bagging": BaggingClassifier(n_estimators=4, random_state=0),
    "k-NN": KNeighborsClassifier(3),
    "multinomial naive Bayes": MultinomialNB(),
    "Bernoulli naive Bayes": BernoulliNB(binarize=0.5),
    "QDA": QuadraticDiscriminantAnalysis(),
    "calibrated": CalibratedClassifierCV(LinearSVC(), cv=2),
    "one versus the rest": OneVsRestClassifier(LogisticRegression()),
    "bins, SVC": make_pipeline(KBinsDiscretizer(3, quantile_method="averaged_inverted_cdf"), SVC()),
    "power, forest": make_pipeline(PowerTransformer(), RandomForestClassifier(5, random_state=0)),
    "one step": make_pipeline(RandomForestClassifier(5, random_state=0)),
    "voting, soft": VotingClassifier([("a", GaussianNB()), ("b", LogisticRegression())], voting="soft"),
}
LABELS = {
    "voting, hard": VotingClassifier([("a", GaussianNB()), ("b", LogisticRegression())]),
    "bins, voting": make_pipeline(
        KBinsDiscretizer(3, quantile_method="averaged_inverted_cdf"), VotingClassifier([("a", SVC())])
    ),
}
each_number_of_classes = pytest.mark.parametrize("classes", [2, 3])


def data(classes: int) -> tuple[Array, Array]:
    """Iris in [0, 1], with names for labels."""
    x, y = load_iris(return_X_y=True)
    chosen = y >= 3 - classes  # the last two overlap
    x = (x - x.min(0)) / (x.max(0) - x.min(0))
    return x[chosen], np.array(["virginica", "setosa", "x"])[y[chosen]]


def fitted(estimator: Estimator, classes: int) -> Estimator:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return estimator.fit(*data(classes))


def questions() -> Array:
    """Points in and around the unit cube."""
    return np.random.default_rng(1).uniform(-0.2, 1.2, (300, 4)).astype(np.float32)


def nonnegative(name: str, x: Array) -> Array:
    return np.abs(x) if name == "multinomial naive Bayes" else x


def reference(estimator: Estimator, x: Array) -> Array:
    """Scikit-learn's own logits, up to a shift: decision values, or log-probabilities."""
    ask = getattr(estimator, "decision_function", None) or estimator.predict_log_proba
    values = ask(x)
    return np.stack([np.zeros(len(x)), values], 1) if values.ndim == 1 else values


# Closed forms


@each_number_of_classes
@pytest.mark.parametrize("name", CLOSED)
def test_closed_forms_give_the_estimators_own_answers(name: str, classes: int) -> None:
    estimator, x = fitted(CLOSED[name], classes), questions()
    model = sp.Model(estimator, bounds=None)
    assert model.access is sp.Access.GRADIENTS
    assert model.num_classes == classes
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        asked = torch.tensor(x).to(dtype)
        logits = model.logits(asked)
        assert logits.dtype == dtype
        predicted = estimator.classes_[model.predict(asked)]
        assert (predicted == estimator.predict(asked.numpy())).mean() >= (1 if dtype == torch.float64 else 0.99)
        last = estimator.best_estimator_ if name == "search" else estimator
        last = last[-1] if hasattr(last, "steps") else last
        if classes == 2 or not isinstance(
            last, SVC | NuSVC
        ):  # three machines vote, and their decision values say something else
            mine, theirs = logits.numpy(), reference(estimator, asked.numpy())
            difference = (mine - mine[:, :1]) - (theirs - theirs[:, :1])
            assert np.abs(difference).max() <= tolerance * (1 + np.abs(theirs).max())


@each_number_of_classes
@pytest.mark.parametrize("name", CLOSED)
def test_gradients_are_those_of_finite_differences(name: str, classes: int) -> None:
    estimator = fitted(CLOSED[name], classes)
    net = sp.Model(estimator, bounds=None).forward
    x = torch.tensor(questions()[:6]).double().clamp(0.05, 0.95).requires_grad_()
    assert torch.autograd.gradcheck(net, (x,), eps=1e-7, atol=1e-4, rtol=1e-4)
    (gradient,) = torch.autograd.grad(net(x)[:, -1].sum() - net(x)[:, 0].sum(), x)
    assert (gradient.abs().amax(1) > 0).any()


def test_a_search_by_gradients_changes_the_estimators_mind() -> None:
    x = torch.tensor(data(3)[0]).float()
    for estimator in (SVC(C=5), make_pipeline(StandardScaler(), MLPClassifier((8,), max_iter=60, random_state=0))):
        model = sp.Model(fitted(estimator, 3))
        result = sp.attack(model, x, model.predict(x), "deepfool", sp.Minimize("l2"))
        assert result.success.float().mean() > 0.95
        changed = estimator.predict(result.adversarial.numpy()) != estimator.predict(x.numpy())
        assert np.array_equal(changed, result.success.numpy())


def test_images_and_half_precision() -> None:
    estimator, x = fitted(SVC(), 3), torch.tensor(questions())
    model = sp.Model(estimator, bounds=None)
    torch.testing.assert_close(model.logits(x.view(-1, 1, 2, 2)), model.logits(x), rtol=0, atol=0)
    half = model.logits(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), model.logits(x.bfloat16().float()), rtol=0.01, atol=0.01)
    forest = sp.Model(fitted(RandomForestClassifier(3, random_state=0), 3), bounds=None)
    assert torch.equal(forest.predict(x.bfloat16().view(-1, 2, 2)), forest.predict(x.bfloat16().float()))


def test_a_module_in_float32_is_near_the_one_in_float64() -> None:
    net = sp.Model(fitted(SVC(), 3), bounds=None).net
    assert isinstance(net, nn.Module)
    assert not list(net.parameters())  # so that inputs need not be float64
    x = torch.tensor(questions())
    exact = net(x)
    torch.testing.assert_close(net.float()(x), exact, rtol=1e-4, atol=1e-4)


# Votes


def pair_values(classes: int, count: int = 400) -> Tensor:
    generator = torch.Generator().manual_seed(classes)
    return torch.randn(count, classes * (classes - 1) // 2, generator=generator, dtype=torch.float64)


def votes_and_sums(values: Array, classes: int) -> tuple[Array, Array]:
    """Counted as libsvm does."""
    votes, sums = np.zeros(classes, dtype=int), np.zeros(classes)
    pairs = [(i, j) for i in range(classes) for j in range(i + 1, classes)]
    for (i, j), value in zip(pairs, values, strict=True):
        votes[i if value > 0 else j] += 1
        sums[i] += value
        sums[j] -= value
    return votes, sums


@pytest.mark.parametrize("break_ties", [False, True])
@pytest.mark.parametrize("classes", [3, 4, 5, 7])
def test_the_votes_elect_who_was_elected(classes: int, break_ties: bool) -> None:
    values = pair_values(classes)
    logits = estimators._Votes(classes, break_ties)(values)
    for row, logit in zip(values.numpy(), logits.numpy(), strict=True):
        votes, sums = votes_and_sums(row, classes)
        elected = max(range(classes), key=lambda c: (votes[c], sums[c] if break_ties else -c))
        assert logit.argmax() == elected
        assert (logit > 0).tolist() == [c == elected for c in range(classes)]


@pytest.mark.parametrize("classes", [3, 5])
def test_the_winners_vote_logit_is_the_room_that_is_left(classes: int) -> None:
    """No change of the decision values by less than it changes the verdict; some change by more does."""
    values = pair_values(classes, 100)
    elect = estimators._Votes(classes, False)
    logits = elect(values)
    winner, room = logits.argmax(1), logits.amax(1)
    signs = torch.randint(0, 2, (200, *values.shape), generator=torch.Generator().manual_seed(0)).double() * 2 - 1
    within = elect((values + 0.999 * room[:, None] * signs).flatten(0, 1)).argmax(1).view(200, -1)
    assert torch.equal(within, winner.expand(200, -1))
    beyond = elect((values + 1.001 * room[:, None] * signs).flatten(0, 1)).argmax(1).view(200, -1)
    assert ((beyond != winner).any(0)).float().mean() > 0.9


# Estimators that are asked


@each_number_of_classes
@pytest.mark.parametrize("name", SCORES | LABELS)
def test_other_estimators_are_asked(name: str, classes: int) -> None:
    estimator = fitted((SCORES | LABELS)[name], classes)
    x = nonnegative(name, questions())
    model = sp.Model(estimator, bounds=None)
    assert model.access is (sp.Access.SCORES if name in SCORES else sp.Access.LABELS)
    assert np.array_equal(estimator.classes_[model.predict(torch.tensor(x))], estimator.predict(x))
    if name in SCORES and hasattr(estimator, "predict_proba"):
        probabilities = model.logits(torch.tensor(x).double()).softmax(1).numpy()
        if name != "AdaBoost":
            np.testing.assert_allclose(probabilities, estimator.predict_proba(x.astype(np.float64)), atol=1e-9)


def test_where_scores_and_predictions_disagree_only_labels_are_given() -> None:
    strict = FixedThresholdClassifier(LogisticRegression(), threshold=0.8, pos_label="x")
    for estimator, classes in ((strict, 2), (SVC(kernel=product_kernel), 3)):
        model = sp.Model(fitted(estimator, classes), bounds=None)
        assert model.access is sp.Access.LABELS
        x = questions()
        assert np.array_equal(estimator.classes_[model.predict(torch.tensor(x))], estimator.predict(x))


def test_a_subclass_may_do_something_else() -> None:
    class Contrary(LogisticRegression):
        def predict_proba(self, X: Array) -> Array:
            return super().predict_proba(X)[:, ::-1]

    model = sp.Model(fitted(Contrary(), 2), bounds=None)
    assert model.access is sp.Access.SCORES
    plain = sp.Model(fitted(LogisticRegression(), 2), bounds=None)
    x = torch.tensor(questions())
    assert torch.equal(model.predict(x), 1 - plain.predict(x))


def test_inputs_are_left_as_they_are() -> None:
    estimator = fitted(make_pipeline(StandardScaler(copy=False), KNeighborsClassifier(3)), 3)
    x = torch.tensor(questions())
    before = x.clone()
    sp.Model(estimator, bounds=None).predict(x)
    assert torch.equal(x, before)


def test_columns_by_name() -> None:
    pandas = pytest.importorskip("pandas")
    x, y = data(3)
    frame = pandas.DataFrame(x, columns=["a", "b", "c", "d"])
    chosen = ColumnTransformer([("scaled", StandardScaler(), ["d", "b"])])
    estimator = make_pipeline(chosen, RandomForestClassifier(5, random_state=0)).fit(frame, y)
    predicted = sp.Model(estimator).predict(torch.tensor(x))
    assert np.array_equal(estimator.classes_[predicted], estimator.predict(frame))


def test_what_is_no_fitted_classifier_is_said_to_be_none() -> None:
    x, y = data(3)
    several = np.eye(3)[np.unique(y, return_inverse=True)[1]].astype(int)
    cases = {
        "not fitted": RandomForestClassifier(),
        "call its fit": make_pipeline(StandardScaler(), SVC()),
        "no classifier": LinearRegression().fit(x, x[:, 0]),
        "no classes_": StandardScaler().fit(x),
        "several labels": KNeighborsClassifier().fit(x, several),
        "one label an input": RidgeClassifier().fit(x, several),
        "a single class": DecisionTreeClassifier().fit(x, np.zeros(len(x))),
    }
    for told, estimator in cases.items():
        with pytest.raises(sp.InputError, match=told):
            sp.Model(estimator)
    for estimator in (SVC().fit(x, y), RandomForestClassifier(2).fit(x, y)):
        with pytest.raises(sp.InputError, match=r"takes 4 features; inputs of shape \(1, 3, 3\) have 9"):
            sp.Model(estimator).predict(torch.rand(2, 1, 3, 3))


def test_nothing_is_imported_to_recognise() -> None:
    code = (
        "import sys; from saddlepoint.models import estimators; known = set(sys.modules);"
        "assert not estimators.recognises(object()); new = set(sys.modules) - known;"
        "assert not new & {'sklearn', 'xgboost', 'lightgbm'}, new"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# Other libraries


@each_number_of_classes
def test_xgboost(classes: int) -> None:
    xgboost = pytest.importorskip("xgboost")
    x, y = data(classes)
    y = np.unique(y, return_inverse=True)[1]
    asked = torch.tensor(questions())
    for estimator in (xgboost.XGBClassifier(n_estimators=5), xgboost.XGBRFClassifier(n_estimators=5)):
        estimator.fit(x, y)
        model = sp.Model(estimator, bounds=None)
        assert model.access is sp.Access.SCORES
        np.testing.assert_allclose(model.logits(asked).softmax(1), estimator.predict_proba(asked.numpy()), atol=1e-5)
        booster = sp.Model(estimator.get_booster(), bounds=None)
        assert booster.num_classes == classes
        torch.testing.assert_close(booster.logits(asked), model.logits(asked))
        piped = sp.Model(make_pipeline(PowerTransformer(), estimator).fit(x, y), bounds=None)
        assert piped.logits(asked).amin() < 0  # margins, no probabilities
    with pytest.raises(sp.InputError, match="no classifier: its objective is 'reg:squarederror'"):
        sp.Model(xgboost.XGBRegressor(n_estimators=2).fit(x, y).get_booster())
    with pytest.raises(sp.InputError, match="not fitted"):
        sp.Model(xgboost.XGBClassifier())
    with pytest.raises(sp.InputError, match="takes 4 features"):
        booster.predict(torch.rand(2, 5))


@each_number_of_classes
def test_lightgbm(classes: int) -> None:
    lightgbm = pytest.importorskip("lightgbm")
    x, y = data(classes)
    asked = torch.tensor(questions())
    estimator = lightgbm.LGBMClassifier(n_estimators=5, verbose=-1).fit(x, y)
    model = sp.Model(estimator, bounds=None)
    assert model.access is sp.Access.SCORES
    np.testing.assert_allclose(
        model.logits(asked).softmax(1), estimator.booster_.predict(questions()) if classes > 2 else _both(estimator), atol=1e-5
    )
    booster = sp.Model(estimator.booster_, bounds=None)
    assert booster.num_classes == classes
    torch.testing.assert_close(booster.logits(asked), model.logits(asked))
    regressor = lightgbm.LGBMRegressor(n_estimators=2, verbose=-1).fit(x, x[:, 0])
    with pytest.raises(sp.InputError, match="objective"):
        sp.Model(regressor.booster_)


def _both(estimator: Estimator) -> Array:
    second = estimator.booster_.predict(questions())
    return np.stack([1 - second, second], 1)
