"""Models as services and trainer both need them: sources, loading, padding, logprobs, the reward model.

One definition serves both sides on purpose: a logprob that the reference computes otherwise than the trainer would
show up as KL that nobody caused.
"""
