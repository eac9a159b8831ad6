"""The server's settings: flags, environment variables and keys of a TOML file, all from one class."""

from service.settings.settings import (
    BASELINE,
    INT8_SCHEMES,
    PublicRoute,
    Settings,
    Variant,
    load_settings,
    without_secrets,
)

__all__ = ["BASELINE", "INT8_SCHEMES", "PublicRoute", "Settings", "Variant", "load_settings", "without_secrets"]
