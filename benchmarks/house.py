"""The size of the code: files, lines, lengths of files and functions, public names, docstrings, comments, repeated lines.

`python benchmarks/house.py [FOLDER]` measures a checkout's `src/whichkl`, by default this one's.
"""

import ast
import json
import sys
import tokenize
from collections import Counter
from pathlib import Path
from statistics import median

REPEATED = 6
"""Consecutive lines that count as repeated where they occur in a second place."""


def functions(tree):
    return [one for one in ast.walk(tree) if isinstance(one, (ast.FunctionDef, ast.AsyncFunctionDef))]


def docstring_lines(tree):
    total = 0
    for one in ast.walk(tree):
        body = getattr(one, "body", None)
        for statement in body if isinstance(body, list) else []:
            is_text = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
            if is_text and isinstance(statement.value.value, str):
                total += statement.end_lineno - statement.lineno + 1
    return total


def comment_lines(path):
    with path.open("rb") as file:
        return sum(token.type == tokenize.COMMENT for token in tokenize.tokenize(file.readline))


def repeated_lines(sources):
    """Lines within blocks of `REPEATED` code lines that occur more than once, imports and blank lines left out."""
    kept = []
    for source in sources:
        lines = [line.strip() for line in source.splitlines()]
        kept.append([line for line in lines if line and not line.startswith(("from ", "import ", "#", '"""'))])
    blocks = Counter(tuple(lines[i : i + REPEATED]) for lines in kept for i in range(len(lines) - REPEATED + 1))
    marked = 0
    for lines in kept:
        hit = set()
        for i in range(len(lines) - REPEATED + 1):
            if blocks[tuple(lines[i : i + REPEATED])] > 1:
                hit |= set(range(i, i + REPEATED))
        marked += len(hit)
    return marked


def measured(folder):
    """Measure one checkout."""
    paths = sorted((folder / "src" / "whichkl").rglob("*.py"))
    sources = [path.read_text() for path in paths]
    trees = [ast.parse(source) for source in sources]
    lengths = [len(source.splitlines()) for source in sources]
    sizes = [one.end_lineno - one.lineno + 1 for tree in trees for one in functions(tree)]
    total = sum(lengths)
    names = [one.name for tree in trees for one in tree.body if isinstance(one, (ast.ClassDef, ast.FunctionDef))]
    return {
        "files": len(paths),
        "lines": total,
        "longest_file": max(lengths),
        "median_file": median(lengths),
        "files_above_350": sum(length > 350 for length in lengths),
        "functions": len(sizes),
        "longest_function": max(sizes),
        "median_function": median(sizes),
        "functions_above_60": sum(size > 60 for size in sizes),
        "public_names": sum(not name.startswith("_") for name in names),
        "docstrings": round(sum(map(docstring_lines, trees)) / total, 3),
        "comments": round(sum(map(comment_lines, paths)) / total, 4),
        "repeated_lines": repeated_lines(sources),
    }


if __name__ == "__main__":
    found = measured(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parents[1])
    for name, value in found.items():
        print(f"{name.replace('_', ' '):20} {value:,}")
    print(json.dumps(found))
