"""Hypothesis profiles, chosen by the environment variable `HYPOTHESIS_PROFILE`; two threads at most per process."""

import os

import torch
from hypothesis import HealthCheck, Phase, settings

common = settings(
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
# The same examples in every run, so that a failure is a change of the code; `thorough` looks for new ones.
settings.register_profile("default", common, max_examples=200, derandomize=True)
settings.register_profile("quick", common, max_examples=25, derandomize=True)
settings.register_profile("thorough", common, max_examples=2000)
# For mutation testing, where a failing example need not be made smaller.
settings.register_profile("mutation", settings.get_profile("quick"), phases=[Phase.explicit, Phase.generate])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

torch.set_num_threads(1)  # the models of the laws are tiny: threads only cost
