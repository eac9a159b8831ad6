"""Triton reads TRITON_INTERPRET when a kernel is defined, so it is set before anything imports one."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

if "PYTEST_XDIST_WORKER" in os.environ:
    # Processes share the cores already; tiny models gain nothing from more threads.
    torch.set_num_threads(1)
