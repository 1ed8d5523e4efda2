"""Run notebooks in place, on the real small models, and keep what they print and draw: `python notebooks/execute.py *.ipynb`.

Warnings and progress bars (stderr) are left out: they tell of one machine and one moment.
"""

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient


def execute(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook, timeout=3600, startup_timeout=600, record_timing=False, resources={"metadata": {"path": path.parent}}
    )
    client.execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    nbformat.write(notebook, path)


for name in sys.argv[1:]:
    print(name, flush=True)
    execute(Path(name))
