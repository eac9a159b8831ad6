"""The packages as installed: beside transformers, at import, and as a command."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from quant import __version__
from tests.support.modules import evaluated

ROOT = Path(__file__).parents[1]

LOAD_A_LLAMA = """
import kernels, sys, torch
from pathlib import Path
from transformers import AutoModelForCausalLM
assert Path(kernels.__file__).parent == Path("kernels").resolve(), kernels.__file__
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
print(*model(torch.arange(8)[None]).logits.argmax(-1)[0].tolist())
"""

IMPORT_EVERYTHING = """
import importlib, importlib.util, pkgutil, socket
import accelerate, compressed_tensors, fastapi, huggingface_hub, tokenizers, torch, transformers, triton, uvicorn
import xgrammar

def refuse(name):
    def refused(*args, **kwargs):
        raise AssertionError(f"{name} was called by an import")
    return refused

socket.socket.connect = refuse("socket.connect")
socket.socket.__init__ = refuse("socket.socket")
socket.getaddrinfo = refuse("getaddrinfo")
for name in ("init", "_lazy_init", "is_available", "device_count", "current_device", "get_device_properties"):
    setattr(torch.cuda, name, refuse(f"torch.cuda.{name}"))
names = []
for package in ("kernels", "quant", "service"):
    names.append(package)
    path = importlib.import_module(package).__path__
    names += [module.name for module in pkgutil.walk_packages(path, f"{package}.")]
names.remove("service.__main__")  # it is the command
if not (importlib.util.find_spec("ray") and importlib.util.find_spec("aiohttp")):
    for name in ("deployment", "launch", "router", "upstream"):
        names.remove(f"service.cluster.{name}")  # the extra is not installed
for name in names:
    importlib.import_module(name)
print(len(names))
"""


def python(code: str, *args: str) -> str:
    """What a fresh interpreter in the repository's root prints; any warning or error of it fails the test."""
    done = subprocess.run(
        [sys.executable, "-c", code, *args], check=False, cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


def test_our_kernels_package_does_not_confuse_transformers(tmp_path: Path) -> None:
    """transformers probes a distribution named `kernels`; run from the root, it finds our package instead."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.5,
    )
    model = evaluated(LlamaForCausalLM(config))
    model.save_pretrained(tmp_path)
    with torch.inference_mode():
        expected = model(torch.arange(8)[None]).logits.argmax(-1)[0].tolist()
    assert python(LOAD_A_LLAMA, str(tmp_path)) == " ".join(map(str, expected))


def test_no_import_reaches_for_a_gpu_or_the_network() -> None:
    assert int(python(IMPORT_EVERYTHING)) >= 40


def test_the_watch_on_imports_would_notice() -> None:
    """The patches above bite: what they forbid does raise under them."""
    for culprit in ("socket.create_connection(('127.0.0.1', 9))", "torch.zeros(1, device='cuda')"):
        with pytest.raises(AssertionError, match="was called by an import"):
            python(f"{IMPORT_EVERYTHING.partition('names = []')[0]}\n{culprit}")


@pytest.mark.parametrize(
    "module",
    [
        "service.web.app",
        "service.engine.loop",
        "service.settings",
        "service.errors",
        "service.cli",
        "service.tools.chat_client",
    ],
)
def test_the_http_side_imports_no_torch(module: str) -> None:
    code = f"import sys, {module}; print(*sorted({{'torch', 'triton', 'transformers'}} & set(sys.modules)))"
    assert python(code) == ""


WITHOUT_TRITON = """
import pkgutil, sys
sys.modules["triton"] = None  # an import of it fails, and find_spec does not find it
import service.host.engine_process, service.tools.evaluate, service.cli, kernels, torch
from service.host.machine import versions
assert "triton" not in versions(), versions()
codes = kernels.quantize_rows(torch.tensor([[1.0, -2.0, 0.5]])).codes
print(*codes.tolist()[0])
"""


def test_a_cpu_needs_no_triton() -> None:
    """The CPU image leaves it out."""
    assert python(WITHOUT_TRITON) == "64 -127 32"


def test_the_command_prints_its_version() -> None:
    script = Path(sys.executable).with_name("ottava")
    if not script.exists():
        pytest.skip("ottava is not installed in this environment")
    done = subprocess.run([script, "--version"], check=True, capture_output=True, text=True, timeout=300)
    assert done.stdout == f"ottava {__version__}\n"
