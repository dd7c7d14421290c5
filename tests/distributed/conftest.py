"""What tests of several ranks share."""

import pytest


@pytest.fixture(scope="session")
def engine() -> None:
    """DeepSpeed, imported before ranks are forked: each would take seconds for it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        import deepspeed.ops  # noqa: F401
