"""Starts processes that share work, as torchrun does, on this machine's CPU."""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent


def launch(processes: int, script: str, *arguments) -> subprocess.CompletedProcess:
    """Run Python code in so many processes, each with one thread and able to import what tests can."""
    folders = [TESTS.parent, TESTS, *(path for path in TESTS.iterdir() if path.is_dir())]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, folders)), "ACCELERATE_USE_CPU": "true"}
    environment |= {"OMP_NUM_THREADS": "1", "CODE": script}
    start = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", "0", "--standalone"]
    run_it = ["--no-python", sys.executable, "-c", "import os; exec(os.environ['CODE'])"]
    return subprocess.run(
        [sys.executable, *start, *run_it, *map(str, arguments)], env=environment, capture_output=True, text=True
    )
