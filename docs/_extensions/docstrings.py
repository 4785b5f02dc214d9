"""What the API pages need to know about docstrings and classes of this package."""

import re

import griffe

_DOCTEST = re.compile(r"(?:^>>> .*\n(?:^.+\n?)*)+", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Doctests become code blocks, and Equinox modules get their constructor's signature."""

    def on_instance(self, *, obj, **_):
        """Fence the doctests of one docstring."""
        if obj.docstring is not None:
            obj.docstring.value = _DOCTEST.sub(_fenced, obj.docstring.value)

    def on_package(self, *, pkg, **_):
        """Give modules the `__init__` that Equinox makes from their fields."""
        for module in _modules(pkg):
            for cls in module.classes.values():
                if not cls.is_alias and _is_equinox(cls) and "__init__" not in cls.members:
                    cls.set_member("__init__", _constructor(cls))


def _fenced(match):
    return f"```pycon\n{match.group().rstrip()}\n```\n"


def _modules(module):
    yield module
    for inner in module.modules.values():
        if not inner.is_alias:
            yield from _modules(inner)


def _is_equinox(cls):
    names = {str(base).rsplit(".", 1)[-1] for base in cls.bases}
    return bool(names & {"Module", "AbstractEstimator"})


def _constructor(cls):
    fields = [griffe.Parameter("self", kind=griffe.ParameterKind.positional_or_keyword)]
    for name, attribute in cls.attributes.items():
        if "property" not in attribute.labels and attribute.annotation is not None:
            fields.append(
                griffe.Parameter(
                    name,
                    annotation=attribute.annotation,
                    kind=griffe.ParameterKind.positional_or_keyword,
                    default=attribute.value,
                )
            )
    return griffe.Function("__init__", parameters=griffe.Parameters(*fields), parent=cls)
