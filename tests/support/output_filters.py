"""Output filters as another package would add them, and some that misbehave."""

from __future__ import annotations

from pydantic import BaseModel

from ppod_services.generation.filters import FilteredText


class ScriptedParameters(BaseModel):
    """Parameters; `fault` is what making the filter fails with."""

    fault: str = ""


class Scripted:
    """Does what the completion and the prompt say."""

    parameters_type = ScriptedParameters

    def __init__(self, parameters: ScriptedParameters) -> None:
        if parameters.fault:
            raise RuntimeError(parameters.fault)

    def reason(self, text: FilteredText) -> str | None:
        if "!" in text.completion:
            raise RuntimeError("cannot judge this")
        if "?" in text.completion:
            return 3  # type: ignore[return-value]
        return f"after {text.prompt}: {text.completion}" if "#" in text.completion else None


class NoFilter:
    """Lacks what a filter needs."""
