"""For tests that parse overrides by the thousand: ml_collections writes the whole config as YAML, twice at every
parse_config, for a text that nobody reads; without that it takes a sixth of the time."""

import pytest
from ml_collections import ConfigDict


@pytest.fixture(scope="module", autouse=True)
def configs_are_not_written():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ConfigDict, "__str__", object.__repr__)
        yield
