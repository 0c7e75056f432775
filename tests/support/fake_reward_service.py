"""`python -m support.fake_reward_service --config FILE`: the reward service with scores known by arithmetic."""

import sys

from support import fake_reward_model

sys.modules["ppod_models.reward_model"] = fake_reward_model

from ppod_services.core.command import ServiceCommand  # noqa: E402
from ppod_services.reward.config import RewardServiceConfig  # noqa: E402
from ppod_services.reward.service import RewardService  # noqa: E402

if __name__ == "__main__":
    ServiceCommand("reward", "The reward service with arithmetic scores.", RewardServiceConfig, RewardService).main()
