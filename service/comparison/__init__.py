"""INT8 beside its baseline: what two runs amount to, and replays on the idle baseline."""
