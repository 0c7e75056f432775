"""ppod's services: reward scores, reference logprobs and generation behind gRPC."""
