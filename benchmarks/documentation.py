"""Text to train on that any machine with gsx has: the documentation strings of installed Python packages.

Each package is either trained on or held out, by a hash of its name, so nothing held out was seen. A row is one
module's documentation: its docstrings in the order of the file, and the names that they belong to. The text is under
the licences of the packages.

    python -m benchmarks.documentation OUT        # OUT/train.jsonl, OUT/heldout.jsonl, OUT/heldout.txt
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

# Of one package: a sample is enough, and none drowns the others.
MOST_CHARACTERS = 3_000_000
LEAST_CHARACTERS = 400
# One package in 12 is held out.
SHARES = 12
LEFT_OUT = ("test", "tests", "testing", "_vendor", "vendor", "__pycache__", "pip", "setuptools", "gsx")


def documentation(source: str) -> str:
    """The docstrings of a module, classes and functions under their names; empty if it has none."""
    try:
        module = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return ""
    parts = []
    for node in ast.walk(module):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        text = ast.get_docstring(node)
        if text is None or len(text) < 80 or not text.isascii():
            continue
        if isinstance(node, ast.Module):
            parts.append(text)
        elif isinstance(node, ast.ClassDef):
            parts.append(f"class {node.name}\n{text}")
        else:
            parts.append(f"{node.name}({ast.unparse(node.args)})\n{text}")
    return "\n\n".join(parts)


def packages() -> Iterator[tuple[str, list[Path]]]:
    """Name and files of each installed package, in the order of names; those of the standard library are one each."""
    for place in ("purelib", "stdlib"):
        root = Path(sysconfig.get_paths()[place])
        for path in sorted(root.iterdir()):
            if path.name in (*LEFT_OUT, "site-packages", "idlelib", "lib2to3") or path.name.startswith("."):
                continue
            if path.is_dir():
                yield path.name, sorted(path.rglob("*.py"))
            elif path.suffix == ".py":
                yield path.stem, [path]


def is_held_out(package: str) -> bool:
    """Whether a package is held out: by its name alone."""
    return int.from_bytes(hashlib.sha256(package.encode()).digest()[:4], "big") % SHARES == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    rows: dict[bool, list[dict[str, str]]] = {False: [], True: []}
    for package, files in packages():
        used = 0
        for path in files:
            if set(path.parts) & set(LEFT_OUT) or used > MOST_CHARACTERS:
                continue
            text = documentation(path.read_text(encoding="utf-8", errors="ignore"))
            if len(text) < LEAST_CHARACTERS:
                continue
            used += len(text)
            rows[is_held_out(package)].append({"package": package, "text": text})
    for held_out, name in ((False, "train"), (True, "heldout")):
        lines = (json.dumps(row) for row in rows[held_out])
        (out / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        characters = sum(len(row["text"]) for row in rows[held_out])
        names = {row["package"] for row in rows[held_out]}
        print(f"{name}: {len(names)} packages, {len(rows[held_out])} modules, {characters / 1e6:.1f} M characters")
    (out / "heldout.txt").write_text("\n\n".join(row["text"] for row in rows[True]), encoding="utf-8")
    print("held out:", ", ".join(sorted({row["package"] for row in rows[True]})))


if __name__ == "__main__":
    main()
