"""What a request may ask for, as GET /info shows it."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from service.engine.api import HostInfo
from service.process import is_running
from service.settings import Settings
from service.text.grammars.given import MAX_GRAMMAR_BYTES, MAX_REGEX_CHARS
from service.text.json.schema import (
    MAX_ALTERNATIVES,
    MAX_COUNTED,
    MAX_OPTIONAL,
    MAX_RULES_BYTES,
    MAX_SCHEMA_BYTES,
)
from service.text.sandbox import MAX_S
from service.web.openai.requests import MAX_CHOICES
from service.web.openai.tokenize import MAX_TOKENS
from service.web.schemas.tools import MAX_TOOLS


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of a request; null is none. Those that are settings have the settings' names.

    max_choices: prompts times `n`.
    max_tokenize_tokens: tokens of POST /tokenize and /detokenize.
    max_template_s: time of a chat template.
    """

    max_body_bytes: int
    max_header_bytes: int
    max_prompt_tokens: int | None
    max_tokens_limit: int | None
    max_choices: int
    max_tools: int
    max_logprobs: int
    max_concurrent_per_key: int | None
    max_requests_per_minute: int | None
    max_waiting: int
    queue_timeout_s: float
    request_timeout_s: float
    max_template_s: float
    max_tokenize_tokens: int
    max_schema_bytes: int
    max_schema_rules_bytes: int
    max_schema_alternatives: int
    max_schema_counted_arrays: int
    max_schema_optional_properties: int
    max_regex_chars: int
    max_grammar_bytes: int
    max_grammar_compile_s: float
    max_grammar_compile_bytes: int
    max_mask_ms: float
    max_request_mask_ms: float


FIXED: dict[str, Any] = {
    "max_choices": MAX_CHOICES,
    "max_tools": MAX_TOOLS,
    "max_template_s": MAX_S,
    "max_tokenize_tokens": MAX_TOKENS,
    "max_schema_bytes": MAX_SCHEMA_BYTES,
    "max_schema_rules_bytes": MAX_RULES_BYTES,
    "max_schema_alternatives": MAX_ALTERNATIVES,
    "max_schema_counted_arrays": MAX_COUNTED,
    "max_schema_optional_properties": MAX_OPTIONAL,
    "max_regex_chars": MAX_REGEX_CHARS,
    "max_grammar_bytes": MAX_GRAMMAR_BYTES,
}
"""Those that no setting changes."""


@dataclass(frozen=True, slots=True)
class Served(HostInfo):
    """The answer to GET /info: what is served, and what a request may ask for.

    rows: answers that share a step of each variant (`max_num_requests`); API keys share them fairly.
    """

    rows: int
    limits: Limits


def served(info: HostInfo, settings: Settings) -> Served:
    """What is served under these settings."""
    names = [field.name for field in fields(Limits)]
    limits = Limits(**{name: FIXED[name] if name in FIXED else getattr(settings, name) for name in names})
    own = {field.name: getattr(info, field.name) for field in fields(HostInfo)}
    own["ranks"] = [rank if is_running(rank.pid) else replace(rank, state="ended") for rank in info.ranks]
    return Served(**own, rows=settings.max_num_requests, limits=limits)
