"""What the site makes of the source itself: the list of methods and a card a page from the cards, and the API pages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from subquad.core.card import Card
from subquad.core.registry import FAMILIES, methods

SOURCE = Path(__file__).parent / "src/subquad"
RESULTS = Path(__file__).parent / "bench/results"
# The guide is read in this order; what is not named follows by name.
GUIDE = (
    "index",
    "ideas",
    "convert",
    "evaluate",
    "tasks",
    "generate",
    "serve",
    "checkpoints",
    "kernels",
    "measured",
    "add_a_method",
)
TITLES = {
    "mixers": "Mixers",
    "convert": "Conversion",
    "decode": "Decoding",
    "compress": "Compression",
    "retrieve": "Retrieval",
    "inspect": "Inspection",
}


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages and put all in reading order, which without a nav would be that of the names."""
    files.append(File.generated(config, "methods/index.md", content=methods_page()))
    for folder in sorted(p for p in SOURCE.iterdir() if (p / "__init__.py").exists() and p.name != "cli"):
        files.append(File.generated(config, f"api/{folder.name}.md", content=api_page(folder)))
    for picture in sorted(RESULTS.rglob("*.svg")):
        files.append(
            File.generated(config, f"results/{picture.relative_to(RESULTS).as_posix()}", abs_src_path=str(picture))
        )
    config["nav"] = reading_order([file.src_uri for file in files.documentation_pages()])
    return files


def reading_order(pages: list[str]) -> list[Any]:
    """The guide, then the methods by family, then the API."""
    guide = [f"{name}.md" for name in GUIDE]
    guide += sorted(page for page in pages if "/" not in page and page not in guide)
    families: list[Any] = ["methods/index.md"]
    for family in FAMILIES:
        if found := sorted(page for page in pages if page.startswith(f"methods/{family}/")):
            families.append({TITLES[family]: found})
    return [*guide, {"Methods": families}, {"API": sorted(page for page in pages if page.startswith("api/"))}]


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Put a method's card under the title of its page, and have charts where the site keeps them."""
    parts = Path(page.file.src_uri).with_suffix("").parts
    up = "../" * (len(parts) - 1)
    markdown = markdown.replace(f"]({up}../bench/results/", f"]({up}results/")
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
        "Starts from attention": card.from_attention and "yes",
        "State": card.constant_state and "of constant size",
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
        rows = [["method", "for", "paper", "its claim", "here", "status"], ["---"] * 6]
        for slug, card in cards.items():
            link = f"[`{slug}`]({family}/{slug}.md)"
            rows.append([link, card.gives, arxiv(card), card.claim, card.measured, card.status])
        lines = ["| " + " | ".join(cell(value) for value in row) + " |" for row in rows]
        text += f"\n## {TITLES[family]}\n\n" + "\n".join(lines) + "\n"
    return text


def api_page(folder: Path) -> str:
    """One page a package, its modules in order of name."""
    # A package without a word of its own has nothing to show.
    sources = [p for p in sorted(folder.rglob("*.py")) if p.name != "__init__.py" or p.stat().st_size]
    parts = [p.relative_to(SOURCE).with_suffix("").parts for p in sources if p.parent != folder or p.stem != "__init__"]
    names = [".".join(part for part in path if part != "__init__") for path in parts]
    wanted = "\n\n".join(f"::: subquad.{name}" for name in names)
    whole = f"::: subquad.{folder.name}\n    options:\n      show_root_heading: false"
    return f"# subquad.{folder.name}\n\n{whole}\n\n{wanted}\n"


def arxiv(card: Card) -> str:
    """A link to the paper, or nothing."""
    return f"[arXiv {card.arxiv}](https://arxiv.org/abs/{card.arxiv})" if card.arxiv else ""


def cell(value: str) -> str:
    """`value` inside a table."""
    return value.replace("|", "\\|").replace("\n", " ")
