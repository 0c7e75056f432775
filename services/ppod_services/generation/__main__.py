"""`python -m ppod_services.generation --config FILE`."""

from ppod_services.core.command import ServiceCommand
from ppod_services.generation.config import GenerationServiceConfig
from ppod_services.generation.service import GenerationService

if __name__ == "__main__":
    ServiceCommand(
        "generation",
        "Samples completions of prompts, with their logprobs; takes new weights on its admin port.",
        GenerationServiceConfig,
        GenerationService,
    ).main()
