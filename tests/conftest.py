"""Fixtures that several test modules share."""

import pytest


@pytest.fixture(scope="session")
def _caffe2_worker():
    """One worker for the session, since starting it takes half a second."""
    from dlrm_caffe2.engine.caffe2 import Caffe2Engine
    from dlrm_caffe2.engine.install import availability

    state = availability()
    if not state.ok:
        pytest.skip(f"{state.reason}; {state.remedy}")
    engine = Caffe2Engine()
    yield engine
    engine.close()


@pytest.fixture
def caffe2_engine(_caffe2_worker):
    """Genuine Caffe2 with an empty workspace; skips where it is not installed. Mark such tests `engine`."""
    _caffe2_worker.reset()
    return _caffe2_worker
