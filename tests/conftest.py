"""Fixtures that several test modules share."""

import os
import signal

import old_onnxruntime
import pytest

from spec.threads import wait_without_spinning

wait_without_spinning()
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # started by a shell in the background: children would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_runtest_setup(item):
    """Tests marked `engine` skip without genuine Caffe2, those marked `oldest` without ONNX Runtime 1.16, and say so;
    where it is required, as in CI, they fail."""
    if item.get_closest_marker("oldest") and old_onnxruntime.missing():
        required = os.environ.get("DLRM_REQUIRE_OLD_ONNXRUNTIME")
        (pytest.fail if required else pytest.skip)(old_onnxruntime.missing())
    if item.get_closest_marker("engine"):
        from dlrm_caffe2.engine.venv import availability

        state = availability()
        if not state.ok:
            (pytest.fail if os.environ.get("DLRM_REQUIRE_CAFFE2") else pytest.skip)(f"{state.reason}; {state.remedy}")


@pytest.fixture(scope="session")
def _caffe2_worker():
    """One worker for the session, since starting it takes half a second."""
    from dlrm_caffe2.engine.caffe2 import Caffe2Engine

    engine = Caffe2Engine()
    yield engine
    engine.close()


@pytest.fixture
def caffe2_engine(_caffe2_worker):
    """Genuine Caffe2 with an empty workspace, for tests marked `engine`."""
    _caffe2_worker.reset()
    return _caffe2_worker
