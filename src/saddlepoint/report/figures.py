"""The report's plots as matplotlib Figures. No global state: no pyplot, no backend, no style that stays.

Colours are those of Okabe & Ito (2008), which colour-blind people tell apart, darkened where they carry text.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
import numpy.typing as npt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter
from torch import Tensor

from saddlepoint.detectors import roc_curve
from saddlepoint.evaluate import Cell, Comparison, Detection, Distances, Evaluation
from saddlepoint.evaluate.detection import RATES
from saddlepoint.evaluate.queries import LEVELS, QueryCurve
from saddlepoint.evaluate.tournament import Tournament
from saddlepoint.evaluate.transfer import TransferMatrix
from saddlepoint.report.gallery import Example, Gallery, Shot
from saddlepoint.report.verdict import measured, norms, radii
from saddlepoint.report.words import attack_labels, class_name, count, length, percent, visible
from saddlepoint.taxonomy import Norm, Status

if TYPE_CHECKING:
    from saddlepoint.report.document import History
    from saddlepoint.report.evaluations import ByClass, Step

PAPER, INK, MUTED, GRID = "#ffffff", "#1c2128", "#667080", "#dde1e7"
SERIES = ("#c65200", "#0072b2", "#00805f", "#b04f8c", "#a87400", "#3a8fc0")
_FELL, _HELD = SERIES[0], SERIES[2]  # samples that were broken, and such that stand
_HALF, _FAINT = 0.45, 0.16  # opacities
_POINTS = 200  # of a curve in the figure
_STEEP = 10  # distances that fall by more than this factor are drawn on a logarithmic scale
_LEVEL = (0, (4, 3))  # dashes of a line that marks a level
_IN_A_COLUMN = 20  # classes
_GAP = 0.3  # above the row of noise in a heat map
_LIGHTEST, _DARKER = 0.04, 0.6  # opacity of a cell of 0 %, and what 100 % adds: numbers stay legible on dark and on light paper
_DASHES = ((0, (1, 1.6)), (0, (5, 2)), (0, (6, 2, 1, 2)), (0, (3, 1)), (0, (8, 3)), (0, (2, 3)))
_LEAST_RATE = 0.002  # false positives, where ROC curves begin
_REACH = 6.0  # of the axis of scores, in logarithms of units
_STYLE: Any = {  # Any: the newest matplotlib types every key, older ones none
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "text.parse_math": False,  # a name with two dollar signs is a name
    "text.usetex": False,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "axes.facecolor": "none",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.labelcolor": MUTED,
    "legend.fontsize": 9,
    "figure.facecolor": "white",
    "figure.constrained_layout.use": True,
    "figure.dpi": 100,
    "savefig.facecolor": "auto",
    "savefig.bbox": None,
    "svg.fonttype": "none",  # letters stay letters: they can be searched, copied and read aloud
    "svg.hashsalt": "saddlepoint",
}


def security_curve(comparison: Comparison, norm: Norm | str | None = None) -> Figure:
    """Accuracy over eps, one panel per norm (or the one given): thick, the worst over all attacks; thin, each attack."""
    shown = norms(comparison) if norm is None else [Norm(norm)]
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(6.6 if len(shown) == 1 else 5.2 * len(shown), 3.9))
        for number, panel in enumerate(shown):
            axes = figure.add_subplot(1, len(shown), number + 1)
            _curves(axes, comparison, panel)
            if len(shown) > 1:
                axes.set_title(panel.value)
        return figure


def _curves(axes: Axes, comparison: Comparison, norm: Norm) -> None:
    cells = [cell for cell in comparison.cells if cell.norm == norm]
    labels = attack_labels(cell.attack for cell in comparison.cells)
    attacks = list(dict.fromkeys(cell.attack for cell in cells))
    ends: list[tuple[float, str, str]] = []
    reach = max((eps for name in measured(comparison) for eps in radii(comparison, name, norm)), default=0.0)
    reach = reach or _largest_distance(cells)
    for place, name in enumerate(comparison.models):
        color = SERIES[place % len(SERIES)]
        own = [cell for cell in cells if cell.model == name]
        if not own:
            continue
        for number, attack in enumerate(attacks):
            x, y = _thin([cell for cell in own if cell.attack == attack], comparison.clean_accuracy(name), reach)
            if len(attacks) > 1 or not radii(comparison, name, norm):
                axes.plot(x, y, color=color, lw=1.0, alpha=0.75, ls=_DASHES[number % len(_DASHES)])
        points = [point for point in comparison.curve(name, norm) if math.isfinite(point[0])]
        if len(points) > 1:
            axes.plot(
                *zip(*points, strict=True), color=color, lw=2.4, marker="o", ms=6, mec=PAPER, mew=1, clip_on=False, zorder=3
            )
            ends.append((points[-1][1], name, color))
        elif own:
            ends.append((min(cell.result.robust_accuracy for cell in own), name, color))
    axes.set_ylim(0, 1.02)
    axes.set_xlim(0, reach or 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_ylabel("accuracy")
    axes.set_xlabel(f"size of the perturbation (eps, {norm.value})")
    gap = 0.065
    for height, (_, name, color) in zip(_apart([end[0] for end in ends], gap), ends, strict=True):
        label = visible(name, 24)
        axes.text(1.03, height / 1.02, label, color=color, weight="bold", va="center", transform=axes.transAxes)
    if len(attacks) > 1:
        for number, attack in enumerate(attacks):
            axes.plot([], [], color=MUTED, lw=1.0, ls=_DASHES[number % len(_DASHES)], label=visible(labels[attack], 32))
        axes.plot([], [], color=MUTED, lw=2.4, marker="o", ms=5, label="worst of all")
        columns = min(len(attacks) + 1, 4)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=columns, handlelength=3)


def _thin(cells: Sequence[Cell], clean: float, reach: float) -> tuple[list[float], list[float]]:
    """One attack's line: through its measured eps, or, where it sought the smallest perturbation, a step per sample."""
    steps = [cell for cell in cells if math.isinf(cell.eps)]
    if steps:
        found = steps[0].result.distance
        sizes = found[torch.isfinite(found) & (found <= reach)].double().sort().values.tolist()
        shares = [1 - (i + 1) / len(found) for i in range(len(sizes))]
        return np.repeat([0.0, *sizes], 2)[1:].tolist(), np.repeat([1.0, *shares], 2)[:-1].tolist()
    points = sorted((cell.eps, cell.result.robust_accuracy) for cell in cells)
    return [0.0, *(p[0] for p in points)], [clean, *(p[1] for p in points)]


def _largest_distance(cells: Sequence[Cell]) -> float:
    found = torch.cat([cell.result.distance.double() for cell in cells]) if cells else torch.zeros(0)
    found = found[torch.isfinite(found)]
    return float(found.max()) if len(found) else 0.0


def _apart(heights: Sequence[float], gap: float) -> list[float]:
    """The heights, moved as little as need be until labels don't overlap and none is below the axis."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    moved = list(heights)
    for lower, upper in pairwise(order):
        moved[upper] = max(moved[upper], moved[lower] + gap)
    surplus = max(moved, default=0.0) - 1.0
    return [max(height - max(surplus, 0.0), 0.0) for height in moved]


def distances(found: Mapping[str, Distances]) -> Figure:
    """Above, how many samples are right and farther from the boundary than eps; below, how many are how far."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(6.6, 5.2))
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        first = next(iter(found.values()))
        norm = first.norm
        measured = {name: d.values[d.found].cpu().double().sort().values for name, d in found.items()}
        reach = max((float(values[-1]) for values in measured.values() if len(values)), default=0.0) or 1.0
        # one bin for each number of features, where that is what distances are
        whole = norm == Norm.L0 and reach <= 60
        edges = np.arange(0.5, reach + 1) if whole else np.linspace(0, reach, 31)
        for place, (name, values) in enumerate(measured.items()):
            color, label = SERIES[place % len(SERIES)], visible(name, 24)
            steps = [0.0, *dict.fromkeys(values.tolist()), reach]
            upper.step(steps, found[name].curve(steps), where="post", color=color, lw=2.2, label=label)
            lower.hist(values.numpy(), edges, histtype="stepfilled", color=color, alpha=0.35)
            lower.hist(values.numpy(), edges, histtype="step", color=color, lw=1.4)
            if math.isfinite(found[name].median):
                for axes in (upper, lower):
                    axes.axvline(found[name].median, color=color, lw=1, ls=(0, (4, 3)))
        upper.set_ylim(0, 1.02)
        upper.set_xlim(0, edges[-1])
        upper.yaxis.set_major_formatter(PercentFormatter(1))
        upper.set_ylabel("not fooled" if first.own_decision else "right and not fooled")
        lower.set_ylim(0, max(1.0, lower.get_ylim()[1]))
        lower.set_ylabel("samples")
        lower.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        lower.set_xlabel(f"size of the smallest change found (eps, {norm.value})")
        if len(found) > 1:
            upper.legend(loc="upper right")
        return figure


def intervals(found: Sequence[tuple[str, Evaluation]]) -> Figure:
    """Robust accuracy from below and above, a bar for each (name, evaluation): proven, unknown, broken, wrong."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(7.6, 0.95 + 0.44 * len(found)))
        axes = figure.add_subplot()
        parts = [
            ("proven", _HELD, 1.0),
            ("stands, unproven", _HELD, _HALF),
            ("broken", _FELL, 1.0),
            ("wrong anyway", MUTED, 1.0),
        ]
        mark: dict[str, Any] = {"color": INK, "marker": "^", "ms": 6, "lw": 0}
        for row, (_, evaluation) in enumerate(found):
            between, edge = evaluation.interval, 0.0
            ends = (between.certified, between.attacked, evaluation.clean_accuracy, 1.0)
            for end, (_, color, alpha) in zip(ends, parts, strict=True):
                axes.barh(row, end - edge, left=edge, height=0.62, color=color, alpha=alpha, lw=0)
                if end - edge > 0.07:  # narrower ones have no room for a number
                    ink = PAPER if alpha == 1 else INK
                    axes.text((edge + end) / 2, row, percent(end - edge), color=ink, ha="center", va="center", fontsize=9)
                edge = end
            for limit in {between.low, between.high} - {0.0, 1.0}:
                axes.plot(limit, row + 0.44, **mark)
        axes.set_yticks(range(len(found)), [name for name, _ in found])
        axes.tick_params(axis="y", labelcolor=INK)
        axes.set_ylim(len(found) - 0.4, -0.5)
        axes.set_xlim(0, 1)
        axes.xaxis.set_major_formatter(PercentFormatter(1))
        axes.grid(visible=False)
        _legend(figure, parts, mark | {"label": "limit for all such inputs"})
        return figure


def cascade(steps: Sequence[Step], right: int, wrong: int, failed: int = 0) -> Figure:
    """Left, from top to bottom, how many samples each stage broke, and of how many; right, what part of all passes it took.

    right, wrong, failed: how many samples the model gets right without an attack, gets wrong, and gives NaN or infinite values.
    """
    most, total = max((step.passes for step in steps), default=0) or 1, sum(step.passes for step in steps) or 1
    names = [
        "wrong or failed" if failed else "wrong from the start",
        *(f"{number}  {visible(step.name, 24)}" for number, step in enumerate(steps, 1)),
        "still stand",
    ]
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(9.2, 1.3 + 0.34 * len(names)))
        left, cost = figure.subplots(1, 2, sharey=True, width_ratios=(7, 4))
        aside: dict[str, Any] = {"transform": left.get_yaxis_transform(), "ha": "right", "va": "center"}
        bar: dict[str, Any] = {"height": 0.66, "lw": 0}
        lost = [(wrong + failed, right, MUTED), *((step.fell, step.stand, _FELL) for step in steps)]
        for row, (gone, standing, color) in enumerate(lost):
            held = steps[row - 1].held if row else 0
            left.barh(row, standing - held, color=_HELD, alpha=_FAINT, **bar)
            left.barh(row, held, left=standing - held, color=_HELD, alpha=_HALF, **bar)
            if gone:  # the edge keeps few of many visible
                left.barh(row, gone, left=standing, height=0.66, color=color, ec=color, lw=1)
            number = {"s": f"{gone:,}", "color": color, "weight": "bold"} if gone else {"s": "–", "color": MUTED}
            left.text(1.11, row, **number, **aside)
            left.text(1.23, row, f"{standing:,}", **aside)
        left.barh(len(lost), lost[-1][1], color=_HELD, alpha=_HALF, **bar)  # the full colour is for what is proven
        left.text(1.23, len(lost), f"{lost[-1][1]:,}", weight="bold", **aside)
        for row, step in enumerate(steps, 1):
            cost.barh(row, step.passes / most, color=SERIES[1], **bar)
            each = f"{percent(step.passes / total)} · {count(step.passes / max(step.attacked, 1))} each"
            cost.text(step.passes / most + 0.03, row, each, va="center", fontsize=9)
        for place, title in ((1.11, "lost"), (1.23, "stand")):
            left.text(place, -0.9, title, color=MUTED, fontsize=9, **aside)
        left.text(0, -0.9, "samples", color=MUTED, fontsize=9, va="center")
        cost.text(0, -0.9, "passes: share, and for each sample", color=MUTED, fontsize=9, va="center")
        left.set_yticks(range(len(names)), names)
        left.tick_params(axis="y", labelcolor=INK)
        left.set_ylim(len(names) - 0.5, -1.3)
        left.set_xlim(0, right + wrong + failed)
        left.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        cost.set_xlim(0, 2.1)
        cost.set_xticks([])
        cost.tick_params(labelleft=False)
        cost.spines.bottom.set_visible(False)
        for axes in (left, cost):
            axes.grid(visible=False)
        _legend(figure, [("broken by this stage", _FELL, 1.0), ("attacked, and held", _HELD, _HALF),
                         ("stood, not attacked by this stage", _HELD, _FAINT)])  # fmt: skip
        return figure


def _legend(figure: Figure, patches: Sequence[tuple[str, str, float]], line: Mapping[str, Any] | None = None) -> None:
    """Under the figure: (label, colour, opacity) of areas, and the settings of a line."""
    handles: list[Any] = [Patch(color=color, alpha=alpha, lw=0, label=label) for label, color, alpha in patches]
    if line is not None:
        handles.append(Line2D([], [], **line))
    figure.legend(
        handles=handles, loc="outside lower center", ncols=len(handles), handlelength=1.2, columnspacing=1.4, handletextpad=0.5
    )


def classes(rows: Sequence[ByClass], robust_accuracy: float, class_names: Sequence[str] = ()) -> Figure:
    """Clean and robust accuracy of each class, from top to bottom, with that of all samples as a line."""
    columns = 1 if len(rows) <= _IN_A_COLUMN else 2
    height = -(-len(rows) // columns)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(9.2, 0.85 + (0.3 if columns == 1 else 0.26) * height))
        panels = figure.subplots(1, columns, squeeze=False)[0]
        for panel, axes in enumerate(panels):
            part = rows[panel * height : (panel + 1) * height]
            places = range(len(part))
            axes.barh(places, [row.clean_accuracy for row in part], height=0.66, color=_HELD, alpha=_FAINT, lw=0)
            axes.barh(places, [row.robust_accuracy for row in part], height=0.66, color=_HELD, alpha=_HALF, lw=0)
            for place, row in enumerate(part):
                axes.text(1.02, place, f"{percent(row.robust_accuracy)} of {row.samples:,}", va="center", fontsize=9)
            axes.axvline(robust_accuracy, color=INK, lw=1, ls=_LEVEL)
            axes.set_yticks(places, [visible(class_name(row.label, class_names), 24) for row in part])
            axes.tick_params(axis="y", labelcolor=INK)
            axes.set_ylim(height - 0.45, -0.55)
            axes.set_xlim(0, 1)
            axes.xaxis.set_major_formatter(PercentFormatter(1))
            axes.grid(visible=False)
        _legend(figure, [("robust accuracy, at most", _HELD, _HALF), ("clean accuracy", _HELD, _FAINT)],
                {"color": INK, "lw": 1, "ls": _LEVEL, "label": "robust accuracy over all samples"})  # fmt: skip
        return figure


def decline(evaluation: Evaluation, place: int = 0) -> Figure:
    """Robust accuracy over the size of the perturbation, from the smallest ones that were found. Needs `nearest`.

    place: of the model among the colours.
    """
    color = SERIES[place % len(SERIES)]
    eps = evaluation.threat.largest_eps
    sizes = [2 * eps * step / 100 for step in range(101)]
    shares = [share for _, share in evaluation.curve(sizes)]
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(6.6, 3.1))
        axes = figure.add_subplot()
        axes.step(sizes, shares, where="post", color=color, lw=2.2)
        axes.fill_between(sizes, shares, step="post", color=color, alpha=_FAINT, lw=0)
        axes.axvline(eps, color=INK, lw=1, ls=_LEVEL)
        axes.text(eps, 1.03, f"evaluated: {percent(evaluation.robust_accuracy)}", ha="center", fontsize=9)
        axes.set_ylim(0, 1.02)
        axes.set_xlim(0, 2 * eps or 1)
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.set_ylabel("robust accuracy, at most")
        axes.set_xlabel(f"size of the perturbation (eps, {evaluation.threat.norm})")
        return figure


def transfers(matrix: TransferMatrix) -> Figure:
    """A cell for each source (rows) and target (columns): the darker, the more of its examples fool the target."""
    sources, targets = matrix.sources, matrix.targets
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(2.2 + 0.72 * len(targets), 1.7 + 0.42 * len(sources)))
        axes = figure.add_subplot()
        places: list[float] = []
        for row in matrix.rows:
            top = (places[-1] + 0.5 if places else 0.0) + (_GAP if row.name not in targets else 0.0)  # noise stands apart
            for column, target in enumerate(targets):
                rate, corner = matrix.rate(row.name, target), (column + 0.03, top + 0.03)
                if math.isfinite(rate):
                    axes.add_patch(Rectangle(corner, 0.94, 0.94, fc=SERIES[0], alpha=_LIGHTEST + _DARKER * rate, lw=0))
                if row.name == target:
                    axes.add_patch(Rectangle(corner, 0.94, 0.94, fill=False, ec=INK, lw=1.4))
                text = f"{100 * rate:.0f}%" if math.isfinite(rate) else "–"
                axes.text(column + 0.5, top + 0.5, text, ha="center", va="center")
            places.append(top + 0.5)
        axes.set_xlim(0, len(targets))
        axes.set_ylim(places[-1] + 0.5 if places else 1.0, 0)
        axes.set_xticks([column + 0.5 for column in range(len(targets))], [visible(name, 20) for name in targets], rotation=40)
        for label in axes.get_xticklabels():
            label.set(ha="left", rotation_mode="anchor")
        axes.set_yticks(places, [visible(name, 24) for name in sources])
        axes.xaxis.tick_top()
        axes.xaxis.set_label_position("top")
        axes.set_xlabel("shown to")
        axes.set_ylabel("crafted on")
        axes.tick_params(length=0, labelcolor=INK)
        axes.spines.bottom.set_visible(False)
        axes.grid(visible=False)
        return figure


def defenses(tournament: Tournament) -> Figure:
    """Left, accuracy with and without an attack, and the Pareto front; right, robust accuracy over the cost of training.

    Each point has its place in the ranking as a number; an open one is what the naive attack promised.
    """
    ranking, front = tournament.ranking, tournament.front
    least = min((row.training.passes for row in ranking if row.training.passes), default=1)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(10.4, 4.6))
        left, right = figure.subplots(1, 2)
        accuracies, costs = [row.clean_accuracy for row in ranking], [row.training.passes / least for row in ranking]
        for axes, across in ((left, accuracies), (right, costs)):
            for number, (row, x) in enumerate(zip(ranking, across, strict=True), 1):
                color, y = SERIES[1] if row in front else MUTED, row.robust_accuracy
                axes.plot([x, x], row.limits, color=color, lw=3, alpha=_FAINT, solid_capstyle="butt")
                axes.plot([x, x], [y, row.naive_accuracy], color=SERIES[0], lw=1, ls=_LEVEL)
                axes.plot(x, row.naive_accuracy, marker="o", ms=6, mfc=PAPER, mec=SERIES[0], lw=0)
                axes.plot(x, y, marker="o", ms=8, color=color, mec=PAPER, mew=1, lw=0, zorder=3)
                at = {"textcoords": "offset points", "weight": "bold", "fontsize": 9}
                axes.annotate(str(number), (x, y), (7, -3), **at)
            axes.yaxis.set_major_formatter(PercentFormatter(1))
            axes.set_ylim(0, min(1.02, 0.06 + max(max(r.limits[1], r.naive_accuracy) for r in ranking)))
        steps = sorted((row.clean_accuracy, row.robust_accuracy) for row in front)
        edge = [(0.0, steps[0][1]), *steps, (steps[-1][0], 0.0)]
        left.step(*zip(*edge, strict=True), where="pre", color=SERIES[1], lw=1.4, alpha=_HALF)
        left.xaxis.set_major_formatter(PercentFormatter(1))
        left.set_xlim(max(0, min(accuracies) - 0.05), 1.02)
        left.set_xlabel("accuracy without an attack")
        left.set_ylabel("robust accuracy, at most")
        left.set_title("what robustness costs in accuracy")
        right.set_xscale("symlog", linthresh=1, linscale=0.5)
        right.set_xlim(0, 1.6 * max(1, *costs))
        right.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"x{value:g}"))
        right.xaxis.set_minor_formatter(NullFormatter())
        right.set_xlabel("passes of the training, by the cheapest one's")
        right.set_title("and in training")
        dot: dict[str, Any] = {"marker": "o", "ms": 7, "lw": 0, "mec": PAPER}
        figure.legend(
            handles=[
                Line2D([], [], color=SERIES[1], label="on the Pareto front", **dot),
                Line2D([], [], color=MUTED, label="below the front", **dot),
                Line2D([], [], color=SERIES[0], label="what the naive attack left", **dot | {"mfc": PAPER, "mec": SERIES[0]}),
                Patch(color=MUTED, alpha=_FAINT, lw=0, label="95 % limits"),
            ],
            loc="outside lower center", ncols=4, handlelength=1.2, columnspacing=1.6,
        )  # fmt: skip
        return figure


def roc(detection: Detection) -> Figure:
    """A ROC curve for each detector, a panel for each attack that fooled the model; low false-positive rates are drawn wide."""
    attacks = [one.name for one in detection.examples if len(one.fooling)]
    wide = min(3, max(1, len(attacks)))
    with matplotlib.rc_context(_STYLE):
        tall = max(1, math.ceil(len(attacks) / wide))
        figure = Figure(figsize=(3.6 * wide + 0.4, 3.3 * tall + 0.7))
        grid = figure.subplots(tall, wide, squeeze=False, sharey=True)
        for axes in grid.flat:
            axes.set_visible(False)
        for axes, name in zip(grid.flat, attacks, strict=False):
            axes.set_visible(True)
            for place, row in enumerate(detection.ranking):
                found = next(one for one in row.detected if one.attack == name)
                false, true = roc_curve(found.clean, found.fooling)
                axes.plot(false, true, drawstyle="steps-post", lw=1.6, **_line(place))
            for rate in RATES:
                axes.axvline(rate, color=MUTED, lw=0.8, ls=_LEVEL)
            axes.plot(np.geomspace(_LEAST_RATE, 1), np.geomspace(_LEAST_RATE, 1), color=GRID, lw=1)
            axes.set_xscale("log")
            axes.set_xlim(_LEAST_RATE, 1)
            axes.set_ylim(-0.02, 1.02)
            axes.xaxis.set_major_formatter(PercentFormatter(1))
            axes.yaxis.set_major_formatter(PercentFormatter(1))
            axes.set_title(visible(name))
            axes.set_xlabel("clean inputs flagged")
        grid[0, 0].set_ylabel("examples noticed")
        handles = [
            Line2D([], [], lw=1.6, label=visible(row.name), **_line(place)) for place, row in enumerate(detection.ranking)
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=min(3, max(1, len(handles))), columnspacing=1.6)
        return figure


def detector_scores(detection: Detection) -> Figure:
    """How the scores of clean inputs, of each attack's examples and of adaptive ones are spread, a panel for each detector.

    In units of the clean scores: 0 is their median, 1 the 95th percentile.
    """
    rows = detection.ranking
    with matplotlib.rc_context(_STYLE):
        wide = min(2, max(1, len(rows)))
        tall = max(1, math.ceil(len(rows) / wide))
        figure = Figure(figsize=(5.2 * wide, 1.9 * tall + 0.7))
        grid = figure.subplots(tall, wide, squeeze=False)
        for axes in grid.flat:
            axes.set_visible(False)
        for axes, row in zip(grid.flat, rows, strict=False):
            axes.set_visible(True)
            low = float(row.clean.median())
            unit = (float(row.clean.double().quantile(0.95)) - low) or 1.0
            groups = [("clean", row.clean, MUTED)]
            groups += [(one.attack, one.fooling, SERIES[place % len(SERIES)]) for place, one in enumerate(row.detected)]
            groups += [("adaptive", one.scores, INK) for one in row.bypasses]
            edges = np.linspace(-_REACH, _REACH, 61)
            for name, scores, color in groups:
                if not len(scores):
                    continue
                units = (scores.double() - low) / unit
                squeezed = (units.sign() * units.abs().log1p()).clamp(-_REACH, _REACH).numpy()
                shares, _ = np.histogram(squeezed, edges)
                shares = shares / len(scores)
                filled = {"alpha": _FAINT, "fill": True} if name == "clean" else {"fill": False}
                axes.stairs(shares, edges, color=color, lw=1.2, ls="--" if name == "adaptive" else "-", **filled)
            axes.axvline(math.log1p(1), color=MUTED, lw=0.8, ls=_LEVEL)
            marks = (-10, -1, 0, 1, 10, 100)
            axes.set_xticks([math.copysign(math.log1p(abs(mark)), mark) for mark in marks], [f"{mark:g}" for mark in marks])
            axes.set_xlim(-_REACH / 2, _REACH)
            axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
            axes.set_title(visible(row.name))
        handles = [Patch(color=MUTED, alpha=_HALF, lw=0, label="clean")]
        for place, one in enumerate(detection.examples):
            handles.append(Patch(fill=False, edgecolor=SERIES[place % len(SERIES)], label=visible(one.name)))
        if any(row.bypasses for row in rows):
            handles.append(Patch(fill=False, edgecolor=INK, ls="--", label="made to look clean"))
        figure.legend(handles=handles, loc="outside lower center", ncols=min(5, len(handles)), columnspacing=1.6)
        return figure


def _line(place: int) -> dict[str, Any]:
    """Colour and dashes of the curve at this place: colours return with other dashes."""
    return {"color": SERIES[place % len(SERIES)], "ls": "-" if place < len(SERIES) else _DASHES[place % len(_DASHES)]}


def queries(curves: Mapping[str, QueryCurve]) -> Figure:
    """Share of fooled samples over queries with its limits; or the median distance, with the middle half of the samples."""
    first = next(iter(curves.values()))
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(6.6, 3.9))
        axes = figure.add_subplot()
        for place, (name, curve) in enumerate(curves.items()):
            color, steps = SERIES[place % len(SERIES)], _where_it_turns(curve)
            if curve.smallest:
                low, middle, high = ([curve.quantile(q, level).value for q in steps] for level in LEVELS)
                marks = [curve.quantile(q).value for q in curve.at]
            else:
                middle, marks = [curve.share(q) for q in steps], [curve.share(q) for q in curve.at]
                low, high = ([curve.limits(q)[end] for q in steps] for end in (0, 1))
            finite = [[value if math.isfinite(value) else math.nan for value in line] for line in (low, middle, high, marks)]
            low, middle, high, marks = finite
            axes.fill_between(steps, low, high, step="post", color=color, alpha=_FAINT, lw=0)
            axes.step(steps, middle, where="post", color=color, lw=2.2, label=visible(name, 32))
            axes.plot(curve.at, marks, color=color, marker="o", ms=6, mec=PAPER, mew=1, lw=0, clip_on=False, zorder=3)
        axes.set_xscale("log")
        axes.set_xlim(1, max(2, *(curve.reach for curve in curves.values())))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: count(value)))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("queries of a sample")
        if first.smallest:
            low, high = axes.dataLim.intervaly
            if high > _STEEP * low > 0:
                axes.set_yscale("log")
                axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: length(value)))
                axes.yaxis.set_minor_formatter(NullFormatter())
            else:
                axes.set_ylim(bottom=0)
            axes.set_ylabel(f"{first.norm} distance")
        else:
            axes.set_ylim(0, 1.02)
            axes.yaxis.set_major_formatter(PercentFormatter(1))
            axes.set_ylabel("fooled, of those attacked")
        if len(curves) > 1:
            axes.legend(loc="upper right" if first.smallest else "upper left")
        return figure


def _where_it_turns(curve: QueryCurve) -> list[int]:
    """Numbers of queries from 1 to the curve's end, about evenly on a logarithmic scale, with those that the table tells."""
    return sorted({*curve.at, *(round(curve.reach ** (step / _POINTS)) for step in range(_POINTS + 1))})


def training(histories: Mapping[str, History]) -> Figure:
    """Loss, and clean and robust validation accuracy, over the epochs of every training."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(6.6, 3.1))
        loss, accuracy = figure.subplots(1, 2)
        for place, (name, history) in enumerate(histories.items()):
            color, label = SERIES[place % len(SERIES)], visible(name, 24)
            marker = "o" if len(history.epochs) <= 20 else ""
            kwargs: dict[str, Any] = {"color": color, "marker": marker, "ms": 3.5, "lw": 1.8}
            loss.plot([e.epoch for e in history.epochs], [e.loss for e in history.epochs], label=label, **kwargs)
            for measure, line in (("clean", "-"), ("robust", (0, (4, 2)))):
                points = [(e.epoch, getattr(e, f"{measure}_accuracy")) for e in history.epochs]
                points = [point for point in points if point[1] is not None]
                if points:
                    accuracy.plot(*zip(*points, strict=True), ls=line, label=f"{label}, {measure}", **kwargs)
        loss.set_ylim(bottom=0)
        accuracy.set_ylim(0, 1.02)
        accuracy.yaxis.set_major_formatter(PercentFormatter(1))
        for axes, title in ((loss, "loss in training"), (accuracy, "validation accuracy")):
            axes.set_title(title)
            axes.set_xlabel("epoch")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            if axes.lines:
                axes.legend()
            else:
                axes.text(0.5, 0.5, "not measured", color=MUTED, ha="center", transform=axes.transAxes)
        return figure


def examples(gallery: Gallery, class_names: Sequence[str] = ()) -> Figure:
    """Samples side by side: the original above, then for each model the perturbation and what the model sees in the result."""
    with matplotlib.rc_context(_STYLE):
        columns, rows = len(gallery.examples), 1 + 2 * len(gallery.models)
        if gallery.kind == "features":
            return _feature_bars(gallery, class_names)
        figure = Figure(figsize=(1.25 * columns + 1.3, 1.42 * rows + 0.1))
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes in grid.flat:
            axes.set(xticks=[], yticks=[])
            axes.grid(visible=False)
            for spine in axes.spines.values():
                spine.set(visible=True, color=GRID)
        for column, example in enumerate(gallery.examples):
            grid[0, column].imshow(picture(example.original, gallery), interpolation="nearest")
            grid[0, column].set_title(visible(class_name(example.label, class_names), 14), loc="center", fontsize=9)
            for place, shot in enumerate(example.shots):
                change, result = grid[1 + 2 * place : 3 + 2 * place, column]
                change.imshow(change_picture(shot.delta, gallery.factor), interpolation="nearest")
                result.imshow(picture(shot.adversarial, gallery), interpolation="nearest")
                _caption(result, shot, class_names)
        _side(grid[0, 0], "original", INK)
        for place, name in enumerate(gallery.models):
            color = SERIES[place % len(SERIES)]
            _side(grid[1 + 2 * place, 0], f"change ×{gallery.factor:.3g}", MUTED)
            _side(grid[2 + 2 * place, 0], f"what\n{visible(name, 14)}\nsees", color)
        return figure


def _side(axes: Axes, text: str, color: str) -> None:
    axes.set_ylabel(text, color=color, rotation=0, ha="right", va="center", labelpad=8)


def _caption(axes: Axes, shot: Shot, class_names: Sequence[str]) -> None:
    """What the model says, in words, with a frame that tells fooled from not: dark and thick, or thin and light."""
    fooled = shot.status in (Status.FOOLED, Status.ALREADY_WRONG)
    confidence = "" if shot.confidence is None else f" {100 * shot.confidence:.0f}%"
    text = f"{'✗' if fooled else '✓'} {visible(class_name(shot.predicted, class_names), 12)}{confidence}"
    axes.set_xlabel(text, color=SERIES[0] if fooled else SERIES[2], fontsize=9, labelpad=3)
    for spine in axes.spines.values():
        spine.set(color=SERIES[0] if fooled else SERIES[2], linewidth=1.6)


def _feature_bars(gallery: Gallery, class_names: Sequence[str]) -> Figure:
    """The change of every feature, for tables."""
    columns, rows = len(gallery.models), len(gallery.examples)
    figure = Figure(figsize=(4.2 * columns, 1.15 * rows + 0.6))
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for line, example in zip(grid, gallery.examples, strict=True):
        for place, (axes, shot) in enumerate(zip(line, example.shots, strict=True)):
            axes.bar(range(shot.delta.numel()), shot.delta.tolist(), width=0.8, color=SERIES[place % len(SERIES)])
            axes.axhline(0, color=GRID, lw=0.8)
            axes.set_title(f"{visible(shot.model, 20)}: {_change(example, shot, class_names)}", fontsize=9, weight="normal")
    for axes in grid[-1]:
        axes.set_xlabel("feature")
    return figure


def _change(example: Example, shot: Shot, class_names: Sequence[str]) -> str:
    before, after = (visible(class_name(c, class_names), 14) for c in (shot.clean_predicted, shot.predicted))
    sure = "" if shot.confidence is None else f" ({percent(shot.confidence)})"
    return f"{before} → {after}{sure}"


def picture(image: Tensor, gallery: Gallery) -> npt.NDArray[np.uint8]:
    """An image (C, H, W) with values in the gallery's range as bytes (H, W, 3)."""
    return _bytes((image.double() - gallery.low) / ((gallery.high - gallery.low) or 1.0))


def change_picture(delta: Tensor, factor: float) -> npt.NDArray[np.uint8]:
    """A signed change (C, H, W), magnified around the middle: grey for none in colour images, white in the others.

    One channel: red is brighter, blue is darker.
    """
    level = 0.5 + factor * delta.double()
    if len(level) == 3:
        return _bytes(level)
    colors = matplotlib.colormaps["RdBu_r"](level[0].clamp(0, 1).numpy())[..., :3]
    return _bytes(torch.from_numpy(np.moveaxis(colors, -1, 0)))


def _bytes(levels: Tensor) -> npt.NDArray[np.uint8]:
    levels = levels.expand(3, *levels.shape[1:]).nan_to_num().clamp(0, 1)
    found: npt.NDArray[np.uint8] = (levels * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    return found


def to_png(figure: Figure, scale: float = 2.0) -> bytes:
    """The figure as PNG, by default at twice the size, for screens with many pixels."""
    return _save(figure, format="png", dpi=100 * scale)


def to_svg(figure: Figure, name: str) -> str:
    """The figure as SVG to stand inside an HTML page: colours follow the page's, identifiers start with `name`."""
    text = _save(figure, format="svg", transparent=True, metadata={"Date": None}).decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    variables = {PAPER: "paper", INK: "ink", MUTED: "muted", GRID: "grid"} | {
        color: f"series-{i}" for i, color in enumerate(SERIES)
    }

    def adapt(match: re.Match[str]) -> str:
        tag = re.sub(r' xmlns(:\w+)?="[^"]*"| version="1.1"', "", match[0])
        if tag.startswith("<svg"):
            tag = re.sub(r' (width|height)="[^"]*"', "", tag)  # the viewBox is left, and CSS decides
        tag = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", tag)
        for color, variable in variables.items():
            tag = tag.replace(color, f"var(--{variable})")
        return tag

    return re.sub(r"<[^>]+>", adapt, text)  # tags only: what is written between them stays as it is


def _save(figure: Figure, **options: Any) -> bytes:
    stream = io.BytesIO()
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        # a class name in a script that the font lacks: boxes in the figure, the name itself in the text
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from")
        figure.savefig(stream, **options)
    return stream.getvalue()
