"""vLLM behind GenerationService. Only `settings` may be imported where vLLM and torch are not installed."""
