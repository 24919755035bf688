"""Run notebooks cell by cell, without a network, each in a process of its own; say as JSON what they print.

    python run_notebooks.py ONE.ipynb OTHER.ipynb

For each notebook, where `cratelab` was imported from, what each cell of code prints, and a list of [types, message] of
the errors, not stopping at any.
"""

import contextlib
import importlib
import io
import json
import multiprocessing
import os
import socket
import sys


def run(path: str) -> dict:
    import nbformat
    from IPython.core.interactiveshell import InteractiveShell

    import cratelab

    shell, errors, printed = InteractiveShell(), [], []
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code":
            with contextlib.redirect_stdout(io.StringIO()) as out:
                result = shell.run_cell(cell.source)
            printed.append(out.getvalue())
            if not result.success:
                error = result.error_before_exec or result.error_in_exec
                errors.append([[kind.__name__ for kind in type(error).__mro__], str(error)])
    return {"errors": errors, "printed": printed, "library": cratelab.__file__}


def refuse(*_):
    raise OSError("there is no network here")


if __name__ == "__main__":
    os.environ["MPLBACKEND"] = "template"  # draws nothing, warns of nothing
    for name in "torch", "matplotlib.pyplot", "scipy.stats", "IPython.core.interactiveshell", "nbformat":
        importlib.import_module(name)  # once for all of them
    sys.modules["torch"].set_num_threads(1)
    socket.socket.connect = socket.getaddrinfo = refuse
    paths = sys.argv[1:]
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        print(json.dumps(dict(zip(paths, pool.map(run, paths, chunksize=1), strict=True))))
