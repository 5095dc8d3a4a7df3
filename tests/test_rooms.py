"""One method, one room: every method has its four rooms, and no room is without its method."""

import ast
from pathlib import Path

import pytest

from subquad.core.errors import ConfigError
from subquad.core.registry import FAMILIES, read_card

ROOT = Path(__file__).resolve().parents[1]


def modules(folder: Path) -> dict[str, Path]:
    """Name to source of every module of a folder, files and folders alike."""
    files = {p.stem: p for p in folder.glob("*.py") if p.stem != "__init__"}
    return files | {p.parent.name: p for p in folder.glob("*/__init__.py")}


def has_run(source: Path) -> bool:
    return any(isinstance(n, ast.FunctionDef) and n.name == "run" for n in ast.parse(source.read_text()).body)


def lacking(page: Path) -> list[str]:
    """What a method's page must have and has not: a title, when to use it, when not, and where it deviates."""
    lines = page.read_text(encoding="utf-8").splitlines()
    has = {
        "a title": lines[:1] and lines[0].startswith("# "),
        "## When": "## When" in lines,
        "## When not": "## When not" in lines,
        "## Deviations": any(line.startswith("## Deviations") for line in lines),
    }
    return [part for part, there in has.items() if not there]


def problems(root: Path) -> list[str]:
    """What is wrong with the rooms under `root`, one line each; empty when every room is in its place."""
    source, found, methods = root / "src/subquad", [], set()
    for family in FAMILIES:
        for slug, path in modules(source / family).items():
            try:
                card = read_card(path)
            except ConfigError as error:
                found.append(str(error))
                continue
            if card is None:
                continue
            methods.add((family, slug))
            bench = modules(source / "bench" / family).get(slug)
            if bench is None:
                found.append(f"{family}/{slug}: no bench room src/subquad/bench/{family}/{slug}.py")
            elif not has_run(bench):
                found.append(f"{family}/{slug}: the bench room has no function run(bench)")
            if not (root / f"tests/{family}/test_{slug}.py").exists():
                found.append(f"{family}/{slug}: no test room tests/{family}/test_{slug}.py")
            page = root / f"docs/methods/{family}/{slug}.md"
            if not page.exists():
                found.append(f"{family}/{slug}: no page docs/methods/{family}/{slug}.md")
            elif lacking(page):
                found.append(f"{family}/{slug}: {page.relative_to(root)} lacks {', '.join(lacking(page))}")
            if card.result and not (root / "bench/results" / card.result).exists():
                found.append(f"{family}/{slug}: no result file bench/results/{card.result}")
            if card.status == "stable" and not (card.claim and card.measured and card.result):
                found.append(f"{family}/{slug}: stable needs a claim, our figure and its result file")

    # Engine and server are measured as a whole, by rooms that are named as what they run or what is done to them.
    whole = {source / "bench/engine", source / "bench/serve"}
    for bench in sorted(set((source / "bench").glob("*/")) - whole):
        for slug in modules(bench):
            if slug not in modules(source / bench.name):
                found.append(f"orphan bench room src/subquad/bench/{bench.name}/{slug}.py")
    for page in sorted((root / "docs/methods").rglob("*.md")):
        if page.stem != "index" and (page.parent.name, page.stem) not in methods:
            found.append(f"orphan page {page.relative_to(root)}")
    for family in FAMILIES:
        for test in sorted((root / "tests" / family).glob("test_*.py")):
            slug = test.stem.removeprefix("test_")
            # A family's contract runs over all its methods and is nobody's own.
            if not slug.startswith("contract") and slug not in modules(source / family):
                found.append(f"orphan test room {test.relative_to(root)}")
    return found


def test_every_room_is_in_its_place():
    assert problems(ROOT) == []


CARD = 'CARD = Card(title="T", entry="T", gives="g", status="incubating", arxiv="2401.00001")\n'
TREE = {
    "src/subquad/mixers/__init__.py": "",
    "src/subquad/mixers/some.py": CARD,
    "src/subquad/mixers/helper.py": "",
    "src/subquad/bench/mixers/some.py": "def run(bench): ...\n",
    "tests/mixers/test_some.py": "",
    "tests/mixers/test_contract.py": "",
    "docs/methods/mixers/some.md": "# T\n\n## When\n\n## When not\n\n## Deviations\n",
}


def build(root: Path, tree: dict[str, str]) -> Path:
    for name, text in tree.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_a_whole_tree_has_no_problem(tmp_path):
    assert problems(build(tmp_path, TREE)) == []


@pytest.mark.parametrize(
    "missing", ["src/subquad/bench/mixers/some.py", "tests/mixers/test_some.py", "docs/methods/mixers/some.md"]
)
def test_a_missing_room_is_found(tmp_path, missing):
    tree = {name: text for name, text in TREE.items() if name != missing}
    assert [p for p in problems(build(tmp_path, tree)) if missing in p] != []


@pytest.mark.parametrize(
    "orphan",
    [
        "src/subquad/bench/mixers/gone.py",
        "tests/mixers/test_gone.py",
        "docs/methods/mixers/gone.md",
        "docs/methods/mixers/helper.md",
    ],
)
def test_an_orphan_room_is_found(tmp_path, orphan):
    assert [p for p in problems(build(tmp_path, TREE | {orphan: "# G\n"})) if "orphan" in p and orphan in p]


@pytest.mark.parametrize(
    ("card", "problem"),
    [
        (CARD.replace("incubating", "ready"), "status 'ready'"),
        (CARD.replace("incubating", "stable"), "stable needs"),
        (CARD.replace('"T"', "name", 1), "literals only"),
        (CARD.replace("gives", "result='x.json', gives"), "no result file"),
    ],
)
def test_a_wrong_card_is_found(tmp_path, card, problem):
    assert any(problem in p for p in problems(build(tmp_path, TREE | {"src/subquad/mixers/some.py": card})))


def test_an_unfinished_page_is_found(tmp_path):
    tree = TREE | {"docs/methods/mixers/some.md": "# T\n\n## When\n\n## Deviations\n"}
    assert any(p.endswith("lacks ## When not") for p in problems(build(tmp_path, tree)))


def test_a_bench_room_that_measures_nothing_is_found(tmp_path):
    tree = TREE | {"src/subquad/bench/mixers/some.py": ""}
    assert any("no function run" in p for p in problems(build(tmp_path, tree)))
