"""Equations as MathML, which a browser draws without a script, a font or a network; a hook of mkdocs."""

import html
import re

from latex2mathml.converter import convert

# What pymdownx.arithmatex leaves of an equation.
_EQUATION = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
_BAR = '<mo stretchy="false">&#x0007C;</mo>'


def on_page_content(content: str, **_: object) -> str:
    """The page with its equations drawn."""

    def drawn(found: re.Match[str]) -> str:
        equation = convert(html.unescape(found[3]), display="inline" if found[2] == "(" else "block")
        # Bars stand around a norm: no space as around an operator.
        return equation.replace(_BAR, _BAR.replace("<mo", '<mo lspace="0" rspace="0"'))

    return _EQUATION.sub(drawn, content)
