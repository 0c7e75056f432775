"""ppod's trainer: PPO from human feedback over remote reward, reference and generation services."""
