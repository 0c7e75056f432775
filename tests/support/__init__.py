"""What the tests share: a tiny model, service processes, free ports."""
