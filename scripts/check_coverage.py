"""Check docs/coverage.md: every item is there once, and every `done` names a test and a README section that exist."""

import ast
import re
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CHECKLIST = ROOT / "docs" / "coverage.md"
README = ROOT / "README.md"

# How many items each numbered group has, so that no edit loses one. The methods of the surveys (S-...) have names.
NUMBERED = {"A": 22, "B": 22, "C": 36, "D": 23, "E": 7, "F": 5, "G": 17, "H": 26}
ID = re.compile(r"[A-H]\d+|S-[a-z0-9-]+")
TEST = re.compile(r"(tests/[\w/]+\.py)::([\w:]+)")
ANCHOR = re.compile(r"README\.md#([\w-]+)")


def rows(text: str) -> tuple[list[list[str]], list[str]]:
    """The cells of every item's row, and what is wrong with the rows' form."""
    found, wrong = [], []
    for number, line in enumerate(text.splitlines(), start=1):
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if not line.startswith("|") or cells[0] == "id" or set(cells[0]) <= set(":-"):
            continue
        if len(cells) != 5 or not ID.fullmatch(cells[0]) or cells[2] not in ("done", "planned"):
            wrong.append(f"line {number}: not `id | item | done or planned | test | README link`: {line}")
        else:
            found.append(cells)
    return found, wrong


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to a page's headings, and those that the page sets itself."""
    seen: Counter[str] = Counter()
    result = set(re.findall(r'<a id="([\w-]+)">', text))
    for heading in re.findall(r"^#{1,6} +(.+?) *#*$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), flags=re.M):
        heading = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading)  # a link counts by its text
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        result.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return result


def has_test(file: str, name: str) -> bool:
    """Whether the file defines that test (`test_x`, or `TestX::test_y` in a class)."""
    path = ROOT / file
    body: list[ast.stmt] = ast.parse(path.read_text(encoding="utf-8")).body if path.is_file() else []
    for part in name.split("::"):
        nodes = [n for n in body if isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name == part]
        if not nodes:
            return False
        body = nodes[-1].body
    return isinstance(nodes[-1], ast.FunctionDef)


def main() -> int:
    items, wrong = rows(CHECKLIST.read_text(encoding="utf-8"))
    headings = anchors(README.read_text(encoding="utf-8")) if README.is_file() else set()

    times = Counter(cells[0] for cells in items)
    wrong += [f"{name}: {count} rows" for name, count in times.items() if count > 1]
    wanted = {f"{group}{n}" for group, size in NUMBERED.items() for n in range(1, size + 1)}
    wrong += [f"{name}: no row" for name in sorted(wanted - times.keys())]
    wrong += [f"{name}: no such item" for name in sorted(n for n in times.keys() - wanted if not n.startswith("S-"))]

    for name, _, state, test, link in items:
        if state != "done":
            continue
        tests, links = TEST.findall(test), ANCHOR.findall(link)
        if not tests:
            wrong.append(f"{name}: done, but names no test (tests/file.py::test_name)")
        if not links:
            wrong.append(f"{name}: done, but names no README section (README.md#anchor)")
        wrong += [f"{name}: no test {file}::{function}" for file, function in tests if not has_test(file, function)]
        wrong += [f"{name}: no heading in README.md gives #{anchor}" for anchor in links if anchor not in headings]

    for problem in wrong:
        print(f"docs/coverage.md: {problem}", file=sys.stderr)
    states = Counter(cells[2] for cells in items)
    print(f"docs/coverage.md: {states['done']} done, {states['planned']} planned, {len(items)} in all")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
