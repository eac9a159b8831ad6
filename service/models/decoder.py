"""One decoder for all families and precisions: its Linears decide whether floats or codes flow between the ops."""

from __future__ import annotations

import logging

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels import Quantized, Rows
from quant.checkpoint.sink import Sink
from quant.convert.rounding import ScaleRule, quantize_weight
from quant.errors import CheckpointError
from quant.linear import FloatLinear, InputCodes, Int8Linear
from quant.scheme import HeadStorage, KVStorage
from service.models.attention import Attention, KVCache
from service.models.config import ModelConfig
from service.models.mlp import Experts, load_mlp
from service.models.sharding import ALONE, Ranks, refuse_uneven, span
from service.models.sharding import rows as part_of_rows
from service.models.weights import Linear, Norm, Weights

logger = logging.getLogger(__name__)


class Layer:
    """Attention and MLP, each after its norm, both added to one residual stream.

    A branch's output is added by the next norm, which is fused with the addition. So a layer returns two tensors: its
    last branch's output, and the residual stream without it. Where nothing else stands between the two, that norm also
    adds up what the ranks give (`leaves_sums`), and the output that a layer takes and returns is a rank's summand.
    """

    def __init__(
        self, config: ModelConfig, weights: Weights, index: int, ranks: Ranks = ALONE, sink: Tensor | None = None
    ) -> None:
        names = config.layout.names
        layer = names.layer(index)
        self.ranks = ranks
        self.is_parallel = config.is_parallel
        self.leaves_sums = leaves_sums(config)
        self.attention = Attention(config, weights, index, ranks, sink)
        self.mlp = load_mlp(config, weights, index, ranks)
        self.attention_norm = Norm.load(
            config, weights, f"{layer}.{names.attention_norm}", self.attention.qkv.input_format
        )
        self.mlp_norm = Norm.load(config, weights, f"{layer}.{names.mlp_norm}", self.mlp.input_format)
        self.post_attention_norm, self.post_mlp_norm = (
            None if name is None else Norm.load(config, weights, f"{layer}.{name}")
            for name in (names.post_attention_norm, names.post_mlp_norm)
        )

    @property
    def linears(self) -> tuple[Linear, ...]:
        return *self.attention.linears, *self.mlp.linears

    def __call__(
        self, x: Tensor, residual: Tensor | None, rows: Rows, cos_sin: Tensor, cache: KVCache
    ) -> tuple[Tensor, Tensor]:
        if self.leaves_sums:
            y, residual = self.ranks.all_reduce_norm(x, residual, self.attention_norm)
            x = self.attention(y, rows, cos_sin, cache)
            y, residual = self.ranks.all_reduce_norm(x, residual, self.mlp_norm)
            return self.mlp(y), residual
        y, residual = self.attention_norm(x, residual)
        if self.is_parallel:
            z, _ = self.mlp_norm(residual, None)
            added = residual if self.ranks.rank == 0 else None
            attended = self.ranks.all_reduce(self.attention(y, rows, cos_sin, cache, added))
            return self.ranks.all_reduce(self.mlp(z)), attended
        x = _normed(self.ranks.all_reduce(self.attention(y, rows, cos_sin, cache)), self.post_attention_norm)
        y, residual = self.mlp_norm(x, residual)
        return _normed(self.ranks.all_reduce(self.mlp(y)), self.post_mlp_norm), residual


def leaves_sums(config: ModelConfig) -> bool:
    """Whether layers leave their sums over the ranks to the next norm: no norm is before it, and no other addition."""
    names = config.layout.names
    return not config.is_parallel and names.post_attention_norm is None and names.post_mlp_norm is None


def _normed(x: Tensor, norm: Norm | None) -> Tensor:
    """Apply the norm that some families have after a branch."""
    if norm is None:
        return x
    y, _ = norm(x, None)
    assert isinstance(y, Tensor)  # it feeds no Linear
    return y


class Decoder:
    """Maps token ids to hidden states and logits; the same code for `fp16` and `w8a8`.

    A head in the weights that differs from the embedding is used even if the configuration says they are tied, as
    transformers does: the weights are what was trained.

    Args:
        config: the model's configuration.
        weights: the model's weights.
        kv: storage type of the KV caches.
        head: storage type of the head; "int8" rounds a float one.
        ranks: the processes that each hold a part of it.
        sink: the tokens that every text must begin with; what they are in the float model stands in for them.

    Raises:
        CheckpointError: the sink is of another model.
        UnsupportedModel: its heads or columns cannot be divided evenly among the ranks.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        kv: KVStorage = "float",
        head: HeadStorage = "float",
        *,
        ranks: Ranks = ALONE,
        sink: Sink | None = None,
    ) -> None:
        refuse_uneven(config, ranks.size)
        self.config = config
        self.kv = kv
        self.ranks = ranks
        family, names = config.layout, config.layout.names
        vocabulary, part = (config.vocab_size, config.hidden_size), part_of_rows(ranks, config.vocab_size)
        self.embedding = weights.tensor(f"{names.embedding}.weight", vocabulary, part)
        self.position_embedding = _position_embedding(config, weights)
        # Rounded to the dtype first, as in the models' training.
        scale = torch.tensor(config.hidden_size**0.5).to(self.embedding.dtype).item()
        self.embedding_scale = scale if family.has_scaled_embedding else None
        if sink is not None and (len(sink.qkv), sink.hidden.shape[1]) != (config.num_layers, config.hidden_size):
            raise CheckpointError(
                f"the sink is of {len(sink.qkv)} layers of {sink.hidden.shape[1]} columns, and the model of "
                f"{config.num_layers} of {config.hidden_size}: they do not belong together; quantize the float model "
                "again"
            )
        self.layers = [
            Layer(config, weights, index, ranks, None if sink is None else sink.qkv[index])
            for index in range(config.num_layers)
        ]
        self.norm = Norm.load(config, weights, names.norm)
        self.sink_ids = () if sink is None else sink.ids
        self.sink_hidden = None if sink is None else _normed(sink.hidden, self.norm)
        self.is_tied = config.is_tied and not weights.differs(f"{names.head}.weight", f"{names.embedding}.weight")
        if self.is_tied:
            self.head: Linear = FloatLinear(self.embedding, None)
        else:
            self.head = weights.linear(names.head, *vocabulary, has_bias=False, part=part)
        if config.is_tied and not self.is_tied:
            logger.warning(
                "config.json says tie_word_embeddings, but the weights have a %s of their own: it is used", names.head
            )
        if head == "int8":
            self.quantize_head()
        rope = config.rope.to(self.embedding.device)
        local_rope = rope if config.local_rope is None else config.local_rope.to(rope.device)
        self.cos_sin = [rope if window is None else local_rope for window in config.windows]

    @property
    def max_model_len(self) -> int:
        """Most tokens of a text, if it does not begin with the sink's itself."""
        return self.config.max_model_len - len(self.sink_ids)

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    @property
    def is_row_independent(self) -> bool:
        """Whether a token's result does not depend on the other tokens of the step, as decided by the Linears."""
        return all(linear.is_row_independent for layer in self.layers for linear in layer.linears)

    @property
    def can_be_captured(self) -> bool:
        """Whether a step can be captured in a CUDA graph; not with experts, which wait for the host."""
        return not any(isinstance(layer.mlp, Experts) for layer in self.layers)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all Linears, the embeddings and the head, as the rank holds them; a tied head counts once."""
        linears = sum(linear.weight_bytes for layer in self.layers for linear in layer.linears)
        head = 0 if self.is_tied else self.head.weight_bytes
        positions = 0 if self.position_embedding is None else self.position_embedding.nbytes
        return linears + head + self.embedding.nbytes + positions

    def quantize_head(self) -> None:
        """Round a float head to int8: a scale per output channel, and one per row that it reads."""
        if isinstance(self.head, FloatLinear):
            codes, scale = quantize_weight(self.head.weight, ScaleRule("channel", torch.float32))
            self.head = Int8Linear(
                codes, scale.reshape(-1), input_codes=InputCodes("token"), out_dtype=self.dtype, bias=self.head.bias
            )
            self.is_tied = False

    def __call__(self, token_ids: Tensor, rows: Rows, caches: list[KVCache]) -> Tensor:
        """Run T tokens through all layers. Returns normed hidden states [T, hidden_size]; writes to the caches.

        Tokens at the first positions are taken for the sink's, if there is one. They pass through the layers as zeros,
        which widen no scale.
        """
        x = self._embedded(token_ids)
        if self.embedding_scale is not None:
            x *= self.embedding_scale
        is_sink = None
        if self.sink_hidden is not None:
            is_sink = (rows.positions < len(self.sink_ids))[:, None]
            x.masked_fill_(is_sink, 0)
        # Learned positions are passed as the residual, which the first norm adds.
        table = self.position_embedding
        residual = None if table is None else F.embedding(rows.positions, table)
        for layer, cos_sin, cache in zip(self.layers, self.cos_sin, caches, strict=True):
            x, residual = layer(x, residual, rows, cos_sin, cache)
        if leaves_sums(self.config):
            y, _ = self.ranks.all_reduce_norm(x, residual, self.norm)
        else:
            y, _ = self.norm(x, residual)
        assert isinstance(y, Tensor)
        if is_sink is None or self.sink_hidden is None:
            return y
        return torch.where(is_sink, self.sink_hidden[rows.positions.clamp(max=len(self.sink_ids) - 1)], y)

    def _embedded(self, token_ids: Tensor) -> Tensor:
        """Embeddings [T, hidden_size]; each token's row is on one rank, and the others add 0, as a summand if those are
        left to the norm."""
        if self.ranks.size == 1:
            return F.embedding(token_ids, self.embedding)
        mine = span(self.config.vocab_size, self.ranks)
        is_here = (token_ids >= mine.start) & (token_ids < mine.stop)
        x = F.embedding(torch.where(is_here, token_ids - mine.start, 0), self.embedding)
        x.masked_fill_(~is_here[:, None], 0)
        return x if leaves_sums(self.config) else self.ranks.all_reduce(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [S, V] float32 of hidden states [S, hidden_size]. All ranks call it."""
        return self.joined(self.own_logits(hidden))

    @property
    def num_own_logits(self) -> int:
        """W, how many tokens of the vocabulary a rank has, rounded up so that all have as many; alone V."""
        return -(-self.config.vocab_size // self.ranks.size)

    def own_logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """Logits [S, W] float32 of the rank's own tokens, -inf where it has fewer; written to out if it is given."""
        logits, cap = self.head(hidden), self.config.logit_cap
        missing = self.num_own_logits - logits.shape[1]
        if missing:
            logits = F.pad(logits, (0, missing))
        logits = logits.float() if out is None else out.copy_(logits)
        if cap is not None:
            logits.div_(cap).tanh_().mul_(cap)
        if missing:
            logits[:, -missing:] = float("-inf")
        return logits

    def joined(self, own: Tensor) -> Tensor:
        """Logits [S, V] of the parts [S, W] that `own_logits` has returned on each rank. All call it."""
        if self.ranks.size == 1:
            return own
        return self.ranks.all_gather(own).transpose(0, 1).flatten(1)[:, : self.config.vocab_size]

    @property
    def kv_dtype(self) -> torch.dtype:
        """Element type of its caches; see `cache_dtype` for float caches."""
        return torch.int8 if self.kv == "int8" else cache_dtype(self)

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of one token in all caches of the rank: keys, values and, for int8, a float32 scale per head."""
        elements = self.config.cache_elements_per_token // self.ranks.size
        num_scales = elements // self.config.head_size if self.kv == "int8" else 0
        return elements * self.kv_dtype.itemsize + num_scales * torch.float32.itemsize

    def new_caches(self, num_blocks: int, block_size: int) -> list[KVCache]:
        """Zeroed caches, one per layer."""
        num_kv_heads = self.config.num_kv_heads // self.ranks.size
        shape = (num_blocks, block_size, num_kv_heads, self.config.head_size)
        return [KVCache(self._zeros(shape), self._zeros(shape)) for _ in self.layers]

    def _zeros(self, shape: tuple[int, ...]) -> Tensor | Quantized:
        device = self.embedding.device
        elements = torch.zeros(shape, dtype=self.kv_dtype, device=device)
        return Quantized(elements, torch.zeros(shape[:-1], device=device)) if self.kv == "int8" else elements


def _position_embedding(config: ModelConfig, weights: Weights) -> Tensor | None:
    """The embeddings of all served positions, [max_model_len, hidden_size]; None for rotary positions."""
    name, offset = config.layout.names.positions, config.layout.position_offset
    if name is None:
        return None
    table = weights.tensor(f"{name}.weight", (config.num_positions + offset, config.hidden_size))
    return table[offset : offset + config.max_model_len]


def score(decoder: Decoder, token_ids: Tensor) -> Tensor:
    """Logits [L, V] float32 after each of the L tokens of one text, through the paged path in one chunk.

    A text that does not begin with the decoder's sink is computed behind it.
    """
    sink = token_ids.new_tensor(decoder.sink_ids)
    num_added = 0 if torch.equal(token_ids[: len(sink)], sink) else len(sink)
    token_ids = torch.cat((sink[:num_added], token_ids))
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
        is_decode=length == 1,
    )
    caches = decoder.new_caches(num_blocks, block_size)
    return decoder.logits(decoder(token_ids.to(device), rows, caches)[num_added:])


def cache_dtype(decoder: Decoder) -> torch.dtype:
    """dtype of float caches: the model's on a GPU; float32 on a CPU, where torch's attention is 10x slower in bf16."""
    return torch.float32 if decoder.embedding.device.type == "cpu" else decoder.dtype
