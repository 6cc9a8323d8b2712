"""The notebooks: both languages run the same code, all of it runs, and what their prose names is there."""

import ast
import base64
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_architecture import SPINE, sources

from benchmarks.notebooks import NOTEBOOKS, code_cells, read, source_of

ROOT = Path(__file__).resolve().parents[1]
ENGLISH, CHINESE = NOTEBOOKS

# All cells in one namespace, with few steps. After them: are the attention weights of the notebook those of
# the model, and does its calculation by hand hide what comes later?
WHOLE_RUN = """
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import torch

import dataset.token_cache
from benchmarks.notebooks import NOTEBOOKS, SHORT, code_cells, read, run_plainly

out = Path(sys.argv[1])
dataset.token_cache.CACHE_DIR = out / "cache"
variables, _ = run_plainly(code_cells(read(NOTEBOOKS[0])), SHORT | {"OUT": f"Path({str(out)!r})"})

masked, weights, means = (torch.tensor(variables[name]) for name in ("masked", "weights", "means"))
later = torch.ones_like(masked, dtype=torch.bool).triu(1)
assert torch.equal(masked == -torch.inf, later) and torch.equal(weights == 0, later)
assert torch.allclose(weights @ torch.tensor(variables["values"]).float(), means)

model, ids = variables["model"], variables["ids"]
entered = {}
for number, block in enumerate(model.model.layers):
    block.self_attn.register_forward_hook(
        lambda part, given, result, number=number: entered.update({number: (part, given[0], result[0])}))
with torch.no_grad():
    model(ids)
    for number, (part, x, result) in sorted(entered.items()):
        weights = variables["attention_weights"](model, ids, number)  # (H, T, T)
        values = part.v_proj(x)  # (1, T, D): one key/value head
        mixed = (weights @ values).transpose(0, 1).flatten(1)  # (T, H * D)
        assert torch.allclose(part.o_proj(mixed), result, atol=1e-5)
print("ALL CELLS RAN")
"""


def run(code: str, *arguments, folder: Path = ROOT) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1",
                                "MPLCONFIGDIR": str(arguments[0] if arguments else folder)}
    return subprocess.run([sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)], cwd=folder,
                          env=environment, capture_output=True, encoding="utf-8", timeout=300)


def prose(path: Path) -> str:
    cells = [cell for cell in read(path)["cells"] if cell["cell_type"] == "markdown"]
    return "\n".join("".join(cell["source"]) for cell in cells)


def test_both_languages_have_the_same_cells():
    english, chinese = read(ENGLISH)["cells"], read(CHINESE)["cells"]
    assert [(cell["id"], cell["cell_type"]) for cell in english] == [
        (cell["id"], cell["cell_type"]) for cell in chinese]
    for cell, other in zip(english, chinese, strict=True):
        assert (cell == other) == (cell["cell_type"] == "code"), cell["id"]
    assert len(re.findall("<details>", prose(ENGLISH))) == len(re.findall("<details>", prose(CHINESE))) == 10
    figures = [sorted(re.findall(r"\d[\d,.]*\d", prose(path))) for path in NOTEBOOKS]
    assert figures[0] == figures[1]


def test_every_cell_runs(tmp_path):
    ended = run(WHOLE_RUN, tmp_path)
    assert ended.returncode == 0 and "ALL CELLS RAN" in ended.stdout, ended.stdout + ended.stderr
    assert "the same logits as before, to the bit: True" in ended.stdout
    assert "unmerged, W has its old bits: True" in ended.stdout
    assert "parameters of the base that have changed: 0 of" in ended.stdout
    by_hand, by_model = re.findall(r"^(?:by hand|the model) +(\d+\.\d+)", ended.stdout, re.MULTILINE)
    assert abs(float(by_hand) - float(by_model)) < 1e-4
    before, after = re.search(r"^loss ([\d.]+) -> ([\d.]+)$", ended.stdout, re.MULTILINE).groups()
    assert float(after) < float(before)
    assert str(ROOT) not in ended.stdout.replace(str(tmp_path), "")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_prose_tells_the_numbers_of_this_run(path):
    """The settings, and what the stored outputs say."""
    cells, text = {cell["id"]: cell for cell in code_cells(read(path))}, prose(path)
    settings = dict(re.findall(r"^(\w+_STEPS) = (\d+)$", source_of(cells["settings"], {}), flags=re.M))
    pretrain, sft = int(settings["PRETRAIN_STEPS"]), int(settings["SFT_STEPS"])
    printed = {name: "".join("".join(output.get("text", [])) for output in cell["outputs"])
               for name, cell in cells.items()}
    started = re.search(r"^([\d,]+) rows, (\d+) steps of (\d+) rows", printed["pretrain"])
    rows, steps, batch_size = started.groups()
    assert int(steps) == pretrain
    for number in (pretrain, f"{sft:,}", f"{pretrain + sft:,}", rows, pretrain * int(batch_size)):
        assert re.search(rf"(?<![\d,]){number}(?![\d,])", text), number
    assert f"{sft}/{sft} | validation loss" in printed["sft"]
    untrained = float(re.search(r"^the model +([\d.]+)$", printed["loss"], flags=re.M)[1])
    assert f"{untrained:.1f}" in text
    assert "before: '.' " in printed["sft"]  # the prose: "it writes a full stop and ends"


def test_the_first_cell_fetches_the_repository_where_it_is_not_there(tmp_path):
    first = code_cells(read(ENGLISH))[0]
    ended = run(source_of(first, {}), folder=tmp_path)
    assert ended.returncode == 1 and "Traceback" not in ended.stderr
    assert ended.stderr.startswith("Type the address of the repository into REPOSITORY above")
    if not (ROOT / ".git").is_dir():
        pytest.skip("not a git checkout")
    fetch = source_of(first, {"REPOSITORY": repr(ROOT.as_uri())})
    ended = run(fetch + "\nprint(Path.cwd().name, sys.path[0])", folder=tmp_path)
    copy = f"seedling {tmp_path / 'seedling'}"
    assert ended.stdout.splitlines() == ["Ready. Nothing had to be installed.", copy]
    assert (tmp_path / "seedling" / "model" / "transformer.py").is_file()
    again = run(fetch, folder=tmp_path)  # the copy of before is found
    assert again.returncode == 0 and "Cloning" not in again.stderr, again.stderr


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_file_is_tidy_and_its_outputs_are_those_of_a_clean_run(path):
    notebook, pictures = read(path), 0
    ids = [cell["id"] for cell in notebook["cells"]]
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert len(set(ids)) == len(ids) and all(re.fullmatch(r"[a-z0-9-]{1,64}", name) for name in ids)
    assert notebook["metadata"].keys() == {"kernelspec", "language_info"}
    for cell in notebook["cells"]:
        assert cell["metadata"] == {}
        for output in cell.get("outputs", ()):
            assert cell["execution_count"] is None and output.get("execution_count") is None
            assert output["output_type"] in ("stream", "display_data", "execute_result")  # and no error
            assert output.get("name") != "stderr"
            data = dict(output.get("data", {}))
            pictures += len(base64.b64decode(data.pop("image/png", "")))
            text = "".join(output.get("text", [])) + "".join("".join(part) for part in data.values())
            assert not re.search(r"Traceback|(?<![\w.<])/\w+/\w+|[A-Z]:\\|object at 0x", text), cell["id"]
    assert any(cell["outputs"] for cell in code_cells(notebook))
    assert pictures < 300_000 / len(NOTEBOOKS)


def test_repository_code_is_called_and_not_copied():
    """No function of the notebook has the name of one of the spine."""
    ours = {node.name for path in SPINE
            for node in ast.parse((ROOT / path).read_text(encoding="utf-8")).body
            if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    code = "\n".join(source_of(cell, {}) for cell in code_cells(read(ENGLISH)))
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            assert node.name not in ours, f"{node.name} is pasted"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_the_prose_names_is_there(path):
    text = prose(path)
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert (path.parent / link).exists(), link
    code = "\n".join(source_of(cell, {}) for cell in code_cells(read(path)))
    python = [code, *(source.read_text(encoding="utf-8") for source in sources())]
    known = {name for source in python for name in re.findall(r"[A-Za-z_]\w*", source)}
    quoted = re.findall(r"`([^`\n]+)`", text)
    assert len(quoted) > 30
    for name in quoted:
        if "/" in name and " " not in name:
            assert (ROOT / name).exists(), name
        elif re.fullmatch(r"[A-Za-z_][\w.]*", name):
            assert set(name.split(".")) <= known, name
    places = re.findall(r"`(\w+)` (?:is )?in `([\w/]+\.py)`", text)
    places += [(name, file) for file, name in re.findall(r"`([\w/]+\.py)`\s里的\s`(\w+)`", text)]
    assert len(places) >= 8
    for name, file in places:
        definition = rf"^ *(?:def|class) {name}\b"
        assert re.search(definition, (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE), name
    for command in re.findall(r"`((?:python|bash) [^`]+)`", text):
        script, flags = command.split()[1], re.findall(r"--\w+", command)
        assert (ROOT / script).is_file(), command
        if flags:
            shown = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True,
                                   encoding="utf-8").stdout
            assert all(flag in shown for flag in flags), command
