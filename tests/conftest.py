"""What holds for all tests."""

import os

from hypothesis import HealthCheck, settings

# On a busy machine a slow example says nothing about the code. The suite tries the same examples each time, so that it
# passes or fails for everybody alike; a long run (`make fuzz`) tries others.
settings.register_profile(
    "kamado",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize="KAMADO_FUZZ_SECONDS" not in os.environ,
)
settings.load_profile("kamado")
