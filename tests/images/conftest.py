"""Images that `make test-images` has built, a network and a volume for models."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest

from support.containers import must, podman

TAG_VARIABLE = "PPOD_IMAGES_TAG"


@pytest.fixture(scope="session")
def image() -> Callable[[str], str]:
    """Name of an image, which must be there."""
    tag = os.environ.get(TAG_VARIABLE)
    if tag is None:
        pytest.skip(f"{TAG_VARIABLE} is not set: `make test-images` builds the images and runs this")

    def find(name: str) -> str:
        found = f"localhost/ppod-{name}:{tag}"
        must(podman("image", "exists", found))
        return found

    return find


@pytest.fixture(scope="session")
def network() -> Iterator[str]:
    """A bridge of its own, where containers find each other by name."""
    name = f"ppod-test-{os.getpid()}"
    must(podman("network", "create", name))
    yield name
    must(podman("network", "rm", "--force", name))


@pytest.fixture(scope="session")
def models_volume() -> Iterator[str]:
    """Where containers keep their models: the packaged one is converted once for all of them."""
    name = f"ppod-test-models-{os.getpid()}"
    must(podman("volume", "create", name))
    yield name
    must(podman("volume", "rm", "--force", name))
