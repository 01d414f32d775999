"""One thread per process: tests are small, and threads that wait for each other are slower than one."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, and for the processes tests start
