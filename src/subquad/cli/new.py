"""Lay out the four rooms of a new method: source, test, bench, page."""

from __future__ import annotations

import keyword
import re
from pathlib import Path
from string import Template
from typing import Annotated

import typer

from subquad.core.errors import ConfigError, nearest
from subquad.core.registry import FAMILIES, PACKAGE

TEMPLATES = Path(__file__).resolve().parent / "_rooms"


def run(
    family: Annotated[str, typer.Argument(help=f"One of {', '.join(FAMILIES)}.")],
    slug: Annotated[str, typer.Argument(help="Name of the module, as gated_deltanet.")],
    title: Annotated[str, typer.Option(help="The method's name as its paper gives it; by default from the slug.")] = "",
    arxiv: Annotated[str, typer.Option(help="arXiv id, as 2412.06464.")] = "",
    root: Annotated[Path | None, typer.Option(help="Checkout to write to; by default the one that runs.")] = None,
) -> None:
    """Lay out a method's rooms. A mixer's are a small working mixer that passes the contract: change it from there."""
    root = checkout(root)
    check_name(family, slug, title, arxiv)
    entry = slug.title().replace("_", "")
    source = f"arXiv {arxiv}" if arxiv else "no paper"
    values = {"family": family, "slug": slug, "entry": entry, "title": title or entry, "arxiv": arxiv, "source": source}
    templates = TEMPLATES / ("mixers" if family == "mixers" else "method")
    rooms: dict[Path, str] = {}
    for room, path in places(root, family, slug).items():
        template = Template((templates / f"{room}.txt").read_text(encoding="utf-8"))
        rooms[path] = template.substitute(values)
    package = root / "src" / "subquad" / family / slug
    taken = [path for path in (*rooms, package) if path.exists()]
    if taken:
        raise ConfigError(f"{family}/{slug}: expected nothing there, got {taken[0]}; choose another slug")
    for path, text in rooms.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        typer.echo(path.relative_to(root))
    for folder in (package.parent, root / "src" / "subquad" / "bench" / family):
        if not (folder / "__init__.py").exists():
            (folder / "__init__.py").touch()
    typer.echo(f"next: ruff format, then pytest -k {slug}, which finds its tests and the family's contract", err=True)


def places(root: Path, family: str, slug: str) -> dict[str, Path]:
    """Room to path, as the slug fixes them."""
    return {
        "source": root / "src" / "subquad" / family / f"{slug}.py",
        "test": root / "tests" / family / f"test_{slug}.py",
        "bench": root / "src" / "subquad" / "bench" / family / f"{slug}.py",
        "page": root / "docs" / "methods" / family / f"{slug}.md",
    }


def checkout(root: Path | None) -> Path:
    """The source checkout to write to.

    Raises:
        ConfigError: it is none, as when subquad was installed from a wheel.
    """
    root = PACKAGE.parent.parent if root is None else root.resolve()
    if not ((root / "pyproject.toml").is_file() and (root / "src" / "subquad").is_dir()):
        raise ConfigError(
            f"expected a source checkout of subquad, got {root}; clone it and `pip install -e .` there, or give --root"
        )
    return root


def check_name(family: str, slug: str, title: str, arxiv: str) -> None:
    """Refuse names that can't be a module, a card or a page.

    Raises:
        ConfigError: an unknown family, a slug that is no module name, a title or arXiv id that a card can't hold.
    """
    if family not in FAMILIES:
        raise ConfigError(f"unknown family {family!r}{nearest(family, FAMILIES)}")
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", slug) or keyword.iskeyword(slug) or slug == "contract":
        raise ConfigError(
            f"slug: expected lower-case words joined by underscores and no Python keyword, got {slug!r}; "
            "write it as gated_deltanet"
        )
    if not title.isprintable() or any(c in title for c in '"\\') or len(title) > 100:
        raise ConfigError(f"title: expected one line of at most 100 letters without quotes, got {title!r}; shorten it")
    if arxiv and not re.fullmatch(r"\d{4}\.\d{4,5}|[a-z-]+/\d{7}", arxiv):
        raise ConfigError(f"arxiv: expected an id, got {arxiv!r}; write it as 2412.06464")
