"""Every fault that users and machines bring, against real servers: `python -m benchmarks.faults`."""
