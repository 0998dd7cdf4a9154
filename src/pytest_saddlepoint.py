"""pytest plugin: `assert_robust`, for tests that attack a model. They are run by `pytest --saddlepoint` only.

    def test_robust(assert_robust):
        assert_robust(sp.Model(net), x, y, sp.Linf(4 / 255), at_least=0.6)

It stands outside of the package because pytest loads it in every project: `import saddlepoint` takes PyTorch with it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pytest

if TYPE_CHECKING:
    from torch import Tensor

    from saddlepoint.evaluate import Effort
    from saddlepoint.gates import Gate
    from saddlepoint.models import Classifier
    from saddlepoint.threats import Threat

_SKIPPED = "robustness tests are slow: run them with pytest --saddlepoint"
_FIXTURE, _MARK = "assert_robust", "robustness"
_LONGEST = 100  # characters of a folder's name


class AssertRobust(Protocol):
    """What the fixture is. options: more keywords of `sp.evaluate`, such as seed and batch_size."""

    def __call__(
        self,
        model: Classifier,
        x: Tensor,
        y: Tensor,
        threat: Threat | Sequence[Threat],
        *,
        at_least: float,
        effort: Effort = "standard",
        **options: Any,
    ) -> Gate: ...


def pytest_addoption(parser: pytest.Parser) -> None:
    """The plugin's options."""
    group = parser.getgroup("saddlepoint", "robustness of models")
    group.addoption("--saddlepoint", action="store_true", help=f"run the tests that attack a model ({_FIXTURE})")
    group.addoption(
        "--saddlepoint-out", metavar="DIR", type=Path, help=f"where {_FIXTURE} puts counterexamples as pictures, and gate.json"
    )


def pytest_configure(config: pytest.Config) -> None:
    """The marker, so that --strict-markers knows it."""
    config.addinivalue_line("markers", f"{_MARK}: attacks a model; skipped unless pytest is run with --saddlepoint")


@pytest.hookimpl(tryfirst=True)  # -m looks at the markers afterwards
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the tests that use the fixture, and skip the marked ones unless they were asked for."""
    for item in items:
        if _FIXTURE in getattr(item, "fixturenames", ()):
            item.add_marker(_MARK)
        if item.get_closest_marker(_MARK) and not config.getoption("saddlepoint"):
            item.add_marker(pytest.mark.skip(reason=_SKIPPED))


@pytest.fixture
def assert_robust(request: pytest.FixtureRequest) -> AssertRobust:
    """assert_robust(model, x, y, threat, at_least=0.6, effort="standard"): attack, and fail if too few samples stand.

    Several threats ask for the worst case over them. Returns the `saddlepoint.gates.Gate`.
    """
    if not request.config.getoption("saddlepoint"):  # asked for by getfixturevalue()
        pytest.skip(_SKIPPED)
    out: Path | None = request.config.getoption("saddlepoint_out")
    numbers = count(1)

    def check(
        model: Classifier,
        x: Tensor,
        y: Tensor,
        threat: Threat | Sequence[Threat],
        *,
        at_least: float,
        effort: Effort = "standard",
        **options: Any,  # evaluate checks them
    ) -> Gate:
        __tracebackhide__ = True
        from saddlepoint.evaluate import evaluate
        from saddlepoint.gates import check_share, gate

        check_share(at_least)  # before the work
        found = gate(evaluate(model, x, y, threat, effort, **options), at_least)
        if out is not None:
            found = found.save(request.config.invocation_params.dir / out / _folder(request.node.nodeid, next(numbers)))
        if not found.complete:
            raise KeyboardInterrupt(found.message)  # evaluate keeps what is finished, but it is pytest that was to stop
        if not found.passed:
            raise AssertionError(found.message)
        return found

    return check


def _folder(test: str, number: int) -> str:
    """A name for what the test's call of this number found; numbers count from 1."""
    name = re.sub(r"[^A-Za-z0-9._]+", "-", test).strip("-.")
    if len(name) > _LONGEST:
        name = f"{name[:_LONGEST]}-{hashlib.sha256(test.encode()).hexdigest()[:8]}"
    return name if number == 1 else f"{name}-{number}"
