"""`python -m ppod_services.reward --config FILE`."""

from ppod_services.core.command import ServiceCommand
from ppod_services.reward.config import RewardServiceConfig
from ppod_services.reward.service import RewardService

if __name__ == "__main__":
    ServiceCommand(
        "reward",
        "Scores token sequences or texts with one or more reward models.",
        RewardServiceConfig,
        RewardService,
    ).main()
