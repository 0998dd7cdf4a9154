"""The report of detectors: what they notice, what they take for an attack, and what gets past them."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from saddlepoint.errors import InputError
from saddlepoint.evaluate.detection import RATES, Detection
from saddlepoint.report.document import frame, plain
from saddlepoint.report.folder import drawing, environment, publish


def write_detection(
    detection: Detection,
    folder: str | Path,
    *,
    title: str,
    data_name: str,
    config: Mapping[str, object],
    model_name: str = "the model",
    data_fingerprint: str = "",
    class_names: Sequence[str] = (),
    command: str = "",
) -> Path:
    """Write the report of a comparison of detectors into `folder`, and return the path of its report.html.

    The folder gets `report.html` (one file, needs nothing else), `results.json` (see `detection_results`), `detectors.csv` (a
    row for each detector and attack) and `figures/`. The others: as in `write`.

    Errors: `DataError` where the folder can't be written; `InputError` without a detector.
    """
    if not detection.rows:
        raise InputError("there are no detectors to report")
    document = detection_results(
        detection, title=title, data_name=data_name, config=config, model_name=model_name,
        data_fingerprint=data_fingerprint, class_names=class_names, command=command,
    )  # fmt: skip
    page, pictures = _page(detection, document)
    return publish(Path(folder), page, document, pictures, tables={"detectors.csv": _table(detection)})


def detection_results(
    detection: Detection,
    *,
    title: str,
    data_name: str,
    config: Mapping[str, object],
    model_name: str = "the model",
    data_fingerprint: str = "",
    class_names: Sequence[str] = (),
    command: str = "",
) -> dict[str, Any]:
    """The content of results.json. What is not a number in JSON (nan, infinity) is null.

    schema, title, command, seed, created, complete, data, versions, config: as in `saddlepoint.report.results`. models: a list
    of one {name, settings}. The rest is `Detection.to_dict`:

    | key | content |
    | --- | --- |
    | samples | {fit, calibrate, test}: how many |
    | accuracy | of the model on the test samples |
    | attacks | a list of {name, settings, threat, seen, success_rate}; seen: detectors were fitted on such examples |
    | ranking | names of the detectors, the hardest to evade first |
    | failed | a list of {name, why}: could not be fitted |
    | detectors | a list, in the order that was asked for |

    Each of `detectors`:

    | key | content |
    | --- | --- |
    | name, settings, fit_seconds, slowdown | what it is; seconds of fitting; time of a score by that of a prediction |
    | mean_auc | mean area under the ROC curve over the attacks |
    | attacks | a list of {attack, seen, fooling, failed, auc, auc_limits, auc_failed, average_precision, detected} |
    | attacks.detected | a list of {fpr, rate, limits} |
    | false_positives | a list of {inputs, fpr, rate}: clean inputs above the threshold for that rate |
    | adaptive | a list of {threat, attacks, evasion_rate, evasion_limits, auc, fooling} |
    | notes | what to know about the figures |
    """
    document: dict[str, Any] = plain({
        **frame(
            detection.samples.test[0], title=title, complete=detection.complete, command=command, seed=detection.seed,
            data_name=data_name, data_fingerprint=data_fingerprint, class_names=class_names,
        ),
        "config": config,
        "models": [{"name": model_name, "settings": detection.rows[0].detector.model.describe()}],
        **detection.to_dict(),
    })  # fmt: skip
    return document


def _page(detection: Detection, document: dict[str, Any]) -> tuple[str, dict[str, bytes]]:
    """The HTML page, and the figures as PNG by file name."""
    from markupsafe import Markup

    from saddlepoint.report import figures

    pictures = {"roc": figures.roc(detection), "scores": figures.detector_scores(detection)}
    page = environment().get_template("detections.html.j2").render(
        document=document, detection=detection, rates=RATES,
        drawn={name: Markup(figures.to_svg(figure, name)) for name, figure in pictures.items()},
        **drawing([row.name for row in detection.rows], ()),
    )  # fmt: skip
    return page, {f"{name}.png": figures.to_png(figure) for name, figure in pictures.items()}


def _table(detection: Detection) -> str:
    """A row for each detector and attack, and for each detector and adaptive adversary, as CSV."""
    stream = io.StringIO()
    writer = csv.writer(stream)
    head = [f"rate_at_{rate:g}" for rate in RATES]
    writer.writerow(["detector", "attack", "seen", "examples", "auc", "auc_low", "auc_high", *head, "evaded"])
    for row in detection.ranking:
        for one in row.detected:
            limits = ("", "") if one.limits is None else one.limits
            rates = ["" if (found := one.rate(rate)) is None else found for rate in RATES]
            auc = "" if one.auc is None else one.auc
            writer.writerow([row.name, one.attack, one.seen, len(one.fooling), auc, *limits, *rates, ""])
        for past in row.bypasses:
            auc = "" if past.auc is None else past.auc
            writer.writerow([row.name, f"adaptive, {past.threat}", False, len(past.scores), auc, "", "", "", "", past.rate])
    return stream.getvalue()
