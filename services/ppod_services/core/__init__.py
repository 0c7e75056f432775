"""What every service shares: server, scheduler, health, drain, metrics, logs."""
