"""Generation: sampled completions with the logprobs they were sampled under."""
