"""One decoder for every family and every precision: the Linears it is given decide what flows between its ops."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

import kernels
from kernels import Quantized, ToInt8
from quant.linear import FloatLinear, GatedLinear, Int8Linear, fuse
from quant.scheme import KVStorage
from service.models.families import ModelConfig

Linear = FloatLinear | Int8Linear


class Weights(Protocol):
    """Where a decoder takes its tensors from: a checkpoint, or random numbers of the same shapes."""

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor: ...

    def linear(self, name: str, out_features: int, in_features: int, has_bias: bool) -> Linear: ...


@dataclass(frozen=True, slots=True)
class Rows:
    """Where the T token rows of a step sit. int32 tensors on the device.

    positions, slots: [T].   query_starts: [B + 1].   context_lens: [B].   block_tables: [B, W].
    max_query_len: the largest number of rows of one request.
    """

    positions: Tensor
    slots: Tensor
    query_starts: Tensor
    context_lens: Tensor
    block_tables: Tensor
    max_query_len: int


@dataclass(frozen=True, slots=True)
class KVCache:
    """Keys and values of one layer, each [num_blocks, block_size, G, D] float.

    Or codes of that shape with scales [num_blocks, block_size, G].
    """

    k: Tensor | Quantized
    v: Tensor | Quantized

    @property
    def nbytes(self) -> int:
        return self.k.nbytes + self.v.nbytes


class RMSNorm:
    """Residual add and root-mean-square norm; writes what the Linear after it eats."""

    def __init__(self, weight: Tensor, eps: float, quantize: ToInt8 | None) -> None:
        self.weight = weight
        self.eps = eps
        self.quantize = quantize

    def __call__(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor | Quantized, Tensor]:
        return kernels.rms_norm(x, self.weight, self.eps, residual, self.quantize)


class Layer:
    """Attention and gated MLP, each behind its norm."""

    def __init__(self, config: ModelConfig, weights: Weights, index: int) -> None:
        self.num_heads = config.num_heads
        self.scale = config.head_size**-0.5
        name = f"model.layers.{index}"
        hidden, inner = config.hidden_size, config.intermediate_size
        q_size, kv_size = config.num_heads * config.head_size, config.num_kv_heads * config.head_size

        def linear(path: str, n: int, k: int, has_bias: bool) -> Linear:
            return weights.linear(f"{name}.{path}", n, k, has_bias)

        def norm(path: str, consumer: Linear | GatedLinear) -> RMSNorm:
            return RMSNorm(weights.tensor(f"{name}.{path}.weight", (hidden,)), config.norm_eps, consumer.input_format)

        sizes = {"q_proj": q_size, "k_proj": kv_size, "v_proj": kv_size}
        self.qkv = fuse([linear(f"self_attn.{part}", n, hidden, config.qkv_bias) for part, n in sizes.items()])
        self.o = linear("self_attn.o_proj", hidden, q_size, config.o_bias)
        self.down = linear("mlp.down_proj", hidden, inner, config.mlp_bias)
        gate, up = (linear(f"mlp.{part}", inner, hidden, config.mlp_bias) for part in ("gate_proj", "up_proj"))
        self.gated = GatedLinear(gate, up, self.down.input_format)
        self.attention_norm = norm("input_layernorm", self.qkv)
        self.mlp_norm = norm("post_attention_layernorm", self.gated)

    @property
    def linears(self) -> tuple[Linear, ...]:
        return self.qkv, self.o, self.gated.linear, self.down

    def __call__(
        self, x: Tensor, residual: Tensor | None, rows: Rows, cos_sin: Tensor, cache: KVCache
    ) -> tuple[Tensor, Tensor]:
        y, residual = self.attention_norm(x, residual)
        q = kernels.rope_and_cache(self.qkv(y), rows.positions, rows.slots, cos_sin, cache.k, cache.v, self.num_heads)
        attended = kernels.paged_attention(
            q,
            cache.k,
            cache.v,
            rows.block_tables,
            rows.query_starts,
            rows.context_lens,
            rows.max_query_len,
            self.scale,
            self.o.input_format,
        )
        y, residual = self.mlp_norm(self.o(attended), residual)
        return self.down(self.gated(y)), residual


class Decoder:
    """Token ids in, hidden states out; the same code for `fp16` and `w8a8`.

    Args:
        config: of the model.
        weights: of the model.
        kv: what its caches store keys and values in.
    """

    def __init__(self, config: ModelConfig, weights: Weights, kv: KVStorage = "float") -> None:
        self.config = config
        self.kv = kv
        vocabulary = (config.vocab_size, config.hidden_size)
        self.embedding = weights.tensor("model.embed_tokens.weight", vocabulary)
        self.layers = [Layer(config, weights, index) for index in range(config.num_layers)]
        self.norm = RMSNorm(weights.tensor("model.norm.weight", (config.hidden_size,)), config.norm_eps, None)
        if config.is_tied:
            self.head: Linear = FloatLinear(self.embedding, None)
        else:
            self.head = weights.linear("lm_head", *vocabulary, has_bias=False)
        self.cos_sin = config.rope.to(self.embedding.device)

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    @property
    def is_row_independent(self) -> bool:
        """Whether a token's result is free of what else is in the step: a dynamic per-tensor scale is not."""
        linears = [linear for layer in self.layers for linear in layer.linears]
        return not any(isinstance(linear, Int8Linear) and linear.activation == "tensor" for linear in linears)

    @property
    def weight_bytes(self) -> int:
        """Bytes of every Linear, the embedding and the head, a tied one once."""
        linears = sum(linear.weight_bytes for layer in self.layers for linear in layer.linears)
        head = 0 if self.config.is_tied else self.head.weight_bytes
        return linears + head + self.embedding.nbytes

    def __call__(self, token_ids: Tensor, rows: Rows, caches: list[KVCache]) -> Tensor:
        """Run T tokens through every layer: hidden states [T, hidden_size], normed; keys and values go to caches."""
        x = F.embedding(token_ids, self.embedding)
        residual: Tensor | None = None
        for layer, cache in zip(self.layers, caches, strict=True):
            x, residual = layer(x, residual, rows, self.cos_sin, cache)
        y, _ = self.norm(x, residual)
        assert isinstance(y, Tensor)
        return y

    def logits(self, hidden: Tensor) -> Tensor:
        """[S, hidden_size] -> [S, V] float32."""
        return self.head(hidden).float()

    @property
    def kv_dtype(self) -> torch.dtype:
        """Of the elements of its caches; `cache_dtype` says which float."""
        return torch.int8 if self.kv == "int8" else cache_dtype(self)

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes that one token adds to the caches of all layers: keys, values and, of int8, a float32 scale a head."""
        elements = self.config.cache_elements_per_token
        num_scales = elements // self.config.head_size if self.kv == "int8" else 0
        return elements * self.kv_dtype.itemsize + num_scales * torch.float32.itemsize

    def new_caches(self, num_blocks: int, block_size: int) -> list[KVCache]:
        """Zeroed caches, one a layer."""
        shape = (num_blocks, block_size, self.config.num_kv_heads, self.config.head_size)
        return [KVCache(self._zeros(shape), self._zeros(shape)) for _ in self.layers]

    def _zeros(self, shape: tuple[int, ...]) -> Tensor | Quantized:
        device = self.embedding.device
        elements = torch.zeros(shape, dtype=self.kv_dtype, device=device)
        return Quantized(elements, torch.zeros(shape[:-1], device=device)) if self.kv == "int8" else elements


def score(decoder: Decoder, token_ids: Tensor) -> Tensor:
    """Logits [L, V] float32 after each of the L tokens of one text, through the paged path in one chunk."""
    length, device = len(token_ids), decoder.embedding.device
    block_size = 16
    num_blocks = -(-length // block_size)
    positions = torch.arange(length, dtype=torch.int32, device=device)
    rows = Rows(
        positions=positions,
        slots=positions,
        query_starts=torch.tensor([0, length], dtype=torch.int32, device=device),
        context_lens=torch.tensor([length], dtype=torch.int32, device=device),
        block_tables=torch.arange(num_blocks, dtype=torch.int32, device=device)[None],
        max_query_len=length,
    )
    caches = decoder.new_caches(num_blocks, block_size)
    return decoder.logits(decoder(token_ids.to(device), rows, caches))


def cache_dtype(decoder: Decoder) -> torch.dtype:
    """Of float caches.

    The model's own dtype on a GPU. float32 on the CPU, where torch's attention is ten times slower in bf16.
    """
    return torch.float32 if decoder.embedding.device.type == "cpu" else decoder.dtype
