"""How many assertions each file of tests holds, in one tree of files or in two side by side.

    python tests/count_assertions.py ../old/tests tests

An assertion is each part of an `assert` with `and`, `pytest.raises`, `pytest.fail` and playwright's `expect`; those of
scripts in strings count too.
"""
import ast
import sys
from collections import Counter
from pathlib import Path

CALLS = {"raises", "fail", "expect"}


def assertions(code: str) -> int:
    "The number in some code; 0 where it is none."
    try: nodes = list(ast.walk(ast.parse(code)))
    except (SyntaxError, ValueError): return 0
    count = 0
    for node in nodes:
        if isinstance(node, ast.Assert):
            both = isinstance(node.test, ast.BoolOp) and isinstance(node.test.op, ast.And)
            count += len(node.test.values) if both else 1
        elif isinstance(node, ast.Call):
            count += (getattr(node.func, "attr", None) or getattr(node.func, "id", None)) in CALLS
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "assert" in node.value:
            count += assertions(node.value.replace("{{", "{").replace("}}", "}"))
        elif isinstance(node, ast.JoinedStr):
            text = "".join(v.value if isinstance(v, ast.Constant) else "0" for v in node.values)
            if "assert" in text: count += assertions(text)
    return count


def table(*folders: Path) -> list[tuple]:
    found = [{file.name: assertions(file.read_text()) for file in sorted(folder.rglob("*.py"))} for folder in folders]
    rows = [(name, *(f.get(name, 0) for f in found)) for name in sorted(set().union(*found))]
    return [row for row in rows if any(row[1:])] + [("all", *(Counter(f).total() for f in found))]


if __name__ == "__main__":
    for name, *counts in table(*map(Path, sys.argv[1:] or ["tests"])):
        print(f"{name:32}", *(f"{n:6}" for n in counts), "" if len(set(counts)) == 1 else "   differs")
