"""Settings of the whole test suite: deterministic property tests by default, depth on demand.

`HYPOTHESIS_PROFILE=deep pytest …` searches longer and with fresh seeds.
"""

import os

import hypothesis

hypothesis.settings.register_profile("default", derandomize=True, max_examples=60, deadline=None)
hypothesis.settings.register_profile("deep", derandomize=False, max_examples=3000, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))
