"""Commands with a tiny model, as a user types them."""

from __future__ import annotations

import os
import subprocess

from serving import FUSEDSTEP

# So small a model waits for threads, and for processes that import vLLM once more.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}
SMALL = ("--max-model-len", "256", "--kv-cache-memory-bytes", "20000000", "--enforce-eager")


def run(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [FUSEDSTEP, *args],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | ENVIRONMENT,
        start_new_session=True,
    )
