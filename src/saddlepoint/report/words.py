"""Names and numbers as people read them, the same in the report, its figures and its file names."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence

from saddlepoint.engine import Attack
from saddlepoint.taxonomy import Access


def percent(share: float | None) -> str:
    """A share with one decimal, a dash where there is none."""
    return "–" if share is None or math.isnan(share) else f"{100 * share:.1f}%"


def length(distance: float | None) -> str:
    """A measured distance with three digits; a dash where there is none."""
    if distance is None or not math.isfinite(distance):
        return "–"
    return f"{distance:,.0f}" if distance >= 1000 else f"{distance:.3g}"


def count(value: float) -> str:
    """A number of passes: 40, 12.5, 1,234,567."""
    return f"{value:,.0f}" if value >= 1000 or value == round(value) else f"{value:.1f}"


def listed(items: Iterable[str]) -> str:
    """a, b and c."""
    *front, last = items
    return f"{', '.join(front)} and {last}" if front else last


def visible(name: str, limit: int = 40) -> str:
    """A name for a figure: without control characters, which no font draws, and not longer than `limit`.

    Long ones lose their middle, since names that begin alike often differ at the end.
    """
    clean = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name)
    tail = limit // 3
    return clean if len(clean) <= limit else f"{clean[: limit - tail - 1]}…{clean[-tail:]}"


def file_name(*parts: str) -> str:
    """The parts as one name that is harmless on every file system."""
    return "-".join(re.sub(r"[^A-Za-z0-9._]+", "_", part).strip("._")[:60] or "_" for part in parts)


def distinct(names: Iterable[str]) -> list[str]:
    """The names, numbered where they would coincide; some file systems don't tell upper from lower case."""
    found: list[str] = []
    taken: set[str] = set()
    for base in names:
        name, number = base, 1
        while name.lower() in taken:
            number += 1
            name = f"{base}-{number}"
        taken.add(name.lower())
        found.append(name)
    return found


def class_name(label: int, class_names: Sequence[str]) -> str:
    """The class's name if it has one, otherwise its number."""
    return str(class_names[label]) if 0 <= label < len(class_names) else str(label)


def is_noise(attack: Attack) -> bool:
    """Whether this is a random baseline rather than a search: one draw that asks the model for nothing but a label."""
    return attack.declaration.access <= Access.LABELS and not attack.declaration.iterative


def attack_labels(attacks: Iterable[Attack]) -> dict[Attack, str]:
    """A short name for each attack; the settings in which they differ are added where names would coincide."""
    distinct = list(dict.fromkeys(attacks))
    short = {attack: _short(attack.settings()) for attack in distinct}
    labels = {}
    for attack in distinct:
        namesakes = [_flat(other.settings()) for other in distinct if short[other] == short[attack]]
        own = _flat(attack.settings())
        differing = [key for key in own if any(other.get(key) != own[key] for other in namesakes)]
        labels[attack] = short[attack] + (f" {', '.join(f'{k}={own[k]}' for k in differing)}" if differing else "")
    return labels


def _short(settings: Mapping[str, object]) -> str:
    values = [part for value in settings.values() for part in (value if isinstance(value, list | tuple) else [value])]
    inner = [_short(value) for value in values if isinstance(value, Mapping) and "name" in value]
    return f"{settings['name']}({', '.join(inner)})" if inner else str(settings["name"])


def _flat(settings: Mapping[str, object]) -> dict[str, object]:
    """Nested settings in one level; the innermost attack's keys as they are."""
    flat: dict[str, object] = {}
    for key, value in settings.items():
        flat |= _flat(value) if isinstance(value, Mapping) else {key: value}
    return flat
