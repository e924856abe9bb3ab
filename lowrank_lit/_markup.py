"""Pieces of a page: escaped text, tables that a screen reader can follow, the style sheet."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape


class Markup(str):
    """Text that is markup already; any other text is escaped where it enters a page."""


def text(value: object) -> Markup:
    """Escaped, unless it is markup."""
    return value if isinstance(value, Markup) else Markup(escape(str(value)))


def element(name: str, *content: object, **attributes: object) -> Markup:
    """``<name ...>content</name>``; the attribute ``class_`` is ``class``, and one that is ``None`` is left out."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{name}{given}>{''.join(map(text, content))}</{name}>")


def paragraph(*content: object) -> Markup:
    return element("p", *content)


def absent(sentence: str) -> Markup:
    """A sentence in the place of a figure that is not there."""
    return element("p", sentence, class_="absent")


def breakable(name: str) -> Markup:
    """A module's name that may be broken after dots and underscores."""
    return Markup(re.sub(r"([._])", r"\1<wbr>", escape(name)))


def scrolling(content: Markup, label: str) -> Markup:
    """What may be wider than a phone: it scrolls by itself, with the keyboard too."""
    return element("div", content, class_="wide", role="region", aria_label=label, tabindex=0)


def table(
    caption: str, head: Sequence[object], rows: Sequence[Sequence[object]], numeric: int = 0, *, wordy: bool = False
) -> Markup:
    """A table with a caption; the first cell of each row is its heading.

    Args:
        caption: What the table shows.
        head: Headings of the columns.
        rows: As many cells each.
        numeric: How many columns after the first hold numbers, which stand to the right.
        wordy: Whether the last column holds sentences, which need room.
    """

    def kind(column: int) -> str | None:
        return "number" if 1 <= column <= numeric else None

    headings = [element("th", cell, scope="col", class_=kind(column)) for column, cell in enumerate(head)]
    lines = [
        element(
            "tr",
            element("th", row[0], scope="row"),
            *(element("td", cell, class_=kind(column)) for column, cell in enumerate(row[1:], 1)),
        )
        for row in rows
    ]
    content = (element("thead", element("tr", *headings)), element("tbody", *lines))
    return scrolling(element("table", element("caption", caption), *content, class_="text" if wordy else None), caption)


def bar(share: float) -> Markup:
    """A bar of a share of its cell; the number stands beside it."""
    width = f"width:{100 * min(max(share, 0.0), 1.0):.1f}%"
    return element("span", element("span", style=width), class_="bar", aria_hidden="true")


def ramp(share: float) -> tuple[str, str]:
    """Colour of a share in [0, 1] on matplotlib's viridis, and that of ink on it."""
    stops = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
    place = min(max(share, 0.0), 1.0) * (len(stops) - 1)
    index = min(int(place), len(stops) - 2)
    red, green, blue = (
        round(a + (place - index) * (b - a)) for a, b in zip(stops[index], stops[index + 1], strict=True)
    )
    ink = "#000" if 0.299 * red + 0.587 * green + 0.114 * blue > 130 else "#fff"
    return f"#{red:02x}{green:02x}{blue:02x}", ink


RAMP = ", ".join(ramp(step / 4)[0] for step in range(5))

STYLE = Markup("""
:root { color-scheme: light dark; --ink: #1c1c22; --dim: #5a5a68; --paper: #fff; --soft: #f3f4f8; --line: #dcdde4;
  --accent: #1f6fb2; --second: #b8480b; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7e7ee; --dim: #a8a8b6; --paper: #15161b; --soft: #1f2129;
  --line: #3a3d49; --accent: #6db3f2; --second: #ff9d5c; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .5rem 0; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; padding-top: .6rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; }
a { color: var(--accent); }
nav ul { display: flex; flex-wrap: wrap; gap: .2rem 1rem; list-style: none; margin: 1rem 0 0; padding: 0; }
.lead { font-size: 1.05rem; }
.absent, .dim, caption, figcaption, .cards dt, .cards small { color: var(--dim); }
.absent { font-style: italic; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .7rem; margin: 1rem 0; }
.cards div { background: var(--soft); border: 1px solid var(--line); border-radius: .5rem; padding: .6rem .8rem; }
.cards dt { font-size: .85rem; }
.cards dd { margin: 0; font-size: 1.45rem; font-variant-numeric: tabular-nums; }
.cards small { display: block; font-size: .8rem; line-height: 1.35; }
.wide { overflow-x: auto; max-width: 100%; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; margin: .6rem 0; }
caption { text-align: left; padding-bottom: .3rem; }
th, td { text-align: left; vertical-align: top; padding: .22rem .9rem .22rem 0; border-bottom: 1px solid var(--line); }
thead th { color: var(--dim); font-weight: 600; vertical-align: bottom; }
tbody th { font-weight: 500; overflow-wrap: normal; min-width: 6rem; }
td:last-child:not(.number) { min-width: 9.2rem; }
.text td:last-child { min-width: 15rem; }
@media (min-width: 44rem) { .text tbody th { white-space: nowrap; } }
.number { text-align: right; white-space: nowrap; }
.bar { display: block; width: 9rem; height: .7rem; margin-top: .35rem; background: var(--soft); }
.bar span { display: block; height: 100%; min-width: 1px; background: var(--accent); }
.heat { border-collapse: separate; border-spacing: 2px; }
.heat th, .heat td { border: 0; padding: .2rem .45rem; text-align: center; vertical-align: middle; }
.heat thead th { font-size: .78rem; line-height: 1.2; max-width: 7.5rem; min-width: 3.4rem; vertical-align: bottom; }
.heat th { min-width: 0; } .heat td:last-child:not(.number) { min-width: 0; }
.heat td { border-radius: 3px; }
.heat small { display: block; font-size: .72rem; line-height: 1.2; white-space: nowrap; }
.dense { color: var(--dim); background: repeating-linear-gradient(45deg, var(--soft) 0 4px, var(--line) 4px 5px); }
.pivot { outline: 2px solid var(--second); outline-offset: -2px; }
.key { display: inline-block; width: 8rem; height: .8rem; border-radius: 3px; vertical-align: -.05rem; }
.swatch { display: inline-block; width: 1.6rem; border-top: 3px solid; vertical-align: .25rem; margin-right: .3rem; }
figure { margin: .6rem 0; }
figcaption { font-size: .85rem; }
.chart { max-width: 40rem; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(16rem, 1fr)); gap: .8rem; }
svg { display: block; width: 100%; height: auto; font: 12px system-ui, sans-serif; }
.tick { fill: currentColor; }
.grid { stroke: var(--line); stroke-width: 1; }
.series { fill: none; stroke-width: 1.6; stroke-linejoin: round; }
.ring { fill: var(--paper); stroke-width: 2; }
pre { background: var(--soft); border: 1px solid var(--line); border-radius: .4rem; padding: .7rem; overflow-x: auto;
  font-size: .82rem; line-height: 1.4; }
summary { cursor: pointer; color: var(--accent); }
footer { margin-top: 2rem; font-size: .85rem; color: var(--dim); }
@media print { :root { color-scheme: light; --ink: #000; --dim: #444; --paper: #fff; --soft: #f3f4f8; --line: #ccc;
    --accent: #1f6fb2; --second: #b8480b; }
  body { max-width: none; padding: 0; font-size: 10pt; } nav { display: none; } .wide, pre { overflow: visible; }
  pre { white-space: pre-wrap; } tr, figure, .cards div { break-inside: avoid; } h2, h3 { break-after: avoid; }
  * { -webkit-print-color-adjust: exact; print-color-adjust: exact; } }
""")
