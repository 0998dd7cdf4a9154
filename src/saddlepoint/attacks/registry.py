"""All attacks by name. A new one is registered once, and the contract tests, the lists and the command line know it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TypeVar

from saddlepoint.engine import Attack, Declaration
from saddlepoint.errors import InputError, UnknownNameError
from saddlepoint.taxonomy import Access, Norm

A = TypeVar("A", bound=type[Attack])
_REGISTRY: dict[str, type[Attack]] = {}


def register(declaration: Declaration) -> Callable[[A], A]:
    """Class decorator: state where the attack stands, and make it known by its class name in lower case."""

    def add(cls: A) -> A:
        cls.declaration = declaration
        _REGISTRY[cls.__name__.lower()] = cls
        return cls

    return add


def get(name: str) -> type[Attack]:
    """The attack of that name, in any case and with or without hyphens. Errors: `UnknownNameError`."""
    key = re.sub(r"[-_ ]", "", name.lower())
    if key == "minimal":
        raise InputError('"minimal" depends on the norm and the budget; here write sp.attacks.minimal(norm, passes)')
    if key not in _REGISTRY:
        raise UnknownNameError("attack", name, (cls.__name__ for cls in _REGISTRY.values()))
    return _REGISTRY[key]


def as_attack(attack: Attack | str) -> Attack:
    """The attack itself, or the one of that name with its defaults. Errors: `InputError`, `UnknownNameError`."""
    if isinstance(attack, str):
        return get(attack)()
    if not isinstance(attack, Attack):
        raise InputError(f"attack must be an attack such as sp.attacks.PGD() or a name; got {attack!r}")
    return attack


def find(
    *,
    access: Access | None = None,
    norm: Norm | str | None = None,
    targeted: bool | None = None,
    minimizes: bool | None = None,
) -> list[type[Attack]]:
    """Attacks that manage with this access, work in this norm, can (not) be targeted, look for the smallest perturbation."""

    def fits(declaration: Declaration) -> bool:
        return (
            (access is None or declaration.access <= access)
            and (norm is None or Norm(norm) in declaration.norms)
            and (targeted is None or declaration.targeted == targeted)
            and (minimizes is None or declaration.minimizes == minimizes)
        )

    return [cls for _, cls in sorted(_REGISTRY.items()) if fits(cls.declaration)]
