"""`python -m ppod_services.reference --config FILE`."""

from ppod_services.core.command import ServiceCommand
from ppod_services.reference.config import ReferenceServiceConfig
from ppod_services.reference.service import ReferenceService

if __name__ == "__main__":
    ServiceCommand(
        "reference",
        "Computes the logprobs of response tokens; takes new weights on its admin port.",
        ReferenceServiceConfig,
        ReferenceService,
    ).main()
