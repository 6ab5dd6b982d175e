"""Equations as MathML, which a browser draws without a script, a font or a network; a hook of mkdocs."""

import html
import re

from latex2mathml.converter import convert

# What pymdownx.arithmatex leaves of an equation.
_EQUATION = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_content(content: str, **_: object) -> str:
    """The page with its equations drawn."""
    displays = {"(": "inline", "[": "block"}
    return _EQUATION.sub(lambda found: convert(html.unescape(found[3]), display=displays[found[2]]), content)
