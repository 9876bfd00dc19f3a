"""One thread for all tests: their tensors are small, and a busy second core slows two threads."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch starts its threads
os.environ.setdefault("NUMBA_NUM_THREADS", "1")  # numba's would become torch's number too
