"""Leaf boxes: read as the libraries read them, and the attack as near as brute force over all cells."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.ensemble import (
    BaggingClassifier,
    ExtraTreesClassifier,
    GradientBoostingClassifier,
    HistGradientBoostingClassifier,
    RandomForestClassifier,
)
from sklearn.model_selection import GridSearchCV
from sklearn.naive_bayes import GaussianNB
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.tree import DecisionTreeClassifier, ExtraTreeClassifier
from torch import Tensor

import saddlepoint as sp
from saddlepoint.attacks import leaf_boxes
from saddlepoint.attacks.leaf_boxes import LeafBoxes
from saddlepoint.errors import CapabilityError, InputError
from saddlepoint.models.trees_exact import tree_ensemble

Estimator = Any
Array = Any
NORMS = ("linf", "l2", "l1", "l0")
FAMILIES = (
    "tree", "extra tree", "forest", "extra trees", "boosting", "boosting, zero init", "histograms", "search",
    "xgboost", "xgboost forest", "lightgbm",
)  # fmt: skip
each_family = pytest.mark.parametrize("family", FAMILIES)
each_norm = pytest.mark.parametrize("norm", NORMS)


def data(classes: int, features: int = 3) -> tuple[Array, Array]:
    """Points in the unit cube; classes that no single feature tells."""
    x = np.random.default_rng(classes).random((150, features)).astype(np.float32)
    return x, (np.floor(classes * (x[:, 0] + x[:, 1] * x[:, 2])) % classes).astype(int)


@cache
def grown(family: str, classes: int) -> Estimator:
    small: dict[str, Any] = {"max_depth": 3, "random_state": 0}
    match family:
        case "tree":
            estimator = DecisionTreeClassifier(max_depth=5, random_state=0)
        case "extra tree":
            estimator = ExtraTreeClassifier(max_depth=5, random_state=0)
        case "forest":
            estimator = RandomForestClassifier(4, **small)
        case "extra trees":
            estimator = ExtraTreesClassifier(4, **small)
        case "boosting":
            estimator = GradientBoostingClassifier(n_estimators=3, **small)
        case "boosting, zero init":
            estimator = GradientBoostingClassifier(n_estimators=3, init="zero", **small)
        case "histograms":
            estimator = HistGradientBoostingClassifier(max_iter=3, max_bins=8, min_samples_leaf=5, **small)
        case "search":
            estimator = GridSearchCV(DecisionTreeClassifier(random_state=0), {"max_depth": [2, 4]}, cv=2)
        case "xgboost":
            estimator = pytest.importorskip("xgboost").XGBClassifier(n_estimators=3, max_bin=8, n_jobs=1, **small)
        case "xgboost forest":
            estimator = pytest.importorskip("xgboost").XGBRFClassifier(n_estimators=3, n_jobs=1, **small)
        case _:
            estimator = pytest.importorskip("lightgbm").LGBMClassifier(n_estimators=3, max_bin=8, verbose=-1, n_jobs=1, **small)
    return estimator.fit(*data(classes))


def thresholds(estimator: Estimator) -> list[set[float]]:
    """Those of each feature, by other ways than those of the code under test."""
    found: list[set[float]] = [set(), set(), set()]
    estimator = getattr(estimator, "best_estimator_", estimator)
    if "xgboost" in type(estimator).__module__:
        for text in estimator.get_booster().get_dump():
            for feature, value in re.findall(r"\[f(\d+)<([^\]]+)\]", text):
                found[int(feature)].add(float(value))
        return found
    if "lightgbm" in type(estimator).__module__:
        text = estimator.booster_.model_to_string()
        lines = [re.findall(rf"^{name}=(.*)$", text, re.MULTILINE) for name in ("split_feature", "threshold")]
        for features, values in zip(*lines, strict=True):
            for feature, value in zip(features.split(), values.split(), strict=True):
                found[int(feature)].add(float(value))
        return found
    if hasattr(estimator, "_predictors"):
        for tree in itertools.chain(*estimator._predictors):
            for node in tree.nodes[tree.nodes["is_leaf"] == 0]:
                found[node["feature_idx"]].add(float(node["num_threshold"]))
        return found
    for tree in np.ravel(getattr(estimator, "estimators_", [estimator])):
        for feature, value in zip(tree.tree_.feature, tree.tree_.threshold, strict=True):
            if feature >= 0:
                found[feature].add(float(value))
    return found


def edges(values: set[float]) -> Array:
    """The float32 numbers around thresholds."""
    near = np.array(sorted(values), dtype=np.float32)
    return np.unique(np.concatenate([np.nextafter(near, np.float32(end)) for end in (-np.inf, np.inf)] + [near]))


def size(x: Array, origin: Array, norm: str) -> Array:
    away = np.abs(x.astype(np.float64) - origin)
    return {
        "l0": (away > 0).sum(1).astype(np.float64),
        "l1": away.sum(1),
        "l2": np.sqrt((away**2).sum(1)),
        "linf": away.max(1),
    }[norm]


def combinations(estimator: Estimator, origin: Array, low: float = 0.0, high: float = 1.0) -> Array:
    """All points made of the input's values and the numbers around thresholds."""
    ends = [np.append(edges(values), x) for values, x in zip(thresholds(estimator), origin, strict=True)]
    return np.array(list(itertools.product(*([v for v in end if low <= v <= high] for end in ends))), dtype=np.float32)


def smallest(estimator: Estimator, points: Array, origin: Array, label: int, norm: str, target: int | None = None) -> float:
    """The least size of those of the points where the library itself is of another opinion. A tie is none."""
    told = estimator.predict_proba(points)
    others = np.delete(np.arange(told.shape[1]), label if target is None else target)
    lead = told[:, others].max(1) - told[:, label] if target is None else told[:, target] - told[:, others].max(1)
    return float(size(points[lead > 1e-5], origin, norm).min(initial=np.inf))


def correct(estimator: Estimator, classes: int, count: int) -> tuple[sp.Model, Tensor, Tensor]:
    model = sp.Model(estimator)
    x = torch.from_numpy(np.random.default_rng(9).random((count, 3)).astype(np.float32))
    return model, x, model.predict(x)


# Reading


@each_family
@pytest.mark.parametrize("classes", [2, 3])
def test_boxes_give_the_librarys_outputs(family: str, classes: int) -> None:
    """Everywhere, and on the very thresholds and the numbers beside them."""
    estimator = grown(family, classes)
    ensemble, model = tree_ensemble(estimator), sp.Model(estimator, bounds=None)
    around = np.random.default_rng(0).uniform(-0.5, 1.5, (200, 3)).astype(np.float32)
    on_edges = combinations(estimator, around[0])
    chosen = np.random.default_rng(0).permutation(len(on_edges))[:1000]
    for x in (around, on_edges[chosen], around.astype(np.float64) / 3):
        asked = torch.from_numpy(x)
        logits = ensemble.logits(ensemble.outputs(ensemble.leaves(ensemble.cells(asked)))).to(asked.dtype)
        torch.testing.assert_close(logits, model.logits(asked), rtol=1e-5, atol=1e-5)
        agree = logits.argmax(1) == model.predict(asked)
        ties = logits.topk(2, 1).values.diff(dim=1).abs()[:, 0] < 1e-5
        assert (agree | ties).all()


@each_family
def test_each_input_is_in_one_box_of_each_tree(family: str) -> None:
    """The boxes say the same as the way from the root."""
    ensemble = tree_ensemble(grown(family, 3))
    cells = ensemble.cells(torch.from_numpy(np.random.default_rng(0).random((100, 3)).astype(np.float32)))
    place = cells[:, ensemble.asked]  # (N, P, M)
    inside = ((place >= ensemble.lower) & (place <= ensemble.upper)).all(1)
    leaves = ensemble.leaves(cells)
    assert torch.equal(inside.sum(1), torch.full((100,), ensemble.trees))
    assert torch.equal(inside.nonzero()[:, 1].view(100, -1), leaves)
    assert torch.equal(ensemble.tree[leaves], torch.arange(ensemble.trees).expand(100, -1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["forest", "xgboost", "histograms"])
def test_ends_of_cells_are_the_outermost_numbers_in_them(family: str, dtype: torch.dtype) -> None:
    ensemble = tree_ensemble(grown(family, 2))
    left, right = ensemble.ends(dtype)
    feature = ensemble.features[ensemble.column]
    for end, outwards in ((left, -torch.inf), (right, torch.inf)):
        held = (left <= right) & torch.isfinite(end)
        assert held.any()
        x = torch.full((len(end), 3), 0.5, dtype=dtype)
        x[torch.arange(len(end)), feature] = end
        cell = ensemble.cells(x)[torch.arange(len(end)), ensemble.column]
        assert torch.equal(cell[held], torch.arange(len(end))[held])
        narrow = torch.float32 if family != "histograms" and dtype == torch.float64 else dtype
        following = torch.nextafter(end.to(narrow), torch.full_like(end.to(narrow), outwards)).to(dtype)
        x[torch.arange(len(end)), feature] = following
        cell = ensemble.cells(x)[torch.arange(len(end)), ensemble.column]
        assert (cell[held] != torch.arange(len(end))[held]).all()


def test_what_has_no_boxes_is_refused() -> None:
    x, y = data(2)
    cases = {
        "this is a GaussianNB": GaussianNB().fit(x, y),
        "this is a Pipeline": make_pipeline(StandardScaler(), DecisionTreeClassifier()).fit(x, y),
        "this is a BaggingClassifier": BaggingClassifier().fit(x, y),
        "asks nothing": DecisionTreeClassifier(min_samples_leaf=100).fit(x, y),
        "do not add up": GradientBoostingClassifier(n_estimators=2, init=GaussianNB()).fit(x, y),
        "categories": HistGradientBoostingClassifier(max_iter=2, categorical_features=[0]).fit(np.round(4 * x), y),
    }
    for told, estimator in cases.items():
        with pytest.raises(CapabilityError, match=told):
            tree_ensemble(estimator)


def test_what_xgboost_has_no_boxes_for_is_refused() -> None:
    xgboost = pytest.importorskip("xgboost")
    x, y = data(2)
    dart = xgboost.XGBClassifier(n_estimators=3, booster="dart", rate_drop=0.5).fit(x, y)
    zeros = xgboost.XGBClassifier(n_estimators=3, missing=0.0).fit(x, y)
    for told, estimator in {"booster is dart": dart, "missing": zeros}.items():
        with pytest.raises(CapabilityError, match=told):
            tree_ensemble(estimator)


def test_boosters_and_early_stopping() -> None:
    xgboost = pytest.importorskip("xgboost")
    x, y = data(3)
    estimator = xgboost.XGBClassifier(n_estimators=60, max_depth=2, learning_rate=0.5, early_stopping_rounds=3)
    estimator.fit(x[:100], y[:100], eval_set=[(x[100:], y[100:])], verbose=False)
    stopped, whole = tree_ensemble(estimator), tree_ensemble(estimator.get_booster())
    assert stopped.trees == 3 * (estimator.best_iteration + 1) < whole.trees


# The nearest point


@each_norm
@pytest.mark.parametrize("family", ["tree", "extra tree", "search"])
@pytest.mark.parametrize("classes", [2, 3])
def test_a_single_tree_exactly(family: str, classes: int, norm: str) -> None:
    estimator = grown(family, classes)
    model, x, y = correct(estimator, classes, 12)
    goals = [sp.Untargeted(), sp.Targeted("next")]
    for goal in goals:
        result = sp.attack(model, x, y, LeafBoxes(estimator), sp.Minimize(norm), goal)
        assert (result.queries.forward <= 2).all()
        for row, (origin, label) in enumerate(zip(x.numpy(), y.tolist(), strict=True)):
            target = (label + 1) % classes if goal.targeted else None
            best = smallest(estimator, combinations(estimator, origin), origin, label, norm, target)
            assert result.distance[row].item() == pytest.approx(best, rel=1e-12)


@each_norm
@pytest.mark.parametrize("family", ["forest", "extra trees", "boosting", "histograms", "xgboost", "xgboost forest", "lightgbm"])
def test_small_ensembles_as_brute_force(family: str, norm: str) -> None:
    """A local search promises no optimum; on these it finds all of them."""
    estimator = grown(family, 2)
    model, x, y = correct(estimator, 2, 6)
    result = sp.attack(model, x, y, LeafBoxes(estimator, steps=60), sp.Minimize(norm))
    assert np.array_equal(estimator.predict(result.adversarial.numpy()) != y.numpy(), result.success.numpy())
    for row, (origin, label) in enumerate(zip(x.numpy(), y.tolist(), strict=True)):
        best = smallest(estimator, combinations(estimator, origin), origin, label, norm)
        assert result.distance[row].item() == pytest.approx(best, rel=1e-12)


def test_more_classes_targets_and_a_larger_forest(digits: tuple[Tensor, Tensor]) -> None:
    """Against what brute force can't see: each moved feature is needed, and other searches find nothing nearer."""
    x, y = digits
    forest = RandomForestClassifier(12, max_depth=6, random_state=0).fit(x[:400].flatten(1), y[:400])
    model = sp.Model(forest)
    asked = x[400:408]
    labels = model.predict(asked)
    attack = LeafBoxes(forest, steps=60)
    nearest = sp.attack(model, asked, labels, attack, sp.Minimize("l1"))
    assert nearest.success.all()
    for row in range(len(asked)):
        moved = (nearest.adversarial[row] != asked[row]).flatten().nonzero()[:, 0]
        back = nearest.adversarial[row].flatten().repeat(len(moved), 1)
        back[torch.arange(len(moved)), moved] = asked[row].flatten()[moved]
        logits = model.logits(back.view(-1, 1, 8, 8))
        rivals = logits.index_fill(1, labels[row], -torch.inf).amax(1)
        assert (rivals - logits[:, labels[row]] < nearest.tau).all()
    square = sp.attack(model, asked, labels, sp.attacks.Square(steps=100), sp.L1(0.9 * nearest.distance))
    assert not square.success.any()
    targeted = sp.attack(model, asked, labels, attack, sp.Minimize("l1"), sp.Targeted("next"))
    assert targeted.success.all()
    assert (model.predict(targeted.adversarial) == (labels + 1) % 10).all()
    assert targeted.distance.mean() > nearest.distance.mean()


@each_norm
def test_masks_and_grids(norm: str) -> None:
    """Brute force over the points of the grid, in two of three features."""
    estimator = grown("forest", 2)
    model, x, y = correct(estimator, 2, 12)
    x = torch.round(x * 20) / 20
    y = model.predict(x)
    mask = torch.tensor([True, False, True])
    threat = sp.Minimize(norm, mask=mask, grid=1 / 20)
    result = sp.attack(model, x, y, LeafBoxes(estimator, steps=60), threat)
    levels = (np.arange(21) / 20).astype(np.float32)
    for row, (origin, label) in enumerate(zip(x.numpy(), y.tolist(), strict=True)):
        points = np.array([(a, origin[1], b) for a, b in itertools.product(levels, levels)], dtype=np.float32)
        best = smallest(estimator, points, origin, label, norm)
        assert result.distance[row].item() == pytest.approx(best, rel=1e-6)
        assert bool(result.success[row]) == np.isfinite(best)
    assert result.success.any()
    assert threat.contains(result.adversarial, x).all()


def test_bounds_are_kept() -> None:
    estimator = grown("boosting", 2)
    _, x, _ = correct(estimator, 2, 12)
    x = 0.3 + 0.2 * x
    model = sp.Model(estimator, bounds=(0.3, 0.5))
    y = model.predict(x)
    result = sp.attack(model, x, y, LeafBoxes(estimator, steps=60), sp.Minimize("l2"))
    assert ((result.adversarial >= 0.3) & (result.adversarial <= 0.5)).all()
    for row, (origin, label) in enumerate(zip(x.numpy(), y.tolist(), strict=True)):
        low, high = float(np.float32(0.3)), float(np.float32(0.5))
        best = smallest(estimator, combinations(estimator, origin, low, high), origin, label, "l2")
        assert result.distance[row].item() == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("family", ["forest", "xgboost", "lightgbm"])
def test_inputs_in_double_precision(family: str) -> None:
    estimator = grown(family, 2)
    model, x, _ = correct(estimator, 2, 12)
    x = x.double() / 3 + 0.3
    y = model.predict(x)
    result = sp.attack(model, x, y, LeafBoxes(estimator, steps=25), sp.Minimize("l2"))
    single = sp.attack(model, x.float(), y, LeafBoxes(estimator, steps=25), sp.Minimize("l2"))
    assert result.success.any()
    assert torch.equal(model.predict(result.adversarial) != y, result.success)
    torch.testing.assert_close(result.distance, single.distance, rtol=1e-4, atol=1e-6)


def test_points_on_thresholds() -> None:
    """A step of the least size that there is leads to the other side."""
    tree = DecisionTreeClassifier(max_depth=1).fit(np.array([[0.25], [0.75]]), [0, 1])
    x = torch.tensor([[0.5], [0.7]])
    result = sp.attack(sp.Model(tree), x, torch.tensor([0, 1]), LeafBoxes(tree), sp.Minimize("linf"))
    above = torch.nextafter(torch.tensor(0.5), torch.tensor(1.0))
    assert result.adversarial.tolist() == [[above.item()], [0.5]]


def test_balls_and_confidence() -> None:
    estimator = grown("boosting", 2)
    model, x, y = correct(estimator, 2, 12)
    smallest_ones = sp.attack(model, x, y, LeafBoxes(estimator, steps=25), sp.Minimize("linf"))
    eps = smallest_ones.distance.median().item()
    inside = sp.attack(model, x, y, LeafBoxes(estimator, steps=25), sp.Linf(eps))
    assert torch.equal(inside.success, smallest_ones.distance <= eps)
    confident = sp.attack(model, x, y, LeafBoxes(estimator, steps=25), sp.Minimize("linf"), sp.Untargeted(confidence=0.2))
    logits = model.logits(confident.adversarial[confident.success])
    lead = logits.gather(1, 1 - y[confident.success, None]) - logits.gather(1, y[confident.success, None])
    assert confident.success.any()
    assert (lead >= 0.2).all()
    assert (confident.distance >= smallest_ones.distance).all()


# What a move does


@pytest.mark.parametrize("family", ["forest", "boosting", "extra trees"])
def test_all_moves_of_one_feature_at_once(family: str) -> None:
    """As one by one."""
    ensemble = tree_ensemble(grown(family, 3))
    x = torch.from_numpy(np.random.default_rng(3).random((20, 3)).astype(np.float32))
    cells = ensemble.cells(x)
    boxes = ensemble.leaves(cells)
    at_once = ensemble.outputs(boxes)[:, None] + leaf_boxes._changes(ensemble, cells, boxes)
    moved = cells[:, None].repeat(1, len(ensemble.column), 1)
    moved[:, torch.arange(len(ensemble.column)), ensemble.column] = torch.arange(len(ensemble.column))
    torch.testing.assert_close(at_once, ensemble.outputs(ensemble.leaves(moved)), rtol=0, atol=1e-12)
    for norm in NORMS:
        threat = sp.Minimize(norm)
        value, cost = leaf_boxes._choices(ensemble, threat.around(x), cells)
        other = ensemble.cells(1 - x)  # from which features move on
        spent = cost.gather(1, other)
        totals = leaf_boxes._totals_after(ensemble, spent, cost, threat.norm)
        for cell, feature in enumerate(ensemble.column.tolist()):
            away = x.index_copy(1, ensemble.features, value.gather(1, other)).clone()
            away[:, ensemble.features[feature]] = value[:, cell]
            expected = threat.distance(away, x) ** (2 if norm == "l2" else 1)
            possible = torch.isfinite(totals[:, cell])
            torch.testing.assert_close(totals[possible, cell], expected[possible], rtol=1e-9, atol=1e-12)


# As an attack


def test_queries_are_few_and_within_the_budget() -> None:
    estimator = grown("forest", 2)
    asked: list[int] = []

    def ask(x: Array) -> Array:
        asked.append(len(x))
        return estimator.predict(x)

    x, y = correct(estimator, 2, 12)[1:]
    whole = None
    for queries in (None, 3, 2, 1):
        asked.clear()
        model = sp.Model(ask, gives="labels", inputs="numpy", num_classes=2)
        attack = LeafBoxes(estimator, steps=25)
        result = sp.attack(model, x, y, attack, sp.Minimize("l2"), budget=sp.Budget(queries=queries))
        assert sum(asked) == (result.queries.forward + result.queries.verify).sum() + result.queries.probe
        assert queries is None or (result.queries.forward <= queries).all()
        whole = result if whole is None else whole
        assert (result.distance >= whole.distance).all()
    assert whole is not None
    assert whole.success.all()


def test_a_query_for_each_nearer_success_and_no_other() -> None:
    estimator = grown("forest", 2)
    model, x, y = correct(estimator, 2, 12)
    queries, distance = torch.ones(12, dtype=torch.int64), torch.full((12,), torch.inf, dtype=torch.float64)
    met = 0

    def watch(record: Any) -> None:
        nonlocal met
        asked, nearer = record.queries - queries[record.ids], record.distance < distance[record.ids]
        assert torch.equal(asked, nearer.long())
        queries[record.ids], distance[record.ids] = record.queries, record.distance
        met += int(nearer.sum())

    sp.attack(model, x, y, LeafBoxes(estimator, steps=25), sp.Minimize("l2"), callback=watch)
    assert met > len(x)


def test_labels_are_enough() -> None:
    estimator = grown("forest", 2)
    model, x, y = correct(estimator, 2, 12)
    known = sp.attack(model, x, y, LeafBoxes(estimator, steps=25), sp.Minimize("l2"))
    hidden = sp.attack(sp.Model(estimator, access=sp.Access.LABELS), x, y, LeafBoxes(estimator, steps=25), sp.Minimize("l2"))
    assert torch.equal(hidden.adversarial, known.adversarial)


def test_results_do_not_depend_on_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    estimator = grown("boosting", 3)
    model, x, y = correct(estimator, 3, 12)
    attack = LeafBoxes(estimator, steps=20, leaves=3)
    whole = sp.attack(model, x, y, attack, sp.Minimize("l1"))
    ids = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    shuffled = sp.attack(model, x[ids], y[ids], attack, sp.Minimize("l1"), ids=ids, batch_size=5)
    assert torch.equal(shuffled.adversarial, whole.adversarial[ids])
    monkeypatch.setattr(leaf_boxes, "_ELEMENTS", 500)  # a few samples at a time
    parts = sp.attack(model, x, y, attack, sp.Minimize("l1"))
    assert torch.equal(parts.adversarial, whole.adversarial)


def test_trees_of_another_model_make_it_a_transfer_attack() -> None:
    mine, theirs = grown("forest", 2), grown("boosting", 2)
    model, x, y = correct(theirs, 2, 40)
    transferred = sp.attack(model, x, y, LeafBoxes(mine, steps=25), sp.Minimize("l2"))
    direct = sp.attack(model, x, y, LeafBoxes(theirs, steps=25), sp.Minimize("l2"))
    assert 0 < transferred.success.sum() < direct.success.sum()
    assert torch.equal(model.predict(transferred.adversarial) != y, transferred.success)


def test_how_it_is_made_and_written_down() -> None:
    estimator = grown("forest", 2)
    attack = LeafBoxes(estimator)
    assert attack == LeafBoxes(sp.Model(estimator)) == LeafBoxes(tree_ensemble(estimator))
    assert hash(attack) == hash(LeafBoxes(estimator))
    assert replace(attack, steps=7) == LeafBoxes(estimator, steps=7) != attack
    assert attack != LeafBoxes(grown("extra trees", 2))
    settings = json.loads(json.dumps(attack.settings()))
    assert settings["trees"].startswith("RandomForestClassifier, 4 trees with ")
    assert settings["steps"] == attack.steps
    assert settings["trees"] in repr(attack)
    with pytest.raises(InputError, match="normalises"):
        LeafBoxes(sp.Model(estimator, mean=0.5, std=0.2))
    with pytest.raises(CapabilityError, match="this is a Linear"):
        LeafBoxes(sp.Model(torch.nn.Linear(3, 2)))
    for bad in ({"steps": 0}, {"leaves": 1.5}):
        with pytest.raises(InputError, match="a whole number"):
            LeafBoxes(estimator, **bad)
    wide = sp.Model(torch.nn.Linear(4, 2))
    with pytest.raises(InputError, match="takes 3 features"):
        sp.attack(wide, torch.rand(2, 4), torch.tensor([0, 1]), attack, sp.Minimize("l2"), sp.Targeted("next"))
