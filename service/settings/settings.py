"""The server's settings: one class whose fields are flags, environment variables and keys of a TOML file.

Flags override variables, variables override the file. An unknown name in any of them is an error.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, SecretStr, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from quant.scheme import PRESETS, HeadStorage, KVStorage
from service.errors import InvalidSettings
from service.settings.fields import Choices, HostName, Origin, Panel, is_list, is_secret
from service.settings.file import ENV_PREFIX, Environment, SettingsFile, complaint, unknown_variable

INT8_SCHEMES = tuple(name for name, scheme in PRESETS.items() if scheme.is_int8)
Variant = Literal["w8a8", "fp16"]
PublicRoute = Literal["page", "docs", "info", "metrics"]
BASELINE: Variant = "fp16"
DEFAULT_REQUESTS = 256


def _default_cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ottava"


class Settings(BaseSettings):
    """Every setting of `ottava serve`: flag --some-field, variable OTTAVA_SOME_FIELD, key some_field.

    The order determines a field's panel in help, so put a new one next to related ones. Lists are split at commas.
    """

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, extra="forbid", frozen=True, validate_default=True, enable_decoding=False
    )

    config: Annotated[Path | None, Panel("Settings file")] = Field(
        None, description="TOML file with a key per setting, named as here with _ instead of -; none: no file is read."
    )

    model: Annotated[str | None, Panel("Model")] = Field(
        None, description="Folder or Hugging Face id of the model; none: the demo model."
    )
    baseline: str | None = Field(
        None, description="Folder or id of the float weights, if `model` is a quantized checkpoint."
    )
    variants: tuple[Variant, ...] = Field(
        ("w8a8", "fp16"), min_length=1, description="Variants to serve, separated by commas; the first is the default."
    )
    scheme: Annotated[str, Choices(INT8_SCHEMES)] = Field(
        "w8a8", min_length=1, description="Quantization preset of the w8a8 variant."
    )
    alpha: float | None = Field(
        None,
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="SmoothQuant migration strength: 0 leaves activations unchanged; none: the scheme's own.",
    )
    sink: Literal["auto", "on", "off"] = Field(
        "auto",
        description="Keep the first token of every text in float, which no scale that tokens share fits; auto: as "
        "stated by the quantized model, else where tokens share scales and prompts begin with a BOS token; on: they do "
        "from then on.",
    )
    rotate: bool = Field(
        False,
        description="Rotate the w8a8 variant's residual stream before it is quantized, so that no channel stands out; "
        "folded into the weights. For models with RMSNorms before their branches.",
    )
    calibration: Path | None = Field(
        None, description="Text file for the activation ranges; none: the model writes its own."
    )
    calibration_windows: int | None = Field(
        None, ge=1, le=4096, description="Windows of 512 tokens for calibration; none: 8, for static scales 32."
    )
    seed: int = Field(0, ge=0, lt=1 << 63, description="Seed of calibration text and random weights.")
    random_weights: bool = Field(False, description="Random weights of the model's shapes, for speed tests only.")
    cache_dir: Path = Field(
        default_factory=_default_cache_dir, description="Folder for downloaded and converted models."
    )
    dtype: Literal["auto", "float16", "bfloat16", "float32"] = Field(
        "auto",
        description="Float type of activations and of the baseline; auto: the fastest accurate one here.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where the model runs; auto: a GPU if present.")
    generation_config: Literal["auto", "none"] = Field(
        "auto",
        description="Sampling values of requests that name none; auto: those of the model's generation_config.json, as "
        "/info shows them; none: the routes' own.",
    )

    max_model_len: Annotated[int | None, Panel("Memory and steps")] = Field(
        None, ge=1, description="Tokens of prompt and answer together; none: what the model was trained for."
    )
    max_num_requests: int = Field(
        DEFAULT_REQUESTS,
        ge=1,
        le=4096,
        description="Requests that share a step (rows of the batch); by default no more than max_batched_tokens.",
    )
    max_batched_tokens: int | None = Field(
        None,
        ge=1,
        le=1 << 17,
        description="Most tokens computed per step; longer prompts are split. None: 4096 on a GPU, 512 on a CPU, "
        "and no fewer than max_num_requests.",
    )
    target_itl_ms: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="Longest step while answers are being written: prompts are read in pieces that keep within it. "
        "For steps that run as CUDA graphs, whose times are known. None: 25, or four of the variant's shortest steps "
        "if those take longer, but no more than 50.",
    )
    kv_cache: Literal["auto", "float", "int8"] = Field(
        "auto",
        description="Storage type of the w8a8 variant's keys and values, the baseline's are always float; "
        "auto: as stated by the quantized model, else by the scheme.",
    )
    quantize_head: bool = Field(
        False,
        description="Round the w8a8 variant's head, the product with the vocabulary, to int8 too: fewer bytes for each "
        "token; `ottava evaluate --quantize-head` tells what it costs.",
    )
    kv_cache_bytes: int | None = Field(
        None,
        ge=1,
        description="Memory of one variant's KV cache; none: derived from the free memory. Without max_model_len "
        "requests are no longer than it holds.",
    )
    block_size: int = Field(64, ge=1, le=256, description="Tokens per block of the KV cache; a power of two.")
    prefix_cache: bool = Field(
        True, description="Keep keys and values while memory lasts: prompts that begin alike compute only the rest."
    )
    cuda_graphs: bool = Field(True, description="Replay steps as CUDA graphs; off makes debugging easier.")
    speculate: Literal["none", "ngram"] = Field(
        "none",
        description="Draft the next tokens of an answer and check several in one step; ngram: those that followed the "
        "last tokens where they occurred before. Answers stay the same.",
    )
    max_draft_tokens: int = Field(
        7, ge=1, le=64, description="Most draft tokens of a request in a step; fewer are drafted where they seldom fit."
    )
    tensor_parallel: int = Field(
        1,
        ge=1,
        le=8,
        description="GPUs that share every layer of the model, one process each (tensor parallelism); it must divide "
        "the model's heads.",
    )
    busy_poll_ms: float | None = Field(
        None,
        ge=0,
        le=10_000,
        description="How long after its last work each process asks for more without sleeping, which saves waking up "
        "and takes a core each; 0: not at all. None: 20 on a GPU, if there are three cores for each process.",
    )
    reload_room: bool = Field(
        True,
        description="Keep GPU memory free for a second copy of the w8a8 weights, which a reload needs; "
        "off: a larger KV cache, and a reload fails if memory is short.",
    )

    max_prompt_tokens: Annotated[int | None, Panel("Limits of a request")] = Field(
        None, ge=1, description="Longest prompt in tokens; none: limited only by the context."
    )
    max_tokens_limit: int | None = Field(
        None, ge=1, description="Most tokens a request may generate; none: limited only by the context."
    )
    max_logprobs: int = Field(
        1 << 18,
        ge=1,
        description="Most log-probabilities of a request: answers x tokens x (`logprobs` + 1), with those of an echoed "
        "prompt.",
    )
    max_grammar_compile_s: float = Field(
        5.0,
        gt=0,
        allow_inf_nan=False,
        description="Processor seconds to compile a JSON schema, a regular expression or a grammar that answers are "
        "held to; one that takes longer is refused.",
    )
    max_grammar_compile_bytes: int = Field(
        512 << 20, ge=16 << 20, description="Memory that compiling one may take; one that takes more is refused."
    )
    max_mask_ms: float = Field(
        100.0,
        gt=0,
        allow_inf_nan=False,
        description="Milliseconds to find the tokens that such a grammar allows next. One that takes longer on a few "
        "random answers is refused; an answer that comes to such a place ends with an error.",
    )
    max_request_mask_ms: float = Field(
        1000.0,
        gt=0,
        allow_inf_nan=False,
        description="The same for all answers of a request together, by what was found on the random ones.",
    )
    max_waiting: int = Field(1024, ge=1, description="Requests that may queue per variant; the next gets 503.")
    queue_timeout_s: float = Field(
        300.0,
        gt=0,
        allow_inf_nan=False,
        description="Seconds a request may queue for its first step; then it gets 503.",
    )
    request_timeout_s: float = Field(
        600.0,
        gt=0,
        allow_inf_nan=False,
        description="Seconds a request may take, and the most `timeout_s` may ask for.",
    )

    host: Annotated[str, Panel("HTTP")] = Field(
        "127.0.0.1", min_length=1, description="Address to listen on; the default is reachable from this machine only."
    )
    port: int = Field(8000, ge=0, le=65535, description="TCP port; 0 lets the system choose.")
    max_body_bytes: int = Field(
        4 << 20, ge=1024, description="Largest request body; a longer one gets 413 before it is read."
    )
    max_header_bytes: int = Field(
        16 << 10, ge=1024, le=1 << 20, description="Largest request line and headers together; longer ones get 431."
    )
    max_connections: int = Field(
        4096, ge=1, description="Most open connections; the next gets 503 and is closed. Each is an open file."
    )
    receive_timeout_s: float = Field(
        30.0, gt=0, allow_inf_nan=False, description="Seconds a client has to send its request before it is cut off."
    )
    send_timeout_s: float = Field(
        30.0,
        gt=0,
        allow_inf_nan=False,
        description="Seconds a client may read nothing of what waits for it before it is cut off.",
    )
    keep_alive_s: int = Field(30, ge=1, description="Seconds a connection may stay open between two requests.")
    allowed_hosts: tuple[HostName, ...] = Field(
        (),
        description="Accepted names in the Host header besides this machine's own, separated by commas; * for any. "
        "None: any, but on loopback without API keys only this machine's own, against DNS rebinding.",
    )
    cors_origins: tuple[Origin, ...] = Field(
        (),
        description="Origins whose pages may call the server, such as https://example.org, separated by commas; "
        "* for all.",
    )
    always_usage: bool = Field(
        False,
        description="End every stream of OpenAI's routes with an event with the usage, as if the client had sent "
        "stream_options.include_usage.",
    )

    api_keys: Annotated[SecretStr | None, Panel("API keys")] = Field(
        None, description="API keys that clients send as Bearer token: `key` or `name:key`, separated by commas."
    )
    api_keys_file: Path | None = Field(
        None,
        description="File of API keys, one `key` or `name:key` per line, # before a comment; read again on reload.",
    )
    admin_api_keys: SecretStr | None = Field(
        None,
        description="Keys for /admin, written as `api_keys` are, which open nothing else. None: /admin answers on "
        "loopback without API keys, and nowhere else.",
    )
    admin_api_keys_file: Path | None = Field(
        None, description="File of keys for /admin, written as `api_keys_file` is; read again on reload."
    )
    allow_anonymous: bool = Field(
        False, description="Allow other machines to connect although no API key is set; every client is served."
    )
    public_routes: tuple[PublicRoute, ...] = Field(
        ("page", "docs"),
        description="Routes without an API key, of page, docs, info and metrics; /health and /ready never need one.",
    )
    prefix_sharing: bool = Field(
        False,
        description="Let API keys start from each other's prompts in the prefix cache; off: nobody can tell by the "
        "time to the first token what others have sent.",
    )
    max_concurrent_per_key: int | None = Field(
        None,
        ge=1,
        description="Answers per API key at a time: choices, prompts and both runs of a comparison; more get 429. "
        "Clients without a key share one limit.",
    )
    max_requests_per_minute: int | None = Field(
        None, ge=1, description="Requests per minute and API key, which may all come at once; more get 429."
    )

    shadow_rate: Annotated[float, Panel("Comparison")] = Field(
        0.0,
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="Share of live requests replayed on the idle baseline after their answer, for the metrics.",
    )
    shadow_queue: int = Field(
        64, ge=1, le=1 << 16, description="Answered requests that may queue for replay; the next is dropped."
    )

    drain_timeout_s: Annotated[float, Panel("Life and faults")] = Field(
        30.0,
        ge=0,
        allow_inf_nan=False,
        description="Seconds that running requests may still take after SIGTERM; then they are ended with 503. "
        "Keep it below the supervisor's timeout.",
    )
    reload_root: Path | None = Field(
        None,
        description="Folder below which /admin/reload may name checkpoints; none: it reads the served one again.",
    )
    reload_wait_s: float = Field(
        10.0,
        ge=0,
        allow_inf_nan=False,
        description="Seconds that a reload holds up new requests for those that run on the old weights; the rest of "
        "these are then ended with 503.",
    )
    engine_restarts: int = Field(
        3, ge=0, description="Restarts of an engine after a fault, within engine_restart_window_s."
    )
    engine_restart_window_s: float = Field(
        600.0, gt=0, allow_inf_nan=False, description="Seconds after which a restart of an engine no longer counts."
    )
    in_process: bool = Field(
        False,
        description="Run the engine in the web's process, for debugging; it is slower under load, and a crash of the "
        "engine also ends the server.",
    )
    exit_on_failure: bool = Field(
        True,
        description="Exit with an error once an engine has failed for good, so that a supervisor restarts the server; "
        "off: answer 500.",
    )
    step_timeout_s: float = Field(
        120.0,
        gt=0,
        allow_inf_nan=False,
        description="Seconds after which a step counts as stuck and its engine fails; twice as many while it waits for "
        "another variant's. Keep it far above the longest step: a large model on a CPU takes tens of seconds for "
        "max_batched_tokens.",
    )

    log_level: Annotated[Literal["debug", "info", "warning", "error"], Panel("Logs")] = Field(
        "info", description="Least severe level logged."
    )
    log_format: Literal["text", "json"] = Field("text", description="Log lines as readable text or as JSON objects.")
    log_prompts: bool = Field(False, description="Include the text of prompts and answers in the access log.")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The sources of settings, in order of precedence."""
        return init_settings, Environment(env_settings), SettingsFile(settings_cls)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_variables(cls, values: Any) -> Any:
        """Refuse misspelt variables, which pydantic-settings would silently ignore."""
        said = unknown_variable(cls.model_fields)
        if said is not None:
            raise ValueError(said)
        return values

    @field_validator("*", mode="before")
    @classmethod
    def _split_commas(cls, value: Any, info: ValidationInfo) -> Any:
        if not isinstance(value, str) or not is_list(cls.model_fields[str(info.field_name)]):
            return value
        return tuple(part.strip() for part in value.split(",") if part.strip())

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
        if self.max_batched_tokens is not None and "max_num_requests" not in self.model_fields_set:
            # Not by assignment, which would count as a value that the user has set.
            self.__dict__["max_num_requests"] = min(DEFAULT_REQUESTS, self.max_batched_tokens)
        if self.max_batched_tokens is not None and self.max_batched_tokens < self.max_num_requests:
            raise ValueError(
                f"max_batched_tokens is {self.max_batched_tokens}, below max_num_requests {self.max_num_requests}: "
                "requests that decode together need a token each; raise the first or lower the second"
            )
        return self

    @model_validator(mode="after")
    def _refuse_drafts_without_room(self) -> Self:
        if self.speculate != "none" and self.max_num_requests == 1:
            raise ValueError(
                f"speculate is {self.speculate!r} and max_num_requests is 1: a draft takes the place of a request "
                "in a step; raise max_num_requests, or leave speculate none"
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

    @model_validator(mode="after")
    def _refuse_a_sink_of_no_scheme(self) -> Self:
        if self.sink == "on" and "w8a8" not in self.variants:
            raise ValueError(
                f"sink is 'on' and variants is {','.join(self.variants)}: the baseline is float throughout; add w8a8 "
                "to variants, or leave sink auto"
            )
        if self.sink == "on" and self.random_weights:
            raise ValueError(
                "sink is 'on' and random_weights is true: the first token of random weights is like any other; leave "
                "sink auto"
            )
        return self

    @model_validator(mode="after")
    def _refuse_a_rotation_of_no_scheme(self) -> Self:
        if self.rotate and ("w8a8" not in self.variants or self.random_weights):
            what = "random_weights is true" if self.random_weights else f"variants is {','.join(self.variants)}"
            raise ValueError(f"rotate is true and {what}: there is nothing to quantize; leave rotate off")
        return self

    @model_validator(mode="after")
    def _refuse_an_int8_head_of_the_baseline(self) -> Self:
        if self.quantize_head and "w8a8" not in self.variants:
            raise ValueError(
                f"quantize_head is true and variants is {','.join(self.variants)}: the baseline's head stays float; "
                "add w8a8 to variants, or leave quantize_head off"
            )
        return self

    @model_validator(mode="after")
    def _refuse_a_shadow_without_baseline(self) -> Self:
        if self.shadow_rate and "fp16" not in self.variants:
            raise ValueError(
                f"shadow_rate is {self.shadow_rate} and variants is {','.join(self.variants)}: replays run on the "
                "baseline; add fp16 to variants, or leave shadow_rate 0"
            )
        return self

    def step_tokens(self, device_type: str) -> int:
        """`max_batched_tokens`, or its default on a device of this type ("cuda" or "cpu")."""
        if self.max_batched_tokens is not None:
            return self.max_batched_tokens
        return max(self.max_num_requests, 4096 if device_type == "cuda" else 512)

    @property
    def head(self) -> HeadStorage:
        """The storage of the w8a8 variant's head."""
        return "int8" if self.quantize_head else "float"

    @property
    def kv(self) -> KVStorage | None:
        """`kv_cache`, or None for auto, which leaves it to the checkpoint or the scheme."""
        return None if self.kv_cache == "auto" else self.kv_cache


def load_settings(**overrides: object) -> Settings:
    """Settings from the overrides that are not None, then the environment, then the file named by `config`.

    Raises:
        InvalidSettings: a name is unknown or a value invalid; the message is one line with name, value and limit.
    """
    given = {name: value for name, value in overrides.items() if value is not None}
    try:
        return Settings(**given)  # type: ignore[arg-type]
    except ValidationError as error:
        said = [_told(e["loc"], e["input"], e["msg"], given) for e in error.errors()]
        raise InvalidSettings("; ".join(said)) from error


def without_secrets(settings: Settings) -> dict[str, Any]:
    """The settings without secrets, as JSON types, for another process's `load_settings`."""
    secrets = {name for name, field in Settings.model_fields.items() if is_secret(field)}
    return settings.model_dump(mode="json", exclude=secrets)


def _told(loc: tuple[int | str, ...], value: object, message: str, given: dict[str, object]) -> str:
    message = message.removeprefix("Value error, ")
    return complaint(str(loc[0]), value, message, Settings.model_fields, given) if loc else message
