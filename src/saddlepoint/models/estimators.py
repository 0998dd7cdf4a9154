"""Classifiers of scikit-learn, XGBoost and LightGBM.

Where the decision values have a closed form they become a module, so that there are gradients. Otherwise the estimator itself
is asked, for margins before probabilities where its probabilities saturate, and for labels where nothing else agrees with them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from saddlepoint.errors import InputError, MissingExtraError
from saddlepoint.models.adapt import Adapted, Gives
from saddlepoint.taxonomy import Access

Estimator = Any  # an object of a library that ships no types
Question = Callable[[Any], Any]  # from an array, or a data frame, to an array
_LIBRARIES = ("sklearn", "xgboost", "lightgbm")
_LINEAR = (
    "LogisticRegression", "LogisticRegressionCV", "LinearSVC", "SGDClassifier", "Perceptron", "PassiveAggressiveClassifier",
    "RidgeClassifier", "RidgeClassifierCV", "LinearDiscriminantAnalysis",
)  # fmt: skip
_SVM = ("SVC", "NuSVC")
_KERNELS = ("linear", "rbf", "poly", "sigmoid")
_SATURATED = ("GradientBoostingClassifier", "HistGradientBoostingClassifier", "QuadraticDiscriminantAnalysis", *_SVM)
_THRESHOLDS = ("TunedThresholdClassifierCV", "FixedThresholdClassifier")  # they predict something else than their scores say


def recognises(net: object) -> bool:
    """Whether this is an estimator of one of the three libraries, or made from one. Imports none of them."""
    return not isinstance(net, nn.Module) and any(library_of(base) in _LIBRARIES for base in type(net).__mro__)


def adapted(net: object) -> Adapted:
    """The classifier as a function of inputs (N, ...), which are flattened to its features.

    Column k of the logits belongs to `classes_[k]`, and so does label k.
    Errors: `InputError` for what is not fitted, for regressors, and for several labels at once.
    """
    name = type(net).__name__
    if name == "Booster":
        return _booster(net)
    classes = _classes(net)
    estimator: Estimator = getattr(net, "best_estimator_", net)  # a search predicts by the best that it found
    if (layers := _layers(estimator)) is not None:
        return Adapted(ClosedForm(layers, features_of(net), name), Access.GRADIENTS, "logits", classes, name)
    ask, gives = _question(estimator, classes)
    return Adapted(_Asked(ask, net, gives), Access.LABELS if gives == "labels" else Access.SCORES, gives, classes, name)


def _question(estimator: Estimator, classes: int) -> tuple[Question, Gives]:
    """What to ask of arrays (N, D), and what comes back."""
    if _is(estimator, "Pipeline") and len(estimator.steps) > 1:
        return _after_transforms(estimator)
    if library_of(type(estimator)) == "xgboost":
        return partial(estimator.predict, output_margin=True, validate_features=False), "logits"
    if library_of(type(estimator)) == "lightgbm":
        return partial(estimator.booster_.predict, raw_score=True), "logits"
    if _has_labels_only(estimator, classes):
        return partial(_positions, estimator), "labels"
    if hasattr(estimator, "predict_proba") and not _is(estimator, *_SATURATED):
        return estimator.predict_proba, "probabilities"
    return estimator.decision_function, "logits"


def _has_labels_only(estimator: Estimator, classes: int) -> bool:
    if _is(estimator, *_SVM):  # without a closed form: votes that tie go to the first class, whatever the decision values say
        return classes > 2 and not estimator.break_ties
    return _is(estimator, *_THRESHOLDS) or not (hasattr(estimator, "predict_proba") or hasattr(estimator, "decision_function"))


def _positions(estimator: Estimator, x: Any) -> Any:
    """The predicted labels as positions in `classes_`."""
    positions = {label: position for position, label in enumerate(estimator.classes_.tolist())}
    return np.array([positions[label] for label in estimator.predict(x).tolist()], dtype=np.int64)


def _after_transforms(pipeline: Estimator) -> tuple[Question, Gives]:
    """Transforms that have no closed form, and then what the last step makes of their output."""
    last, transform = adapted(pipeline.steps[-1][1]), pipeline[:-1].transform

    def ask(array: Any) -> Any:
        made = transform(array)
        made = made.toarray() if hasattr(made, "toarray") else np.asarray(made)
        wide = np.result_type(made, np.float32)
        return last.call(torch.from_numpy(np.array(made, dtype=wide))).numpy()

    return ask, last.gives


def library_of(cls: type) -> str:
    """The package that a class comes from."""
    return cls.__module__.partition(".")[0]


def _is(estimator: Estimator, *names: str) -> bool:
    """Whether this is one of scikit-learn's own classes: a subclass may do something else."""
    return type(estimator).__name__ in names and library_of(type(estimator)) == "sklearn"


def _classes(net: Estimator) -> int:
    """How many there are, of a fitted classifier with one output."""
    from sklearn.exceptions import NotFittedError
    from sklearn.utils.validation import check_is_fitted

    name = type(net).__name__
    try:
        check_is_fitted(net)
    except NotFittedError:
        raise InputError(f"this {name} is not fitted yet: call its fit(X, y) first") from None
    except TypeError:
        raise InputError(f"{name} is no estimator that could be asked") from None
    classes = getattr(net, "classes_", None)
    if classes is None or not hasattr(net, "predict"):
        raise InputError(f"{name} is no classifier: it has no classes_, as those have that predict labels")
    kind = str(getattr(getattr(net, "_label_binarizer", None), "y_type_", ""))
    if isinstance(classes, list) or kind.startswith("multilabel") or getattr(net, "multilabel_", False):
        raise InputError(f"this {name} gives several labels at once; a classifier with one label an input is needed")
    if len(classes) < 2:
        raise InputError(f"this {name} knows a single class: fit it on data with at least two")
    return len(classes)


def features_of(net: Estimator) -> int | None:
    """How many it takes; None where it doesn't say."""
    if type(net).__name__ == "Booster":
        return int(net.num_features() if library_of(type(net)) == "xgboost" else net.num_feature())
    count = getattr(net, "n_features_in_", None)
    return None if count is None else int(count)


def _flat(x: Tensor, features: int | None, name: str) -> Tensor:
    """Inputs (N, features)."""
    if features is not None and x.shape[1:].numel() != features:
        shape = tuple(x.shape[1:])
        raise InputError(f"{name} takes {features} features; inputs of shape {shape} have {x.shape[1:].numel()}")
    return x.flatten(1)


# Estimators that are asked


class _Asked:
    """A question about arrays as a function of tensors (N, ...)."""

    def __init__(self, ask: Question, net: Estimator, gives: Gives) -> None:
        self.ask, self.gives, self.estimator = ask, gives, net
        self.features, self.name = features_of(net), type(net).__name__
        named = library_of(type(net)) == "sklearn" and hasattr(net, "feature_names_in_")
        self.columns = list(net.feature_names_in_) if named else None

    def __call__(self, x: Tensor) -> Tensor:
        rows = _flat(x.detach(), self.features, self.name)
        rows = rows if rows.dtype == torch.float64 else rows.float()  # numpy has no bfloat16
        asked = rows.cpu().numpy().copy()  # transforms with copy=False change it
        answer = torch.from_numpy(np.array(self.ask(self._table(asked))))
        return answer.to(x.device, torch.int64 if self.gives == "labels" else x.dtype)

    def _table(self, array: Any) -> Any:
        """What was fitted on a data frame may choose columns by name, and wants one."""
        if self.columns is None:
            return array
        try:
            import pandas
        except ImportError:
            raise MissingExtraError(f"a {self.name} that was fitted on a data frame", "pandas", "pandas") from None
        return pandas.DataFrame(array, columns=self.columns)


def _booster(net: Estimator) -> Adapted:
    """A trained booster of XGBoost or LightGBM, by its margins."""
    if library_of(type(net)) == "xgboost":
        from xgboost import DMatrix

        learner = json.loads(net.save_config())["learner"]
        objective, columns = learner["objective"]["name"], int(learner["learner_model_param"]["num_class"])
    else:
        objective, columns = net.dump_model(num_iteration=1)["objective"].partition(" ")[0], net.num_model_per_iteration()
    if not objective.startswith(("binary", "multi")):
        raise InputError(f"this Booster is no classifier: its objective is {objective!r}")

    def ask(array: Any) -> Any:
        if library_of(type(net)) == "xgboost":
            return net.predict(DMatrix(array), output_margin=True, validate_features=False)
        return net.predict(array, raw_score=True)

    return Adapted(_Asked(ask, net, "logits"), Access.SCORES, "logits", max(columns, 2), f"Booster({objective})")


# Closed forms


class ClosedForm(nn.Module):
    """Decision values (N, C) of an estimator as a differentiable function of inputs (N, ...).

    Computed in float64, as the estimator does, and returned in the inputs' dtype; `.float()` makes it faster and less exact.
    """

    def __init__(self, layers: Sequence[nn.Module], features: int | None, name: str) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.features, self.name = features, name

    def forward(self, x: Tensor) -> Tensor:
        like = next(self.layers.buffers())
        logits: Tensor = self.layers(_flat(x, self.features, self.name).to(like))
        return logits.to(x)


class _Constants(nn.Module):
    """A layer with fixed numbers: buffers rather than parameters, so that inputs need not have their dtype."""

    def __init__(self, **constants: Any) -> None:
        super().__init__()
        for name, value in constants.items():
            dense = value.toarray() if hasattr(value, "toarray") else value
            self.register_buffer(name, torch.tensor(np.asarray(dense, dtype=np.float64)))


class _Affine(_Constants):
    """W x + b"""

    weight: Tensor  # (out, in)
    bias: Tensor  # (out,)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


class _Scale(_Constants):
    """factor * x + shift, feature by feature."""

    factor: Tensor
    shift: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor + self.shift


class _Normalize(nn.Module):
    """x / ||x||, rows of zeros as they are."""

    def __init__(self, norm: str) -> None:
        super().__init__()
        self.order = {"l1": 1.0, "l2": 2.0, "max": torch.inf}[norm]

    def forward(self, x: Tensor) -> Tensor:
        size = torch.linalg.vector_norm(x, ord=self.order, dim=1, keepdim=True)
        return x / torch.where(size == 0, torch.ones_like(size), size)


class _Gaussian(_Constants):
    """log p(k | x), of p(x | k) = prod_i N(x_i; mean_ki, variance_ki); far from the data p(x | k) is too small for float32."""

    mean: Tensor  # (C, D)
    variance: Tensor
    prior: Tensor  # (C,)

    def forward(self, x: Tensor) -> Tensor:
        squares = (x[:, None] - self.mean) ** 2 / self.variance
        return (self.prior.log() - 0.5 * (squares + self.variance.log()).sum(2)).log_softmax(1)


class _Kernel(_Constants):
    """k(x, s) for all support vectors s."""

    vectors: Tensor  # (S, D)

    def __init__(self, estimator: Estimator) -> None:
        super().__init__(vectors=estimator.support_vectors_)
        self.kind, self.gamma = estimator.kernel, float(estimator._gamma)
        self.degree, self.coef0 = estimator.degree, float(estimator.coef0)

    def forward(self, x: Tensor) -> Tensor:
        inner = x @ self.vectors.T
        if self.kind == "rbf":
            squares = (x**2).sum(1, keepdim=True) + (self.vectors**2).sum(1) - 2 * inner
            return torch.exp(-self.gamma * squares)
        inner = self.gamma * inner + self.coef0
        return inner**self.degree if self.kind == "poly" else torch.tanh(inner)


class _Votes(nn.Module):
    """One logit a class from the decision values f_ij (N, C (C - 1) / 2) between each two classes, i < j.

    f_ij > 0 is a vote for i, otherwise for j; most votes win, and of equals the first class (with `break_ties` the one of
    largest sum of f). Votes have no gradient, so the rule is written with minima for "and", maxima for "or", and the values
    themselves in place of their signs: with a_c(k) the k-th largest of c's values, c has k votes or more where a_c(k) > 0, and

        g_c = max_k min( a_c(k), min over j != c of max( -a_j(k), min(-a_j(k + 1), tie_cj) ) )

    is positive exactly where c is predicted. Its gradient is that of the one decision value on which the verdict hangs, and g
    is how far that value is from zero.
    """

    pairs: Tensor

    def __init__(self, classes: int, break_ties: bool) -> None:
        super().__init__()
        first, second = torch.triu_indices(classes, classes, 1)
        count = len(first)
        pairs = torch.full((classes, classes), 2 * count)
        pairs[first, second], pairs[second, first] = torch.arange(count), torch.arange(count, 2 * count)
        self.register_buffer("pairs", pairs)
        self.break_ties = break_ties

    def forward(self, values: Tensor) -> Tensor:
        lost = torch.full_like(values[:, :1], -torch.inf)
        each = torch.cat([values, -values, lost], 1)[:, self.pairs]  # (N, C, C), -inf on the diagonal
        ranked = each.sort(2, descending=True).values  # a_c(k), k = 1 to C
        itself = torch.eye(len(self.pairs), dtype=torch.bool, device=values.device)
        if self.break_ties:
            total = each.masked_fill(itself, 0).sum(2)
            tie = total[:, :, None] - total[:, None]
        else:
            tie = torch.where(torch.ones_like(each).triu(1) > 0, -lost[:, :, None], lost[:, :, None])
        fewer, as_many = -ranked[:, None, :, :-1], -ranked[:, None, :, 1:]  # (N, 1, j, k)
        beaten = torch.maximum(fewer, torch.minimum(as_many, tie[..., None]))
        all_beaten = beaten.masked_fill(itself[..., None], torch.inf).amin(2)
        return torch.minimum(ranked[:, :, :-1], all_beaten).amax(2)


def _layers(estimator: Estimator) -> list[nn.Module] | None:
    """The layers that make up the estimator's decision values; None where there is no closed form."""
    if _is(estimator, "Pipeline"):
        found = [_transformer(step) for _, step in estimator.steps[:-1]] + [_layers(estimator.steps[-1][1])]
        layers: list[nn.Module] = []
        for step in found:
            if step is None:
                return None
            layers += step
        return layers
    if _is(estimator, *_LINEAR):
        coefficients = np.atleast_2d(estimator.coef_.toarray() if hasattr(estimator.coef_, "toarray") else estimator.coef_)
        return [_Affine(weight=coefficients, bias=np.broadcast_to(estimator.intercept_, len(coefficients)))]
    if _is(estimator, "GaussianNB"):
        return [_Gaussian(mean=estimator.theta_, variance=estimator.var_, prior=estimator.class_prior_)]
    if _is(estimator, "MLPClassifier"):
        return _perceptron(estimator)
    if _is(estimator, *_SVM) and estimator.kernel in _KERNELS:
        return _machine(estimator)
    return None


def _perceptron(estimator: Estimator) -> list[nn.Module]:
    activation = {"identity": nn.Identity, "logistic": nn.Sigmoid, "tanh": nn.Tanh, "relu": nn.ReLU}[estimator.activation]
    layers: list[nn.Module] = []
    for weight, bias in zip(estimator.coefs_, estimator.intercepts_, strict=True):
        layers += [_Affine(weight=weight.T, bias=bias), activation()]
    return layers[:-1]  # the last activation makes probabilities of the logits


def _machine(estimator: Estimator) -> list[nn.Module]:
    """A support vector machine: its kernel, the dual coefficients, and the votes if there are more than two classes."""
    dual = estimator.dual_coef_
    dual = dual.toarray() if hasattr(dual, "toarray") else dual
    classes = len(estimator.classes_)
    if classes > 2:  # of the pair (i, j) count the support vectors of i by row j - 1, and those of j by row i
        owner = np.repeat(np.arange(classes), estimator.n_support_)
        first, second = np.triu_indices(classes, 1)
        ours, theirs = owner == first[:, None], owner == second[:, None]
        dual = np.where(ours, dual[second - 1], 0) + np.where(theirs, dual[first], 0)
    votes = [_Votes(classes, estimator.break_ties)] if classes > 2 else []
    if estimator.kernel == "linear":
        vectors = estimator.support_vectors_
        return [_Affine(weight=dual @ vectors, bias=estimator.intercept_), *votes]
    return [_Kernel(estimator), _Affine(weight=dual, bias=estimator.intercept_), *votes]


def _transformer(step: Estimator) -> list[nn.Module] | None:
    """The layers of a step before the classifier; None where there is no closed form."""
    if step is None or isinstance(step, str):  # "passthrough"
        return []
    if _is(step, "FunctionTransformer") and step.func is None:
        return []
    if _is(step, "StandardScaler"):
        scale = step.scale_ if step.with_std else np.ones(step.n_features_in_)
        return [_Scale(factor=1 / scale, shift=-(step.mean_ if step.with_mean else 0) / scale)]
    if _is(step, "RobustScaler"):
        scale = step.scale_ if step.with_scaling else np.ones(step.n_features_in_)
        return [_Scale(factor=1 / scale, shift=-(step.center_ if step.with_centering else 0) / scale)]
    if _is(step, "MinMaxScaler"):
        return [_Scale(factor=step.scale_, shift=step.min_), *([nn.Hardtanh(*step.feature_range)] if step.clip else [])]
    if _is(step, "MaxAbsScaler"):
        clip = [nn.Hardtanh()] if getattr(step, "clip", False) else []
        return [_Scale(factor=1 / step.scale_, shift=np.zeros(step.n_features_in_)), *clip]
    if _is(step, "PCA"):
        components = step.components_
        if step.whiten:
            scale = np.sqrt(step.explained_variance_)
            components = components / np.maximum(scale, np.finfo(scale.dtype).eps)[:, None]
        return [_Affine(weight=components, bias=-components @ step.mean_)]
    return [_Normalize(step.norm)] if _is(step, "Normalizer") else None
