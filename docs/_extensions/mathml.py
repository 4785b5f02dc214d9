"""Formulas as MathML: browsers render it themselves, without a script or a font from elsewhere."""

import html
import re

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError

# Bars that grow with what is beside them are right nowhere here.
_BAR = re.compile("<mo>(&#x02016;|&#x0007C;)</mo>")
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_content(page_html, page, **_):
    """Replace what the Markdown extension `arithmatex` has marked as TeX."""
    return _FORMULA.sub(lambda match: _mathml(match, page.file.src_uri), page_html)


def _mathml(match, where):
    tag, _, tex = match.groups()
    tex = html.unescape(tex).strip()
    mathml = convert(tex, display="block" if tag == "div" else "inline")
    mathml = _BAR.sub(r'<mo stretchy="false">\1</mo>', mathml)
    # What the converter does not know it passes on as text.
    if "\\" in mathml:
        raise PluginError(f"{where}: cannot convert the formula {tex!r} to MathML")
    return mathml
