"""Tests see one thread a process, and nothing of the terminal or the cluster they are started from."""

import os

_TERMINAL = "FORCE_COLOR NO_COLOR TTY_COMPATIBLE COLUMNS LINES"
_CLUSTER = "RANK LOCAL_RANK WORLD_SIZE MASTER_ADDR MASTER_PORT NNODES PET_NNODES NPRC_PER_NODE"

for _name in f"{_TERMINAL} {_CLUSTER}".split():
    os.environ.pop(_name, None)
os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: the order of sums depends on it
