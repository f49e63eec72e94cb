"""A figure's SVG as part of a page: nothing in it can run or load anything, its ids are its own, its colours follow the page's theme."""

import re
import xml.etree.ElementTree as ElementTree

from kvjax.errors import InputError
from kvjax.report.figures import FAMILIES, GRID, INK, MUTED, OTHERS, PAPER, PURPOSES

COLOURS = {
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--grid",
    PAPER: "--paper",
    "#000000": "--ink",
    "#262626": "--ink",
    "#b0b0b0": "--grid",
    "#cccccc": "--grid",
    OTHERS.color: "--c-other",
    **{look.color.lower(): f"--c-{family}" for family, look in FAMILIES.items() if look.color != INK},
    **{colour: f"--b-{purpose}" for purpose, _, colour in PURPOSES},
}
"""Colours of figures (matplotlib's own among them) and the custom properties of the page that stand for them."""

SHAPES_TAKEN = """
    svg g defs use path rect circle ellipse line polyline polygon text tspan title desc clipPath pattern linearGradient stop marker
"""
SHAPES = frozenset(SHAPES_TAKEN.split())
ATTRIBUTES_TAKEN = """
    id d x y x1 y1 x2 y2 dx dy cx cy r rx ry width height viewBox points transform style clip-path clipPathUnits patternUnits
    patternTransform patternContentUnits preserveAspectRatio fill fill-opacity fill-rule stroke stroke-width stroke-opacity
    stroke-dasharray stroke-linecap stroke-linejoin opacity text-anchor font-size font-style font-weight offset stop-color refX refY
    markerWidth markerHeight orient href
"""
ATTRIBUTES = frozenset(ATTRIBUTES_TAKEN.split())
XLINK = "{http://www.w3.org/1999/xlink}href"
SMALLEST, LARGEST = 1.2, 1.9
"""CSS pixels per point: text of 8 points is no smaller than 10 pixels and no larger than 15."""

LEAST_LENGTH = re.compile(r"-?\d+\.\d{3,}")


def inline(svg: str, prefix: str, label: str) -> str:
    """The SVG as an element of an HTML page.

    Only shapes, text and references into the figure itself are kept. Ids get `prefix`, since several figures share a page. The colours of
    COLOURS become custom properties, fonts the page's.

    Args:
      label: what the figure is, for those who do not see it.

    Raises InputError for what is no SVG.
    """
    if "<!ENTITY" in svg:
        raise InputError("an SVG that declares entities; figures of kvjax have none")
    try:
        root = ElementTree.fromstring(svg)
    except ElementTree.ParseError as error:
        raise InputError(f"no SVG: {error}") from None
    if _local(root.tag) != "svg":
        raise InputError(f"no SVG: its root is <{_local(root.tag)}>")
    _clean(root, prefix, in_text=False)
    if "viewBox" not in root.attrib:
        width, height = (re.sub(r"[^\d.]", "", root.get(side, "")) or "100" for side in ("width", "height"))
        root.set("viewBox", f"0 0 {width} {height}")
    for side in ("width", "height"):
        root.attrib.pop(side, None)
    box = re.findall(r"[\d.]+", root.get("viewBox", ""))
    wide = float(box[2]) if len(box) == 4 else 100.0
    root.set("style", f"min-width:{SMALLEST * wide:.0f}px;max-width:{LARGEST * wide:.0f}px")
    root.set("role", "img")
    root.set("aria-label", label)
    return ElementTree.tostring(root, encoding="unicode")


def _clean(element: ElementTree.Element, prefix: str, in_text: bool) -> None:
    element.tag = _local(element.tag)
    element.attrib = _attributes(element, prefix)
    in_text = in_text or element.tag in ("text", "title", "desc")
    if not in_text and not (element.text or "").strip():
        element.text = None
    for child in list(element):
        if not isinstance(child.tag, str) or _local(child.tag) not in SHAPES:
            element.remove(child)
            continue
        _clean(child, prefix, in_text)
        if not in_text or not (child.tail or "").strip():
            child.tail = None


def _attributes(element: ElementTree.Element, prefix: str) -> dict[str, str]:
    found: dict[str, str] = {}
    styles: list[str] = []
    for name, value in element.attrib.items():
        if name in (XLINK, "href"):
            if value.startswith("#"):
                found["href"] = f"#{prefix}{value[1:]}"
            continue
        if name not in ATTRIBUTES:
            continue
        if name == "id":
            found["id"] = prefix + value
        elif name == "style":
            styles += [kept for part in value.split(";") if (kept := _declaration(part, prefix))]
        elif name in ("fill", "stroke", "stop-color", "clip-path"):
            if kept := _declaration(f"{name}: {value}", prefix):
                styles.append(kept)
        elif name in ("d", "points", "x", "y"):
            found[name] = LEAST_LENGTH.sub(lambda m: f"{float(m[0]):.2f}".rstrip("0").rstrip("."), " ".join(value.split()))
        else:
            found[name] = value
    if styles:
        found["style"] = ";".join(styles)
    return found


def _declaration(text: str, prefix: str) -> str | None:
    """A CSS declaration as the page has it; None for one it does not take over."""
    name, colon, value = (part.strip() for part in text.partition(":"))
    if name == "font":
        name, value = "font-size", next(iter(re.findall(r"[\d.]+px", value)), "")
        weight = "font-weight:700;" if re.search(r"\b(bold|[6-9]00)\b", text) else ""
        return f"{weight}font-size:{value}" if value else None
    if not colon or name == "font-family" or not re.fullmatch(r"[a-z-]+", name) or "\\" in value or "/*" in value:
        return None
    if "(" in value:
        reference = re.fullmatch(r"url\([\"']?#([\w.:-]+)[\"']?\)", value)
        if reference is None:
            return f"{name}:{value}" if re.fullmatch(r"(rgba?|hsla?|rotate|translate|scale|matrix)\([\d\s.,%a-z-]*\)", value) else None
        return f"{name}:url(#{prefix}{reference[1]})"
    if not re.fullmatch(r"[\w\s.,%#'\"+-]*", value):
        return None
    colour = COLOURS.get(value.lower())
    return f"{name}:var({colour})" if colour else f"{name}:{value}"


def _local(tag: str) -> str:
    return tag.rpartition("}")[2]
