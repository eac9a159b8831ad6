"""Telemetry: metrics, logs, traces and the last requests."""
