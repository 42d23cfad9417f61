"""Writes docs/api.md, the reference of `import gsx`, from signatures and docstrings: `python docs/make_api.py`.

A docstring has a paragraph or more, then sections in this order: `Args`, `Returns`, `Raises`, `Example`. Those of the
types that functions take and return follow the functions.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import gsx

PAGE = Path(__file__).with_name("api.md")
HEAD = """# Python reference

Written by `python docs/make_api.py` from signatures and docstrings; change those, not this page.

`import gsx` has a function for each command, under the same name. It imports nothing until a name is used, and running
a bundle never imports PyTorch. What is wrong with an input, a machine or a disk raises `gsx.GsxError`.
"""
_SECTION = re.compile(r"(Args|Returns|Raises|Example)([^:]*):(?: (.*))?")
_ITEM = re.compile(r"    (\*{0,2}\w+(?:, \w+)*): (.*)")
_WIDTH = 100


def public() -> Iterator[tuple[str, Any]]:
    """Public names, those of the plugins group among them, with what they are."""
    for name in gsx.__all__:
        value = getattr(gsx, name)
        if inspect.ismodule(value):
            yield from ((f"gsx.{name}.{one}", getattr(value, one)) for one in value.__all__)
        elif not name.startswith("_"):
            yield f"gsx.{name}", value


def page() -> str:
    """The text of docs/api.md."""
    functions = {name: value for name, value in public() if inspect.isfunction(value)}
    types = {name: value for name, value in public() if inspect.isclass(value)}
    for function in functions.values():
        for found in _named(function.__annotations__.get("return", ""), function):
            types.setdefault(found.__name__, found)
    types = {name: value for name, value in types.items() if f"gsx.{name}" not in types}
    rows = [f"| [`{name}`](#{_anchor(name)}) | {_summary(value)} |" for name, value in functions.items()]
    parts = [HEAD, "| function | what it does |\n|---|---|\n" + "\n".join(rows)]
    parts += ["## Functions", *(_function(name, value) for name, value in sorted(functions.items()))]
    parts += ["## Types", *(_type(name, types[name]) for name in sorted(types, key=_last))]
    return "\n\n".join(part.rstrip() for part in parts) + "\n"


def _function(name: str, function: Callable[..., Any]) -> str:
    return "\n\n".join([f"### {name}", _code(_signature(name, function)), *_body(function)])


def _type(name: str, kind: type) -> str:
    parts = [f"### {name}"]
    if dataclasses.is_dataclass(kind):
        scope = vars(sys.modules[kind.__module__])
        lines = [
            f"{one.name}: {_spelled(str(one.type), scope)}"
            + ("" if one.default is dataclasses.MISSING else f" = {_default(one.default)}")
            + ("" if one.default_factory is dataclasses.MISSING else " = ...")
            for one in dataclasses.fields(kind)
        ]
        parts.append(_code("\n".join(lines)))
    parts += _body(kind)
    members = [
        f"- `{member}{'' if isinstance(value, property) else '(...)'}`: {_summary(value)}"
        for member, value in vars(kind).items()
        if not member.startswith("_") and isinstance(value, (property, classmethod)) | inspect.isfunction(value)
    ]
    return "\n\n".join([*parts, *(["**Members**", "\n".join(members)] if members else [])])


def _signature(name: str, function: Callable[..., Any]) -> str:
    """Of a function, on one line or with one parameter a line."""
    signature = inspect.signature(function)
    scope = inspect.unwrap(function).__globals__
    parts, starred = [], False
    for one in signature.parameters.values():
        if one.kind is one.KEYWORD_ONLY and not starred:
            parts.append("*")
            starred = True
        text = f"{one.name}: {_spelled(str(one.annotation), scope)}"
        if one.default is not one.empty:
            text += f" = {_default(one.default)}"
        parts.append(text)
    end = f") -> {_spelled(str(signature.return_annotation), scope)}"
    line = f"{name}({', '.join(parts)}{end}"
    return line if len(line) <= _WIDTH else f"{name}(\n" + "".join(f"    {part},\n" for part in parts) + end


def _default(value: Any) -> str:
    """A default as Python writes it; a function as dots."""
    return "..." if callable(value) else repr(value).replace("'", '"')


def _spelled(annotation: str, scope: Mapping[str, Any]) -> str:
    """An annotation whose aliases of literals are written out."""

    def spell(match: re.Match[str]) -> str:
        value = scope.get(match[0])
        return " | ".join(map(repr, get_args(value))) if get_origin(value) is Literal else match[0]

    written = re.sub(r"Literal\[([^\]]*)\]", lambda match: match[1].replace(", ", " | "), annotation)
    return re.sub(r"(?<![\w.'\"-])[A-Za-z_]\w*(?![\w'\"-])", spell, written).replace("'", '"')


def _named(annotation: str, function: Callable[..., Any]) -> list[type]:
    """The project's classes in an annotation."""
    scope = inspect.unwrap(function).__globals__
    found = [scope.get(name) for name in re.findall(r"\w+", annotation)]
    return [one for one in found if inspect.isclass(one) and one.__module__.startswith("gsx")]


def _body(value: Any) -> list[str]:
    """A docstring in Markdown: paragraphs, then its sections."""
    text, sections = _parsed(value)
    parts = [text]
    for title, qualifier, lines in sections:
        if title == "Example":
            parts += ([f"Example{qualifier}:"] if qualifier else []) + [_code(inspect.cleandoc("\n".join(lines)))]
        elif title == "Returns":
            parts.append(f"**Returns** {_joined(lines)}")
        else:
            items = list(_items(lines))
            listed = "\n".join(f"- {f'`{name}`: ' if name else ''}{meaning}" for name, meaning in items)
            heading = {"Args": "Fields" if inspect.isclass(value) else "Arguments"}.get(title, title)
            parts.append(f"**{heading}**\n\n{listed}")
    return parts


def _parsed(value: Any) -> tuple[str, list[tuple[str, str, list[str]]]]:
    """The paragraphs of a docstring, and its sections: title, what follows the title, lines."""
    text: list[str] = []
    sections: list[tuple[str, str, list[str]]] = []
    for line in (inspect.getdoc(value) or "").splitlines():
        if match := _SECTION.fullmatch(line):
            sections.append((match[1], match[2], [match[3]] if match[3] else []))
        elif sections:
            sections[-1][2].append(line)
        else:
            text.append(line)
    return "\n".join(text).strip(), sections


def _items(lines: list[str]) -> Iterator[tuple[str, str]]:
    """Names with their meanings; a name is empty where a section has none."""
    found: list[tuple[str, list[str]]] = []
    for line in lines:
        if match := _ITEM.fullmatch(line):
            found.append((match[1], [match[2]]))
        elif found:
            found[-1][1].append(line)
        else:
            found.append(("", [line]))
    return ((name, _joined(words)) for name, words in found)


def _joined(lines: list[str]) -> str:
    return " ".join(line.strip() for line in lines).strip()


def _summary(value: Any) -> str:
    return re.sub(r"\s+", " ", (inspect.getdoc(value) or "").split("\n\n")[0])


def _code(text: str) -> str:
    return f"```python\n{text}\n```"


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _anchor(name: str) -> str:
    return name.replace(".", "").lower()


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
