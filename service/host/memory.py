"""Sizes the KV caches from a device's free memory."""

from __future__ import annotations

import torch

from service.errors import InvalidSettings
from service.models.decoder import Decoder
from service.settings import Settings

CPU_CACHE_BYTES = 2**30
"""Default size of one variant's KV cache on a CPU."""


GPU_MEMORY_SHARE = 0.9
"""Share of the GPU memory free after loading weights that the KV caches take; the rest is for activations."""


def cache_blocks(name: str, decoder: Decoder, settings: Settings, kv_cache_bytes: int) -> int:
    """Number of blocks of a KV cache of kv_cache_bytes, at most what max_num_requests can fill.

    Raises:
        InvalidSettings: the cache would not hold one request of max_model_len tokens.
    """
    max_model_len = decoder.config.max_model_len
    block_bytes = settings.block_size * decoder.kv_bytes_per_token
    num_needed = -(-max_model_len // settings.block_size)
    num_blocks = min(kv_cache_bytes // block_bytes, num_needed * settings.max_num_requests)
    if num_blocks < num_needed:
        raise InvalidSettings(
            f"the KV cache of {name} has {kv_cache_bytes / 2**20:.3g} MiB; one request of {max_model_len} "
            f"tokens takes {num_needed * block_bytes / 2**20:.3g} MiB: lower max_model_len or raise kv_cache_bytes"
        )
    return num_blocks


def cache_budget(device: torch.device, num_variants: int, room: int = 0) -> int:
    """Bytes for the next KV cache if num_variants still need one and room bytes are to stay free."""
    if device.type == "cpu":
        return CPU_CACHE_BYTES
    num_free = torch.cuda.mem_get_info(device)[0] - room
    return max(0, int(num_free * GPU_MEMORY_SHARE)) // num_variants
