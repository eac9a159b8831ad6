"""Settings of a tiny model on two ranks."""

from __future__ import annotations

from pathlib import Path

from service.settings import Settings, load_settings

SHAPE = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}


def settings_of(folder: Path, size: int, **changes: object) -> Settings:
    fixed = {"random_weights": True, "device": "cpu", "dtype": "float32", "scheme": "rtn-token", "max_num_requests": 16}
    return load_settings(**{"model": str(folder), "cache_dir": folder, "tensor_parallel": size} | fixed | changes)
