"""Markdown as HTML, for STUDY.md. markdown-it-py does the work: it is CommonMark, pure Python, and here already, since rich needs it."""

import re
from collections.abc import Callable, Iterator

from markdown_it import MarkdownIt
from markdown_it.token import Token

SAFE_LINKS = re.compile(r"(https?://|mailto:|#)", re.IGNORECASE)

Image = Callable[[str, str], str]
"""From an image's source and text to HTML."""


def render(text: str, image: Image, anchor: Callable[[str], str | None]) -> tuple[str, list[tuple[str, str]]]:
    """HTML of the text, and its second-level headings as (id, text). HTML in the text is shown, not taken over.

    Headings are one level lower than they are written, for the page has a title of its own.

    Args:
      image: what stands for an image.
      anchor: where on the page a link to a file leads; None takes the link away and leaves its text.
    """
    reader = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = reader.parse(text)
    headings: list[tuple[str, str]] = []
    taken: set[str] = set()
    for token, following in zip(tokens, [*tokens[1:], None], strict=True):
        if token.type in ("heading_open", "heading_close"):
            level = int(token.tag[1])
            token.tag = f"h{min(level + 1, 6)}"
            if token.type == "heading_open" and following is not None:
                title = _text(following)
                name = _unique("study-" + (re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "part"), taken)
                token.attrSet("id", name)
                if level == 2:
                    headings.append((name, title))
        if token.children:
            token.children = list(_inline(token.children, image, anchor))
    html = reader.renderer.render(tokens, reader.options, {})
    return re.sub(r"<table>.*?</table>", lambda m: f'<div class="scroll">{m[0]}</div>', html, flags=re.DOTALL), headings


def _inline(tokens: list[Token], image: Image, anchor: Callable[[str], str | None]) -> Iterator[Token]:
    for token in tokens:
        if token.type == "image":
            made = Token("html_inline", "", 0)
            made.content = image(str(token.attrGet("src") or ""), token.content)
            yield made
            continue
        if token.type == "link_open":
            target = str(token.attrGet("href") or "")
            if not SAFE_LINKS.match(target):
                found = anchor(target)
                token.attrs = {"href": found} if found else {}
        yield token


def _text(token: Token) -> str:
    return "".join(child.content for child in token.children or [] if child.type in ("text", "code_inline"))


def _unique(name: str, taken: set[str]) -> str:
    found, number = name, 2
    while found in taken:
        found, number = f"{name}-{number}", number + 1
    taken.add(found)
    return found
