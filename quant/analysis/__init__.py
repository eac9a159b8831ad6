"""What quantization costs and brings: quality measured, times predicted."""
