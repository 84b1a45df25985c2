"""Settings for all tests: one thread a process, so that workers side by side do not slow one another down."""

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("flexlora", deadline=None, derandomize=True)
settings.load_profile("flexlora")
