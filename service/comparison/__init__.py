"""Compares INT8 with its baseline: metrics of two runs, and replays on the idle baseline."""
