"""What every rank but the first does: follow rank 0's orders."""

from __future__ import annotations

from ppod_trainer.checkpoint import save_checkpoint
from ppod_trainer.leader import End, Gather, Leader, Learn, Save, Share
from ppod_trainer.metrics import StepTimer
from ppod_trainer.sharding import gather_parameters
from ppod_trainer.stopping import NotedSignal


def follow(held: Leader, noted: NotedSignal) -> None:
    """Take part in all that rank 0 does, with what this rank would lead with, until it says that the run is over.

    After each update rank 0 is told of a signal that was noted here.
    """
    learner = held.learner
    while True:
        match learner.ranks.hear():
            case Learn(rollouts, step, controls):
                learner.learn(rollouts, step, controls, StepTimer())
                learner.ranks.largest(noted.received)
            case Share(states):
                for name, state in states.items():
                    held.shared[name].restore(state)
            case Gather(dtype, only):
                for _ in gather_parameters(learner.policy.model, dtype, only):
                    pass
            case Save(directory, state, keep):
                save_checkpoint(directory, learner, state, keep)
            case End():
                return
            case unknown:
                raise TypeError(f"rank 0 gave an unknown order: {unknown!r}")
