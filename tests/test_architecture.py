"""The shape of the house, read from the code: which way imports point, and how much a learner must read."""

import ast
import io
import subprocess
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("common", "model", "dataset", "trainer", "inference", "scripts", "benchmarks")
ENTRY = "eval_model.py"

# Folder -> the folders that its files may import from. "" is the root, where eval_model.py lies.
MAY_IMPORT = {
    "common": {"common"},
    "model": {"common", "model"},
    "dataset": {"common", "dataset"},
    "trainer": {"common", "model", "dataset", "trainer"},
    "inference": {"common", "model", "dataset", "inference"},
    "": {"common", "model", "dataset", "trainer", "inference"},
    "scripts": {"common", "model", "dataset", "trainer", "inference"},
    "benchmarks": {"common", "model", "dataset", "trainer", "inference", "benchmarks"},
}
SPINE = (
    "model/config.py", "model/transformer.py", "model/lora.py", "model/generate.py",
    "dataset/chat.py", "dataset/lm_dataset.py",
    "trainer/batches.py", "trainer/losses.py", "trainer/loop.py", "trainer/optim.py", "trainer/stage.py",
    "trainer/train_pretrain.py", "trainer/train_full_sft.py", "trainer/train_lora.py",
)
MAX_SPINE_LINES = 1_500  # of code, without comments and docstrings
MAX_CORE_LINES = 12_350
MAX_FILE_LINES = 450  # in all


def sources() -> list[Path]:
    found = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    return [*found, ROOT / ENTRY]


def core() -> list[Path]:
    """The files whose sum is bounded. The embedded world and its generator are not among them."""
    outside = [ROOT / "dataset" / "synthetic.py", *(ROOT / "dataset" / "world").glob("*.py")]
    return [path for path in sources() if path.relative_to(ROOT).parts[0] not in ("scripts", "benchmarks")
            and path not in outside]


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports_of(path: Path) -> list[tuple[str, str]]:
    """(module of ours, name or "") for every import in the file, also those inside of functions."""
    names = {module_name(source) for source in sources()}
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: imports are written out in full"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.append((inner, "") if inner in names else (node.module or "", alias.name))
        elif isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
    return [(module, name) for module, name in found if module.split(".")[0] in (*FOLDERS, "eval_model")]


def code_lines(path: Path) -> int:
    """Lines that hold code: no blank lines, no comments, no docstrings."""
    text = path.read_text(encoding="utf-8")
    docstrings = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(getattr(first.value, "value", None), str):
                docstrings.update(range(first.lineno, first.end_lineno + 1))
    no_code = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
               tokenize.ENCODING, tokenize.ENDMARKER}
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in no_code:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines - docstrings)


@pytest.mark.parametrize("path", sources(), ids=module_name)
def test_imports_point_one_way(path):
    folder = path.relative_to(ROOT).parts[0] if path.parent != ROOT else ""
    for module, name in imports_of(path):
        assert module.split(".")[0] in MAY_IMPORT[folder], f"{module_name(path)} imports {module}"
        assert not name.startswith("_"), f"{module_name(path)} imports the private {module}.{name}"


@pytest.mark.parametrize("path", sources(), ids=module_name)
def test_private_names_are_used_by_their_own_module_alone(path):
    """`module._name` of a module of ours, and `thing._name` where that name is private to another file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    ours = {alias.asname or alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)
            and (node.module or "").split(".")[0] in FOLDERS for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ours:
            private = node.attr.startswith("_") and not node.attr.startswith("__")
            assert not private, f"{module_name(path)}:{node.lineno} uses {node.value.id}.{node.attr}"


def test_no_circle():
    graph = {module_name(path): {module for module, _ in imports_of(path)} for path in sources()}
    done, open_ = set(), []

    def visit(module):
        assert module not in open_, f"a circle: {' -> '.join([*open_[open_.index(module):], module])}"
        if module in done or module not in graph:
            return
        open_.append(module)
        for imported in sorted(graph[module] - {module}):
            visit(imported)
        open_.pop()
        done.add(module)

    for module in graph:
        visit(module)


def test_no_link_is_committed():
    """A link leads to something on the machine of whoever committed it."""
    listed = subprocess.run(["git", "ls-files", "--stage"], cwd=ROOT, capture_output=True, encoding="utf-8")
    if listed.returncode:
        pytest.skip("these files are in no git repository")
    assert [line for line in listed.stdout.splitlines() if line.startswith("120000")] == []


def test_nobody_imports_a_script():
    for path in sources():
        for module, _ in imports_of(path):
            assert module.split(".")[0] not in ("scripts", "eval_model"), f"{path}: {module}"
            assert not module.startswith("trainer.train_"), f"{path}: {module}"


def test_the_spine_is_small():
    lines = {name: code_lines(ROOT / name) for name in SPINE}
    assert sum(lines.values()) <= MAX_SPINE_LINES, lines


def test_the_core_is_small():
    lines = {module_name(path): code_lines(path) for path in core()}
    assert sum(lines.values()) < MAX_CORE_LINES, lines
    for path in core():
        length = len(path.read_text(encoding="utf-8").splitlines())
        assert length <= MAX_FILE_LINES, f"{path} has {length} lines"


def test_what_a_learner_meets_first_stays_short():
    def lines_of(name: str) -> list[str]:
        return (ROOT / name).read_text(encoding="utf-8").splitlines()

    assert len(lines_of("model/transformer.py")) <= 320
    for stage in ("pretrain", "full_sft", "lora"):
        assert len(lines_of(f"trainer/train_{stage}.py")) <= 75
    tree = ast.parse("\n".join(lines_of("trainer/loop.py")))
    train = next(node for node in tree.body if getattr(node, "name", "") == "train")
    assert train.end_lineno - train.lineno + 1 <= 110
    full, lora = (lines_of(f"trainer/train_{stage}.py") for stage in ("full_sft", "lora"))
    differing = [line for line in full if line not in lora] + [line for line in lora if line not in full]
    assert len(differing) <= 30


def test_a_file_beside_the_spine_says_first_what_it_is_for_and_that_it_may_be_skipped():
    for path in core():
        name = path.relative_to(ROOT).as_posix()
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        assert docstring and len(docstring.splitlines()[0]) > 20, path
        is_run_or_read = name in (*SPINE, "eval_model.py") or name.startswith("trainer/train_")
        if not is_run_or_read and path.name != "__init__.py":
            assert "skip" in docstring.split("\n\n")[0], f"{path}: may a reader skip it?"
