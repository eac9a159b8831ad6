"""A checkpoint of random weights that ottava and other servers can load: compressed-tensors W8A8, or float16.

    python -m benchmarks.random_checkpoint FOLDER --shape llama-3.1-8b [--float] [--max-model-len 4096]

Weights are normal with standard deviation 0.02, int8 ones rounded per output channel, so that no product sees zeros.
The tokenizer knows the words w0, w1, ...: as many as the vocabulary has ids.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.shapes import SHAPES

SPREAD = 0.02
SHARD_BYTES = 2**31
QUANTIZATION = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False},
            "input_activations": {
                "num_bits": 8,
                "type": "int",
                "symmetric": True,
                "strategy": "token",
                "dynamic": True,
            },
        }
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", default="llama-3.1-8b", choices=SHAPES)
    parser.add_argument("--float", action="store_true", help="float16 weights")
    parser.add_argument("--max-model-len", type=int, default=4096)
    args = parser.parse_args()
    num_bytes = write_checkpoint(args.folder, args.shape, is_int8=not args.float, max_model_len=args.max_model_len)
    print(f"{num_bytes / 1e9:.1f} GB in {args.folder}")


def write_checkpoint(folder: Path, shape: str, *, is_int8: bool, max_model_len: int) -> int:
    """Write the folder; returns the bytes of its weights."""
    write_without_weights(folder, shape, is_int8=is_int8, max_model_len=max_model_len)
    files: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(_shards(shape, is_int8)):
        name = f"model-{number:05d}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        files |= dict.fromkeys(shard, name)
        total += sum(tensor.nbytes for tensor in shard.values())
    _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": files})
    return total


def write_without_weights(folder: Path, shape: str, *, is_int8: bool, max_model_len: int) -> None:
    """Write configuration and tokenizer, which is all that `ottava serve --random-weights` needs."""
    folder.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = SHAPES[shape].to_dict()
    config |= {"max_position_embeddings": max_model_len, "dtype": "float16", "torch_dtype": "float16"}
    if is_int8:
        config["quantization_config"] = QUANTIZATION
    _write_json(folder / "config.json", config)
    _write_tokenizer(folder, config["vocab_size"], max_model_len)


def _shards(shape: str, is_int8: bool) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    for name, tensor in _tensors(shape, is_int8):
        shard[name] = tensor
        if sum(each.nbytes for each in shard.values()) >= SHARD_BYTES:
            yield shard
            shard = {}
    if shard:
        yield shard


def _tensors(shape: str, is_int8: bool) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor on the CPU) of every parameter, drawn on the GPU if there is one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator(device).manual_seed(0)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(SHAPES[shape])  # type: ignore[no-untyped-call]
    linears = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            fill = torch.zeros if name.endswith("bias") else torch.ones
            yield name, fill(parameter.shape, dtype=torch.float16)
            continue
        weight = torch.randn(parameter.shape, device=device, generator=generator) * SPREAD
        if not is_int8 or name not in linears or name == "lm_head.weight":
            yield name, weight.half().cpu()
            continue
        scale = (weight.abs().amax(1, keepdim=True) / 127).half()
        yield name, (weight / scale.float()).round().clamp(-127, 127).to(torch.int8).cpu()
        yield f"{name}_scale", scale.cpu()


def _write_tokenizer(folder: Path, vocab_size: int, max_model_len: int) -> None:
    tokenizer = Tokenizer(models.WordLevel({f"w{index}": index for index in range(vocab_size)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": max_model_len, "unk_token": "w0"}
    _write_json(folder / "tokenizer_config.json", config | {"eos_token": f"w{vocab_size - 1}"})
    _write_json(folder / "generation_config.json", {"eos_token_id": vocab_size - 1})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
