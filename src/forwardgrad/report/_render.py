"""The page in HTML, and the same in Markdown."""

import base64
import importlib.resources
import re
import urllib.parse
from typing import Any

import jinja2
from markupsafe import Markup

from forwardgrad.report._figures import png, svg
from forwardgrad.report._view import Report


def html(report: Report) -> str:
    """One file that asks for no other."""
    environment = _environment(autoescape=True)
    environment.filters["svg"] = lambda plot: Markup(svg(plot))
    environment.filters["base64"] = lambda data: base64.b64encode(data).decode("ascii")
    return environment.get_template("template.html.j2").render(report=report)


def markdown(report: Report, files: str) -> str:
    """A file that shows the pictures in the folder `files` beside it."""
    environment = _environment(autoescape=False, finalize=_as_markdown)
    environment.filters["fenced"] = _fenced
    environment.filters["url"] = lambda name: Markup(urllib.parse.quote(name))
    text = environment.get_template("template.md.j2").render(report=report, files=files)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def pictures(report: Report) -> dict[str, bytes]:
    """The files that the Markdown shows, by their names."""
    plots = [plot for group in (*report.curves, *report.costs) for plot in group.plots]
    others = {other.file: other.picture for other in report.others if other.picture}
    return {**{f"{plot.name}.png": png(plot) for plot in plots}, **others}


def template(name: str) -> str:
    """A file of the package."""
    folder = importlib.resources.files("forwardgrad.report")
    return folder.joinpath(name).read_text(encoding="utf-8")


def _environment(**options: Any) -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FunctionLoader(template),
        undefined=jinja2.StrictUndefined,
        lstrip_blocks=True,
        trim_blocks=True,
        **options,
    )


def _as_markdown(value: Any) -> Any:
    """A text on one line, in which nothing means anything to Markdown or HTML."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    text = re.sub(r"\s+", " ", value).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`*_\[\]>|#~$])", r"\\\1", text)


def _fenced(command: str) -> Markup:
    """A block of shell, between fences that the command does not have."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", command)), default=0))
    return Markup(f"{fence}bash\n{command}\n{fence}")
