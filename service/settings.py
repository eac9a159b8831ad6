"""How the service is set up: one class, one environment variable per field, an unknown name is an error."""

from __future__ import annotations

import os
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from quant.scheme import KVStorage
from service.errors import InvalidSettings

ENV_PREFIX = "OTTAVA_"
Variant = Literal["w8a8", "fp16"]


def _default_cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ottava"


class Settings(BaseSettings):
    """Every setting of `ottava serve`; the environment variable of `field` is OTTAVA_FIELD."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, extra="forbid", frozen=True, validate_default=True)

    model: str | None = Field(None, description="Folder or Hugging Face id of the model; none: the demo model.")
    baseline: str | None = Field(
        None, description="Folder or id of the float weights, where `model` is a quantized checkpoint."
    )
    variants: Annotated[tuple[Variant, ...], NoDecode] = Field(
        ("w8a8", "fp16"), min_length=1, description="Variants to serve, separated by commas; the first is the default."
    )
    host: str = Field("127.0.0.1", min_length=1, description="Address to listen on; this machine alone unless changed.")
    port: int = Field(8000, ge=0, le=65535, description="TCP port; 0 lets the system choose.")
    dtype: Literal["auto", "float16", "bfloat16", "float32"] = Field(
        "auto", description="Float type of activations and of the baseline; auto: the fastest here that is accurate."
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where the model runs; auto: a GPU if present.")
    max_model_len: int | None = Field(
        None, ge=1, description="Tokens of prompt and answer together; none: what the model was trained for."
    )
    max_num_requests: int = Field(64, ge=1, le=4096, description="Requests that share a step (rows of the batch).")
    max_batched_tokens: int = Field(
        512, ge=1, le=1 << 17, description="Tokens computed per step: long prompts are cut into chunks of this."
    )
    block_size: int = Field(64, ge=1, le=256, description="Tokens per block of the KV cache; a power of two.")
    kv_cache_bytes: int | None = Field(
        None, ge=1, description="Memory of one variant's KV cache; none: from the memory that is free."
    )
    kv_cache: Literal["auto", "float", "int8"] = Field(
        "auto",
        description="What the w8a8 variant stores keys and values in, the baseline always float; "
        "auto: what the quantized model says, else the scheme.",
    )
    max_waiting: int = Field(1024, ge=1, description="Requests that may wait per variant; the next gets 503.")
    max_body_bytes: int = Field(
        4 << 20, ge=1024, description="Largest request body; a longer one gets 413 before it is read."
    )
    scheme: str = Field("w8a8", min_length=1, description="Quantization preset of the w8a8 variant.")
    alpha: float | None = Field(
        None,
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="SmoothQuant migration strength: 0 keeps activations as is; none: the scheme's own.",
    )
    calibration: Path | None = Field(
        None, description="Text file for the activation ranges; none: the model writes its own."
    )
    seed: int = Field(0, ge=0, lt=1 << 63, description="Seed of calibration text and random weights.")
    random_weights: bool = Field(False, description="Random weights of the model's shapes, for speed tests only.")
    cache_dir: Path = Field(default_factory=_default_cache_dir, description="Downloaded and converted models.")
    cuda_graphs: bool = Field(True, description="Replay decode steps as CUDA graphs; off eases debugging.")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least severe level logged.")

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_variables(cls, values: Any) -> Any:
        """pydantic-settings reads only the variables it knows: a misspelt one would be silently without effect."""
        known = [f"{ENV_PREFIX}{name}".upper() for name in cls.model_fields]
        for name in os.environ:
            if name.upper().startswith(ENV_PREFIX) and name.upper() not in known:
                nearest = get_close_matches(name.upper(), known, n=1, cutoff=0.0)
                raise ValueError(f"unknown environment variable {name}; the nearest known one is {nearest[0]}")
        return values

    @field_validator("variants", mode="before")
    @classmethod
    def _split_variants(cls, value: Any) -> Any:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("variants")
    @classmethod
    def _refuse_repeated_variants(cls, value: tuple[Variant, ...]) -> tuple[Variant, ...]:
        if len(set(value)) != len(value):
            raise ValueError(f"a variant is named twice in {','.join(value)}; name each once")
        return value

    @field_validator("block_size")
    @classmethod
    def _refuse_odd_block_size(cls, value: int) -> int:
        if value & (value - 1):
            raise ValueError(f"{value} is not a power of two; use 16, 32 or 64")
        return value

    @model_validator(mode="after")
    def _refuse_starving_budget(self) -> Self:
        if self.max_batched_tokens < self.max_num_requests:
            raise ValueError(
                f"max_batched_tokens is {self.max_batched_tokens}, below max_num_requests {self.max_num_requests}: "
                "requests that decode together need a token each; raise the first or lower the second"
            )
        return self

    @model_validator(mode="after")
    def _refuse_an_int8_baseline(self) -> Self:
        if self.kv_cache == "int8" and "w8a8" not in self.variants:
            raise ValueError(
                f"kv_cache is 'int8' and variants is {','.join(self.variants)}: the baseline's keys and values stay "
                "float; add w8a8 to variants, or leave kv_cache auto"
            )
        return self

    @property
    def kv(self) -> KVStorage | None:
        """`kv_cache` where it decides; None leaves it to the checkpoint or the scheme."""
        return None if self.kv_cache == "auto" else self.kv_cache


def load_settings(**overrides: object) -> Settings:
    """Settings from the environment and from the overrides that are not None, which win.

    Raises:
        InvalidSettings: an unknown name or an impossible value; the message is one line with name, value and limit.
    """
    try:
        return Settings(**{name: value for name, value in overrides.items() if value is not None})  # type: ignore[arg-type]
    except ValidationError as error:
        raise InvalidSettings("; ".join(_complaint(e["loc"], e["input"], e["msg"]) for e in error.errors())) from error


def _complaint(loc: tuple[int | str, ...], value: object, message: str) -> str:
    message = message.removeprefix("Value error, ")
    if not loc:
        return message
    name = str(loc[0])
    if name not in Settings.model_fields:
        nearest = get_close_matches(name, Settings.model_fields, n=1, cutoff=0.0)[0]
        return f"unknown setting {name!r}; the nearest known one is {nearest!r}"
    return f"{name} = {value!r}: {message} ({Settings.model_fields[name].description})"
