"""What holds for all unit tests."""

from __future__ import annotations

import hypothesis

# Examples are judged by what they show, not by how busy the machine is.
hypothesis.settings.register_profile("ppod", deadline=None)
hypothesis.settings.load_profile("ppod")
