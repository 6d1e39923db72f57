"""One name, one meaning: a reader who searches for a class finds one."""

import ast
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_no_class_name_stands_twice_in_the_product():
    places = defaultdict(list)
    for room in ("harness", "backbones", "methods"):
        for path in (ROOT / room).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ClassDef):
                    places[node.name].append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert len(places) > 150, "the folders were not read"
    assert {name: where for name, where in places.items() if len(where) > 1} == {}
