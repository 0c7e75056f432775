"""Reference: exact token logprobs under a fixed policy."""
