"""Sizes the KV caches from a device's free memory."""

from __future__ import annotations

import logging

import torch

from kernels.tiles import KEYS_PER_TOKEN
from service.engine.shapes import shapes_of
from service.errors import InvalidSettings
from service.models.decoder import Decoder
from service.settings import Settings

logger = logging.getLogger(__name__)

CPU_CACHE_BYTES = 2**30
"""Default size of one variant's KV cache on a CPU."""


GPU_MEMORY_SHARE = 0.9
"""Largest share of the GPU memory free after loading weights that the KV caches take; steps need some, too."""


GRAPH_BYTES = 4 * 2**20
"""What the driver keeps of one captured step; 77 of Llama-3.1-8B took 3.6 MiB each on an H200."""


SAMPLING_BYTES = 400 * 10**6
"""What drawing tokens takes on the way; see `service.engine.device.sampler.SLICE_LOGITS`."""


LOGIT_BYTES = 28
"""What a logit takes where all are needed at once: on the way five float32 and a mask, for penalties and
log-probabilities; and kept, how often its token is in the output, and whether it is in the text at all."""


def step_bytes(decoder: Decoder, settings: Settings) -> int:
    """GPU memory that a variant's steps take beside weights and cache, by the sizes of the largest.

    Activations of a layer, of which the widest are the output of gate and up and what is made of it, or what attention
    has over an int8 cache; what captured steps yield; the graphs; and what sampling takes.
    """
    max_tokens, max_requests = settings.step_tokens("cuda"), settings.max_num_requests
    config, itemsize = decoder.config, decoder.dtype.itemsize
    widest = max(linear.shape[0] for linear in decoder.layers[0].linears)
    attending = _attention_elements(decoder) if decoder.kv == "int8" else 0
    activations = max_tokens * itemsize * (4 * config.hidden_size + max(2 * widest, attending))
    sampling = SAMPLING_BYTES + LOGIT_BYTES * max_requests * config.vocab_size
    if not settings.cuda_graphs:
        return activations + max_requests * config.vocab_size * 4 + sampling
    yielded = max_tokens * config.hidden_size * itemsize + max_requests * config.vocab_size * (4 + itemsize)
    graphs = len(shapes_of(max_tokens, max_requests)) * GRAPH_BYTES
    # Steps beyond the largest graph are not captured, and then take as much beside the graphs' memory.
    return 2 * activations + yielded + graphs + sampling


def _attention_elements(decoder: Decoder) -> int:
    """Elements per token that are alive at once in attention over an int8 cache: qkv, rotated queries, the output, and
    keys and values as floats."""
    config, size = decoder.config, decoder.ranks.size
    queries, keys = (num * config.head_size // size for num in (config.num_heads, config.num_kv_heads))
    return 3 * queries + 2 * keys + KEYS_PER_TOKEN * 2 * keys


def served_len(name: str, decoder: Decoder, settings: Settings, kv_cache_bytes: int) -> int:
    """Most tokens of a request, the decoder's sink among them.

    That is max_model_len, or what the cache holds if that is less and only its size was asked for.
    """
    length = decoder.config.max_model_len
    if settings.kv_cache_bytes is None or settings.max_model_len is not None:
        return length
    num_tokens = _capacity(decoder, settings, kv_cache_bytes)
    if not len(decoder.sink_ids) < num_tokens < length:
        return length
    logger.warning(
        "%s takes requests of up to %d tokens, which its KV cache of %.3g MiB holds, where its model takes %d: raise "
        "kv_cache_bytes, or set max_model_len",
        name,
        num_tokens - len(decoder.sink_ids),
        kv_cache_bytes / 2**20,
        decoder.max_model_len,
    )
    return num_tokens


def cache_blocks(
    name: str, decoder: Decoder, settings: Settings, kv_cache_bytes: int, max_len: int | None = None
) -> int:
    """Number of blocks of a KV cache of kv_cache_bytes, at most what max_num_requests can fill.

    max_len: tokens of the longest request, see `served_len`; None for the decoder's context.

    Raises:
        InvalidSettings: the cache would not hold one such request; the message names what would.
    """
    max_model_len = decoder.config.max_model_len if max_len is None else max_len
    block_bytes = settings.block_size * decoder.kv_bytes_per_token
    num_needed = -(-max_model_len // settings.block_size)
    num_blocks = min(kv_cache_bytes // block_bytes, num_needed * settings.max_num_requests)
    if num_blocks < num_needed:
        raise InvalidSettings(
            f"the KV cache of {name} has {kv_cache_bytes / 2**20:.3g} MiB; one request of {max_model_len} "
            f"tokens takes {num_needed * block_bytes / 2**20:.3g} MiB: lower max_model_len or raise kv_cache_bytes"
            + _remedies(decoder, settings, _capacity(decoder, settings, kv_cache_bytes))
        )
    return num_blocks


def _capacity(decoder: Decoder, settings: Settings, kv_cache_bytes: int) -> int:
    """Tokens that the whole blocks of a KV cache of so many bytes hold."""
    return kv_cache_bytes // (settings.block_size * decoder.kv_bytes_per_token) * settings.block_size


def _remedies(decoder: Decoder, settings: Settings, num_tokens: int) -> str:
    """What else makes room, with figures, for a cache whose size follows from the memory of a GPU."""
    if settings.kv_cache_bytes is not None or decoder.embedding.device.type == "cpu":
        return ""
    num_tokens -= len(decoder.sink_ids)
    told = [f"max_model_len {num_tokens} would fit"] if num_tokens > 0 else []
    told.append(
        f"steps take {step_bytes(decoder, settings) / 2**20:.0f} MiB, fewer with a lower max_batched_tokens "
        f"({settings.step_tokens('cuda')}) and max_num_requests ({settings.max_num_requests})"
    )
    if settings.reload_room:
        told.append(f"no-reload-room frees {decoder.weight_bytes / 2**20:.0f} MiB")
    if len(settings.variants) > 1:
        told.append("one variant alone (variants) leaves more")
    return "; " + "; ".join(told)


def free_bytes(device: torch.device) -> int:
    """Free memory of a GPU; on a CPU what a variant's KV cache may have."""
    return CPU_CACHE_BYTES if device.type == "cpu" else torch.cuda.mem_get_info(device)[0]


def cache_budget(
    device: torch.device, num_variants: int, room: int = 0, steps: int = 0, num_free: int | None = None
) -> int:
    """Bytes for the next KV cache.

    Args:
        num_variants: how many still need a cache.
        room: bytes that are to stay free.
        steps: bytes that the steps of those variants will take.
        num_free: the device's free memory; None asks for it.
    """
    if device.type == "cpu":
        return CPU_CACHE_BYTES
    num_free = (free_bytes(device) if num_free is None else num_free) - room
    return max(0, min(int(num_free * GPU_MEMORY_SHARE), num_free - steps)) // num_variants
