"""Reward: scalar scores of sequences."""
