"""What vLLM reads when it is imported: one process, one thread, no reports to its makers."""

import importlib.util
import os

if importlib.util.find_spec("vllm") is not None:
    os.environ |= {
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
    }
