"""Errors and warnings: what was wrong, where, and what to do about it.

Every error derives from `SaddlepointError`; those for which the caller's input is at fault are `ValueError`s too, so
that code which knows nothing of this package still catches them.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SaddlepointError(Exception):
    """Base of every error that this package raises on purpose."""


class InputError(SaddlepointError, ValueError):
    """An argument has a wrong value, shape, dtype or range."""


class UnknownNameError(InputError):
    """A name (of an attack, dataset, network, ...) is not known; the message suggests the nearest ones."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        names = sorted(known)
        lowered = {candidate.lower(): candidate for candidate in names}
        near = [lowered[match] for match in difflib.get_close_matches(name.lower(), lowered, n=3, cutoff=0.5)]
        hint = f"did you mean {' or '.join(repr(n) for n in near)}?" if near else f"known are: {', '.join(names)}"
        super().__init__(f"unknown {kind} {name!r}; {hint}")
        self.kind, self.name, self.near = kind, name, near


class CapabilityError(InputError):
    """An attack was asked for what it or the model cannot do (access, norm, goal, input rank)."""


class DataError(InputError):
    """A data or weight file is missing, truncated, corrupt or of another shape than stated."""


class MissingExtraError(SaddlepointError, ImportError):
    """An optional dependency is needed and not installed."""

    def __init__(self, feature: str, package: str, extra: str) -> None:
        super().__init__(f"{feature} needs the package {package!r}: pip install 'saddlepoint[{extra}]'")
        self.feature, self.package, self.extra = feature, package, extra


class ModelError(SaddlepointError):
    """The model itself misbehaves: wrong output shape, NaN everywhere, gradients cut off.

    result: where it ended a run of `sp.attack`, the `AttackResult` of the finished samples: give it back as `resume=`.
    """

    result: object = None


class Unavailable(ModelError):  # noqa: N818  # it says what the model is
    """A remote model does not answer any more."""


class SoundnessError(SaddlepointError):
    """A proof and a counterexample contradict each other: a defect of Saddlepoint, or a model that changes. Report it."""


class SaddlepointWarning(UserWarning):
    """Something was noticed that makes a result hard to trust, though it was computed."""
