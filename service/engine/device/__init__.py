"""The device part of the engine: input tensors, graphs, sampling and the runner."""
