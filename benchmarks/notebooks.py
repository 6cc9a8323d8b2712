"""Runs the notebooks from the first cell to the last, and prints what each cell takes.

The last line is the CPU time, which other users of the machine hardly change. The lines before it are the
wall clock.

    python benchmarks/notebooks.py            # minutes
    python benchmarks/notebooks.py --short    # a few steps of each training, as the test suite runs them
    python benchmarks/notebooks.py --write    # puts the outputs of this run into the notebooks

With nbclient and ipykernel installed (`pip install nbclient ipykernel`) the cells run in Jupyter's own
kernel. Otherwise they run one after the other in this process, and their outputs are not kept. The notebooks
of all languages have the same code cells (tests/test_notebooks.py), so one run serves all of them.
"""

import argparse
import base64
import importlib.util
import io
import json
import os
import re
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import ROOT, Parser, run_script
from common.errors import UsageError
from common.files import write_whole

NOTEBOOKS = [ROOT / "notebooks" / name for name in ("first_model.ipynb", "first_model_zh.ipynb")]
SHORT = {"PRETRAIN_STEPS": 2, "SFT_STEPS": 2, "LORA_STEPS": 2, "TEXTS": 500,
         "CHATS_PER_FAMILY": 100, "QUESTIONS_PER_FAMILY": 1}


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def code_cells(notebook: dict) -> list[dict]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def source_of(cell: dict, settings: dict) -> str:
    """The code of a cell. settings: {name: code} of constants that get another value than the notebook's."""
    source = "".join(cell["source"])
    for name, value in settings.items():
        source = re.sub(rf"^{name} = [^#\n]*", lambda _, line=f"{name} = {value}": line, source, flags=re.M)
    return source


def run_plainly(cells: list[dict], settings: dict) -> tuple[dict, dict[str, float]]:
    """Runs cells in this process, without Jupyter. Returns the variables, and the seconds of each cell."""
    variables, seconds = {"__name__": "__main__"}, {}
    for cell in cells:
        began = time.perf_counter()
        exec(compile(source_of(cell, settings), f"cell {cell['id']}", "exec"), variables)
        seconds[cell["id"]] = time.perf_counter() - began
    return variables, seconds


def run_in_jupyter(cells: list[dict], settings: dict) -> dict[str, float]:
    """Runs cells in a kernel, which puts their outputs into them. Returns the seconds of each cell."""
    import nbformat
    from nbclient import NotebookClient

    seconds, sources = {}, {cell["id"]: source_of(cell, settings) for cell in cells}
    notebook = nbformat.v4.new_notebook(cells=[
        nbformat.v4.new_code_cell(sources[cell["id"]], id=cell["id"]) for cell in cells])
    client = NotebookClient(notebook, timeout=None, coalesce_streams=True,
                            resources={"metadata": {"path": str(ROOT / "notebooks")}})
    with client.setup_kernel():
        for index, cell in enumerate(notebook.cells):
            began = time.perf_counter()
            client.execute_cell(cell, index)
            seconds[cell.id] = time.perf_counter() - began
    for cell, ran in zip(cells, notebook.cells, strict=True):
        complaints = [output.text for output in ran.outputs if output.get("name") == "stderr"]
        if complaints:
            print(f"{cell['id']} complains: {''.join(complaints)}", file=sys.stderr)
        cell["outputs"] = [stored(output) for output in ran.outputs if output.get("name") != "stderr"]
    return seconds


def stored(output: dict) -> dict:
    """An output as a notebook keeps it: without numbers that differ in every run, and in lines, for git."""
    if output["output_type"] == "stream":
        return {"name": "stdout", "output_type": "stream", "text": output["text"].splitlines(True)}
    data = {kind: smaller(content) if kind == "image/png" else content.splitlines(True)
            for kind, content in sorted(output["data"].items())}
    kept = {"data": data, "metadata": {}, "output_type": output["output_type"]}
    return kept | ({"execution_count": None} if output["output_type"] == "execute_result" else {})


def smaller(picture: str) -> str:
    """A PNG in base64 with a palette of 64 colours, which are enough here: about a third of the bytes."""
    from PIL import Image  # comes with matplotlib

    file = io.BytesIO()
    image = Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB")
    image.quantize(64, dither=Image.Dither.NONE).save(file, "png", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def write(cells: list[dict]) -> None:
    """Puts the outputs of these cells into every notebook."""
    outputs = {cell["id"]: cell["outputs"] for cell in cells}
    for path in NOTEBOOKS:
        notebook = read(path)
        for cell in code_cells(notebook):
            cell["outputs"] = outputs[cell["id"]]
        write_whole(path, json.dumps(notebook, ensure_ascii=False, indent=1) + "\n")
        print(f"written: {path.relative_to(ROOT)}")


def main(args: argparse.Namespace) -> None:
    cells, settings = code_cells(read(NOTEBOOKS[0])), SHORT if args.short else {}
    in_jupyter = all(importlib.util.find_spec(name) for name in ("nbclient", "ipykernel"))
    if args.write and (args.short or not in_jupyter):
        raise UsageError("--write keeps the outputs of a whole run: pip install nbclient ipykernel, and no "
                         "--short")
    if in_jupyter:
        seconds = run_in_jupyter(cells, settings)
    else:
        import matplotlib

        matplotlib.use("Agg")  # pictures are drawn and not shown
        _, seconds = run_plainly(cells, settings)
    for name, taken in seconds.items():
        print(f"{name:<20} {taken:7.1f} s")
    print(f"{'all cells':<20} {sum(seconds.values()):7.1f} s")
    print(f"{'CPU time':<20} {sum(os.times()[:4]):7.1f} s")  # ours, and the kernel's, which has ended
    if args.write:
        write(cells)


if __name__ == "__main__":
    parser = Parser(description=__doc__)
    parser.add_argument("--short", action="store_true", help="a few steps of each training")
    parser.add_argument("--write", action="store_true", help="keep the outputs in the notebooks")
    run_script(main, parser.parse_args())
