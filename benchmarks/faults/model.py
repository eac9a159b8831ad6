"""The model that the cases serve: tiny, random, but a whole one, with a tokenizer and both precisions of it."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from quant.scheme import PRESETS
from service.settings import Settings
from service.store.calibration import Calibration
from service.store.demo import prepare_demo_model
from service.store.quantized import quantize_model

WEIGHTS = "model.safetensors"
EMBEDDING = "model.embed_tokens.weight"
END = "<|end|>"
CPU = torch.device("cpu")


def tiny_model(folder: Path) -> Path:
    """A Llama of two layers whose tokens are bytes; the 257th ends an answer."""
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=8192,
        # Random weights of the usual spread answer every prompt with one token, over and over.
        initializer_range=0.15,
        eos_token_id=256,
        bos_token_id=None,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({char: place for place, char in enumerate([*alphabet, END])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END)  # type: ignore[no-untyped-call]
    tokenizer.save_pretrained(folder)
    return folder


def float_model(name: str, folder: Path) -> Path:
    """The float model of that name, "tiny" or "demo", in a folder that may be changed at will."""
    if name == "tiny":
        return tiny_model(folder)
    shutil.copytree(prepare_demo_model(Settings().cache_dir), folder)
    return folder


def int8_model(source: Path, out: Path) -> Path:
    """The int8 checkpoint of a float model, by the default scheme and little text."""
    quantize_model(source, out, PRESETS["w8a8"], Calibration(num_windows=2, window_len=128), CPU)
    return out


def copy_with(folder: Path, copy: Path, change: dict[str, Tensor]) -> Path:
    """A copy of a model folder with some tensors replaced."""
    shutil.copytree(folder, copy)
    tensors = load_file(copy / WEIGHTS) | change
    save_file(tensors, copy / WEIGHTS, metadata={"format": "pt"})
    return copy


def tensor_of(folder: Path, name: str) -> Tensor:
    """A tensor as stored."""
    return load_file(folder / WEIGHTS)[name]
