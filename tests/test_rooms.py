"""Rooms import what stands before them, and no modules import each other in a circle."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "hf_chts"
# as docs/architecture.md has them; rooms of one line do not import each other
ORDER = [
    ["kernels", "files", "lazy", "names", "plain_text", "text_table", "markdown", "plotting", "machine", "narrower"],
    ["topology"],
    ["methods", "schedule_plan", "config_file"],
    ["config_checks"],
    ["config"],
    ["sharding"],
    ["finite", "model_checks"],
    ["layers"],
    ["checkpoint"],
    ["evolution"],
    ["sparse_model", "records", "baseline"],
    ["export"],
    ["data"],
    ["model_arguments"],
    ["evaluation", "report"],
    ["training"],
    ["studies", "fine_tuning"],
    ["commands"],
]


def imports():
    """The modules of the package that each of its modules imports, wherever in it."""
    modules = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    found = {}
    for name, path in modules.items():
        named = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                named |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                named |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        found[name] = (named & modules.keys()) - {name}
    return found


def test_rooms_import_what_stands_before_them():
    level = {room: number for number, rooms in enumerate(ORDER) for room in rooms}
    for name, named in imports().items():
        if name.count(".") == 0 or name == "hf_chts.__main__":
            continue  # the public names, and the command
        room = name.split(".")[1]
        for other in named:
            if other.count(".") and (there := other.split(".")[1]) != room:
                assert level[there] < level[room], f"{name} imports {other}"


def test_no_modules_import_each_other_in_a_circle():
    # a package imports its own modules for their public names, lazily or not
    graph = {name: {other for other in named if not name.startswith(other)} for name, named in imports().items()}
    del graph["hf_chts"]
    TopologicalSorter(graph).prepare()
