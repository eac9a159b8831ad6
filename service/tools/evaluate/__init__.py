"""`ottava evaluate`: measures the quality and speed of quantization schemes."""
