"""ppod's trainer: PPO from human feedback over remote reward, reference and generation services."""

import os

# Read by gRPC when it is loaded. Its handlers of forks crash children before they become another program, now and then,
# while calls are under way: tools of environments would not start. No child goes on with its connections here.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "false")
