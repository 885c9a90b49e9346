"""The quickstart notebook: valid, without outputs, and it runs from top to bottom in a kernel of this interpreter."""

import json
import re
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[1] / "examples" / "quickstart.ipynb"


@pytest.fixture
def notebook() -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


def test_notebook_is_valid_and_holds_no_outputs(notebook):
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None


def test_notebook_trains_to_a_high_accuracy(notebook, tmp_path, monkeypatch):
    # A kernel of our own making: "python3" may be any interpreter that the user has registered.
    kernel = tmp_path / "kernels" / "this-interpreter"
    kernel.mkdir(parents=True)
    launch = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (kernel / "kernel.json").write_text(
        json.dumps({"argv": launch, "display_name": "this interpreter", "language": "python"})
    )
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))  # no profile or history in the home folder

    # As Jupyter does it: the kernel works in the folder of the notebook.
    resources = {"metadata": {"path": str(NOTEBOOK.parent)}}
    NotebookClient(notebook, timeout=300, kernel_name=kernel.name, resources=resources).execute()

    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    printed = "".join(output.text for output in outputs if output.output_type == "stream")
    accuracies = re.findall(r"held-out accuracy (\d\.\d+)", printed)
    assert float(accuracies[-1]) > 0.95
    assert any("image/png" in output.get("data", {}) for output in outputs), "the loss is not plotted"
    assert re.search(r"'extension': '[^']+'", outputs[-1].data["text/plain"]), "plain torch operations were used"
