"""What is told of the work: metrics, logs, traces, the last requests."""
