"""Reward functions as another package would add them, and some that misbehave."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

from pydantic import BaseModel

from ppod_services.reward.functions import FunctionSample


class ScriptedParameters(BaseModel):
    """Parameters."""

    factor: float = 1.0


class Scripted:
    """Does what the response says."""

    parameters_type = ScriptedParameters
    needs_references = False

    def __init__(self, parameters: ScriptedParameters) -> None:
        self._factor = parameters.factor

    def score(self, sample: FunctionSample) -> float:
        """A score, or trouble."""
        word, _, rest = sample.response.partition(" ")
        match word:
            case "raise":
                raise RuntimeError(f"cannot score {rest}")
            case "nan":
                return float("nan")
            case "text":
                return "3"  # type: ignore[return-value]
            case "exit":
                os._exit(7)
            case "sleep":
                time.sleep(float(rest))
                return 0.0
            case "prompt":
                return self._factor * len(sample.prompt)
            case "fork" | "leave":
                multiprocessing.get_context("fork").Process(target=_stay, args=(rest,)).start()
                while word == "fork" or not Path(rest).is_file() or not Path(rest).read_text():
                    time.sleep(0.01)
                return 0.0
            case "run":
                code = f"import os, time; open({rest!r}, 'w').write(str(os.getpid())); time.sleep(60)"
                subprocess.run([sys.executable, "-c", code], check=False)
                return 0.0
            case "ask":
                asked = subprocess.run([sys.executable, "-c", "print(input())"], check=False, capture_output=True)
                return float(len(asked.stdout))
            case "print":
                print("a line that must not be taken for an answer")
                return 1.0
            case _:
                return self._factor * float(sample.response)


def _stay(file: str) -> None:
    Path(file).write_text(str(os.getpid()))
    time.sleep(60)


class NoFunction:
    """Not what an entry point of the group must name."""
