"""One thread for torch in every test and notebook: faster on small matrices, and the same digits each time."""

import os

# Read by torch when it is first imported, in this process, in pytest-xdist's workers and in the notebooks' kernels.
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")
