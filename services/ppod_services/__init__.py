"""ppod's services: reward scores, reference logprobs and generation behind gRPC."""

import os

# Read by gRPC when it is loaded. Its handlers of forks crash children before they become another program, now and then,
# while calls are under way: processes of reward functions did not start. No child goes on with its connections here.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "false")

# Read by torch when it is loaded. Where a sender's store is away, its C++ code writes its own stack to stderr, among
# lines that are JSON objects; what it says of the store is in the error that the sender gets.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
