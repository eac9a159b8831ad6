"""Triton reads TRITON_INTERPRET when a kernel is defined, so it is set before anything imports one."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
