"""What the site makes of the source itself: the list of methods and a card a page from the cards, and the API pages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from subquad.core.card import Card
from subquad.core.registry import FAMILIES, methods

SOURCE = Path(__file__).parent / "src/subquad"
# The guide is read in this order; what is not named follows by name.
GUIDE = ("index", "ideas", "convert", "evaluate", "generate", "checkpoints", "add_a_method")
TITLES = {
    "mixers": "Mixers",
    "convert": "Conversion",
    "decode": "Decoding",
    "compress": "Compression",
    "retrieve": "Retrieval",
    "inspect": "Inspection",
}


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages and put all in reading order."""
    files.append(File.generated(config, "methods/index.md", content=methods_page()))
    for folder in sorted(p for p in SOURCE.iterdir() if (p / "__init__.py").exists() and p.name != "cli"):
        files.append(File.generated(config, f"api/{folder.name}.md", content=api_page(folder)))
    return Files(sorted(files, key=order))


def order(file: File) -> tuple[Any, ...]:
    """Guide first, then the methods by family, then the API."""
    top, _, rest = file.src_uri.partition("/")
    name = top.removesuffix(".md")
    if not rest:
        return (0, GUIDE.index(name) if name in GUIDE else len(GUIDE), name)
    family = rest.partition("/")[0]
    return (1, ("methods", "api").index(top) if top in ("methods", "api") else 2, rest != "index.md", family, rest)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Put a method's card under the title of its page."""
    parts = Path(page.file.src_uri).with_suffix("").parts
    if len(parts) == 3 and parts[0] == "methods" and parts[1] in FAMILIES and parts[2] in methods(parts[1]):
        title, _, body = markdown.partition("\n")
        return f"{title}\n\n{card_table(methods(parts[1])[parts[2]])}\n{body}"
    return markdown


def card_table(card: Card) -> str:
    """The card as two columns."""
    paper = f"{card.title}, {arxiv(card)}" if card.arxiv else card.title
    claim = card.claim and f"{card.claim} **Here:** {card.measured or 'not reproduced'}"
    facts = {
        "For": card.gives,
        "Needs": card.needs,
        "Paper": paper,
        "Its claim": claim or card.measured,
        "Result file": card.result and f"`bench/results/{card.result}`",
        "Status": card.status,
    }
    rows = "\n".join(f"| {name} | {cell(value)} |" for name, value in facts.items() if value)
    return f"| | |\n| --- | --- |\n{rows}\n"


def methods_page() -> str:
    """All methods of all families, from their cards."""
    text = "# Methods\n\nEvery method has one slug and four rooms: code, tests, bench and page.\n"
    for family in FAMILIES:
        cards = methods(family)
        if not cards:
            continue
        # What only a mixer can be is asked of mixers alone.
        flags = ["from attention", "constant state"] if family == "mixers" else []
        rows = [["method", "for", "paper", *flags, "status", "measured"]]
        rows.append(["---"] * len(rows[0]))
        for slug, card in cards.items():
            yes = ["yes" if getattr(card, flag.replace(" ", "_")) else "" for flag in flags]
            rows.append([f"[`{slug}`]({family}/{slug}.md)", card.gives, arxiv(card), *yes, card.status, card.measured])
        lines = ["| " + " | ".join(cell(value) for value in row) + " |" for row in rows]
        text += f"\n## {TITLES[family]}\n\n" + "\n".join(lines) + "\n"
    return text


def api_page(folder: Path) -> str:
    """One page a package, its modules in order of name."""
    names = [p.stem for p in sorted(folder.glob("*.py")) if p.stem != "__init__"]
    wanted = "\n\n".join(f"::: subquad.{folder.name}.{name}" for name in names)
    whole = f"::: subquad.{folder.name}\n    options:\n      show_root_heading: false"
    return f"# subquad.{folder.name}\n\n{whole}\n\n{wanted}\n"


def arxiv(card: Card) -> str:
    """A link to the paper, or nothing."""
    return f"[arXiv {card.arxiv}](https://arxiv.org/abs/{card.arxiv})" if card.arxiv else ""


def cell(value: str) -> str:
    """`value` inside a table."""
    return value.replace("|", "\\|").replace("\n", " ")
