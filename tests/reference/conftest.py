"""Models for the reference's tests: random ones made anew, and one trained setup a session."""

import pytest
import torch

import reference_impl
from reference_impl import setup


@pytest.fixture(autouse=True)
def one_thread():
    """More threads than one only get into each other's way at these sizes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def models():
    """Four models with random weights; the policy has moved a little from the reference."""
    made = setup.build_models(0, trained=False)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in made.policy.parameters():
            weight += 0.01 * torch.randn(weight.shape, generator=generator)
    return made


@pytest.fixture(scope="session")
def trained():
    """The healthy setup. Tests must not change its models."""
    return reference_impl.build_setup(0)
