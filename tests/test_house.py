"""Rules of the house that a reader would otherwise have to check by eye."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
FUNCTION, FILE = 40, 400  # lines, those of a function without its decorators and docstring


def modules(*folders):
    return [p for folder in folders for p in sorted((ROOT / folder).rglob("*.py"))]


def name(path):
    return path.relative_to(ROOT).as_posix()


def functions(path):
    """(where, lines) of every function in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            doc = node.body[0] if ast.get_docstring(node) else None
            lines = node.end_lineno - node.lineno + 1
            lines -= doc.end_lineno - doc.lineno + 1 if doc else 0
            yield f"{name(path)}: {node.name}", lines


def test_no_function_of_the_science_is_longer_than_a_screen():
    counted = [entry for path in modules("merging") for entry in functions(path)]
    assert dict(counted)["merging/method/interference.py: interference"] > 20  # it was counted
    assert {where: lines for where, lines in counted if lines > FUNCTION} == {}


def test_no_file_of_the_science_is_longer_than_ten_screens():
    lengths = {name(path): len(path.read_text().splitlines()) for path in modules("merging")}
    assert {where: lines for where, lines in lengths.items() if lines > FILE} == {}


def test_experiments_write_files_whole():
    """Through `merging.formats.disk.write_synced`; the benchmarks' model files, and a picture that
    a browser writes, excepted."""
    excepted = {
        "experiments/bench/files.py",
        "experiments/bench/command_peers.py",
        "experiments/report/picture.py",
    }
    others = {"write_text", "write_bytes", "mkstemp", "replace"}  # the last: os.replace
    calls = {
        f"{name(path)}:{node.lineno}"
        for path in modules("experiments")
        if name(path) not in excepted
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in others
        if node.attr != "replace" or ast.unparse(node.value) == "os"
    }
    assert calls == set()


def test_a_module_that_a_command_starts_holds_no_body():
    """`python -m` loads it as `__main__`: what it defined would be loaded a second time."""
    started = [p for p in modules("experiments") if "\n    main()\n" in p.read_text()]
    assert len(started) > 10
    assert {name(p) for p in started if len(p.read_text().splitlines()) > 8} == set()
