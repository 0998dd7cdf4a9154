"""Write the tables of docs/attacks.md from what the attacks declare, or, with --check, say where they differ.

The text beside the tables is written by hand: one line "- **Name**: ..." for every name in `sp.attacks`, and none for others.
"""

import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import saddlepoint as sp

PAGE = Path(__file__).resolve().parent.parent / "docs" / "attacks.md"
TABLE = re.compile(r"(<!-- table: (ball|smallest|asked) -->\n).*?(<!-- end -->)", re.S)
TEXT = re.compile(r"^- \*\*(\w+)\*\*:", re.M)
NO_ATTACKS = {"find", "get", "register"}  # what else `sp.attacks` has
CLASSES = (2, 3, 5, 10, 20, 50, 1000)
HEAD = ("attack", "norms", "goals", "access", "passes a step", "steps", "what it does", "source")


def of_classes(count: Callable[[int], int]) -> str:
    """A number of passes as people write it: a number, `(C - 1)` for C classes, or that with an upper limit."""
    values = [count(classes) for classes in CLASSES]
    less, most = CLASSES[0] - values[0], values[-1]
    formula = f"C - {less}" if less else "C"
    for text, expected in (
        (str(most), [most] * len(CLASSES)),
        (f"({formula})", [classes - less for classes in CLASSES]),
        (f"min({formula}, {most})", [min(classes - less, most) for classes in CLASSES]),
    ):
        if values == expected:
            return text
    raise ValueError(f"passes for {CLASSES} classes are {values}: teach scripts/attack_table.py to say that")


def passes(cost: Callable[[int], tuple[int, int]]) -> str:
    return " + ".join(of_classes(lambda classes, which=which: cost(classes)[which]) for which in (0, 1))


def row(cls: type[sp.engine.Attack]) -> str:
    attack, can = cls(), cls.declaration
    each, first = passes(attack.cost), passes(attack.opening)
    goals = "any" if can.targeted and can.untargeted else "targeted" if can.targeted else "untargeted"
    cells = (
        f"`{cls.__name__}`",
        "all" if can.norms == frozenset(sp.Norm) else ", ".join(norm.value for norm in sp.Norm if norm in can.norms),
        goals,
        can.access.name.lower(),
        each if each == first else f"{each}; first {first}",
        f"{attack.iterations:,}",
        can.summary,
        can.reference,
    )
    return "| " + " | ".join(cells) + " |"


def kind(cls: type[sp.engine.Attack]) -> str:
    if cls.declaration.access < sp.Access.GRADIENTS:
        return "asked"
    return "smallest" if cls.declaration.minimizes else "ball"


def table(wanted: str) -> str:
    lines = [f"| {' | '.join(HEAD)} |", "| --- | --- | --- | --- | --- | ---: | --- | --- |"]
    lines += [row(cls) for cls in sorted(sp.attacks.find(), key=lambda cls: cls.__name__.lower()) if kind(cls) == wanted]
    return "\n".join(lines) + "\n"


def written(page: str) -> str:
    """The page with the tables as they should be."""
    return TABLE.sub(lambda found: found[1] + table(found[2]) + found[3], page)


def differences(page: str) -> list[str]:
    """What is wrong with the page."""
    wrong = []
    if sorted(found[2] for found in TABLE.finditer(page)) != ["asked", "ball", "smallest"]:
        wrong.append(
            "it needs <!-- table: ball -->, <!-- table: smallest --> and <!-- table: asked -->, each with an <!-- end -->"
        )
    if written(page) != page:
        wrong.append("a table is not what the attacks declare: run python scripts/attack_table.py")
    times = Counter(TEXT.findall(page))
    names = set(sp.attacks.__all__) - NO_ATTACKS
    wrong += [f'no line "- **{name}**: ..." says when to use it' for name in sorted(names - times.keys())]
    wrong += [f"{name} is no attack of sp.attacks" for name in sorted(times.keys() - names)]
    wrong += [f"{name} has {count} lines" for name, count in times.items() if count > 1]
    return wrong


def main(arguments: list[str]) -> int:
    page = PAGE.read_text(encoding="utf-8")
    if "--check" not in arguments:
        page = written(page)
        PAGE.write_text(page, encoding="utf-8")
    wrong = differences(page)
    for problem in wrong:
        print(f"docs/attacks.md: {problem}", file=sys.stderr)
    print(f"docs/attacks.md: {len(sp.attacks.find())} attacks")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
