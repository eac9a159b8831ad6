"""What an engine does on the device: a step in tensors, the model, sampling."""
