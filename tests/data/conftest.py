"""The corpus of video files, rendered once for each process of the test session."""

import pytest
from corpus import Corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Real video files of many kinds, sound and damaged."""
    return Corpus(tmp_path_factory.mktemp("corpus"))
