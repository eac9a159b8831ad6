"""What tests share: fakes, tiny models, clients, oracles."""
