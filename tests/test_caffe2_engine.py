"""Engine caffe2: values, errors, and that no worker outlives whoever uses it."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from dlrm_caffe2.engine import caffe2, protocol
from dlrm_caffe2.engine.caffe2 import Caffe2Engine
from dlrm_caffe2.net import make_operator
from dlrm_caffe2.proto.caffe2_pb2 import NetDef
from spec.errors import EngineError

pytestmark = pytest.mark.engine


def make_net(name, *operators, type=""):
    net = NetDef(name=name, type=type)
    net.op.extend(operators)
    return net


def relu():
    return make_net("relu", make_operator("Relu", ["x"], ["y"]))


def long_net(width=1024):
    """Runs for a minute or so unless it is cut short, and what it reads."""
    fc = make_operator("FC", ["x", "w", "b"], ["y"])
    zeros = np.zeros((width, width), np.float32)
    return make_net("long", *[fc] * 3000), {"x": zeros, "w": zeros, "b": zeros[0]}


def ended(pid, within):
    """Whether a process is gone, or a zombie that its new parent has not reaped, within so many seconds."""
    until = time.monotonic() + within
    while time.monotonic() < until:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.02)
    return False


@pytest.fixture
def engine(caffe2_engine):
    """An engine that the test may destroy; the shared one tells whether there is any."""
    own = Caffe2Engine()
    yield own
    own.close()


@pytest.mark.parametrize("dtype", protocol.DTYPES)
def test_blobs_come_back_as_they_went(caffe2_engine, dtype):
    values = np.arange(-6, 6).astype(dtype)
    arrays = {"matrix": values.reshape(3, 4), "scalar": values[0].reshape(()), "empty": values.reshape(3, 4)[:0],
              "no columns": values.reshape(3, 4)[:, :0], "strided": values.reshape(3, 4).T[::2],
              "big-endian": values.astype(values.dtype.newbyteorder(">")), "näme\n\"'": values}
    caffe2_engine.feed(arrays)
    back = caffe2_engine.fetch(tuple(arrays))
    assert list(back) == list(arrays)
    for name, array in arrays.items():
        assert back[name].dtype == np.dtype(dtype) and back[name].shape == array.shape
        np.testing.assert_array_equal(back[name], array, strict=name != "big-endian")


def test_arrays_that_do_not_fit_into_shared_memory_come_back_too(caffe2_engine):
    large = np.arange(caffe2.MEMORY // 4 + 1, dtype=np.float32)
    half = large[:len(large) // 2]
    arrays = {"half": half, "other half": -half, "no room": half[:100], "large": large, "small": half[:3]}
    caffe2_engine.feed(arrays)
    for name, array in caffe2_engine.fetch(tuple(arrays)).items():
        np.testing.assert_array_equal(array, arrays[name])


@pytest.mark.parametrize("dtype", ["uint32", "uint64", "complex64", "O", "U1", "M8[s]"])
def test_a_dtype_that_caffe2_lacks_is_refused_before_anything_is_fed(caffe2_engine, dtype):
    with pytest.raises(EngineError, match="blob 'bad': expected a dtype of float16"):
        caffe2_engine.feed({"good": np.zeros(2), "bad": np.zeros(2, dtype)})
    with pytest.raises(EngineError, match="blob: good"):
        caffe2_engine.fetch(["good"])


def test_kept_nets_and_nets_run_once(caffe2_engine):
    caffe2_engine.run_once(make_net("init", make_operator("ConstantFill", [], ["x"], shape=[2, 2], value=-1.5)))
    caffe2_engine.create(relu())
    assert not caffe2_engine.run("relu", {}, ["y"])["y"].any()
    for rows in (3, 0, 1):
        x = np.linspace(-1, 1, 4 * rows, dtype=np.float32).reshape(rows, 4)
        result = caffe2_engine.run("relu", {"x": x}, ["y", "x"])
        np.testing.assert_array_equal(result["y"], np.maximum(x, 0))
        np.testing.assert_array_equal(result["x"], x)
    assert caffe2_engine.run("relu", {}) == {}


def test_a_net_of_stages_is_kept_whole_or_not_at_all(caffe2_engine):
    net = NetDef(name="staged", type="dag", op=[
        make_operator("SparseLengthsSum", ["table", "rows", "lengths"], ["x"]),
        make_operator("FC", ["x", "w", "missing"], ["y"])])
    caffe2_engine.feed({"table": np.eye(2, dtype=np.float32), "rows": np.array([1]), "w": np.ones((3, 2), np.float32),
                        "lengths": np.array([1, 0], np.int32)})
    with pytest.raises(EngineError, match="missing"):
        caffe2_engine.create(net)
    with pytest.raises(EngineError, match="staged"):
        caffe2_engine.run("staged", {})
    caffe2_engine.feed({"missing": np.array([0, 1, 2], np.float32)})
    caffe2_engine.create(net)
    np.testing.assert_array_equal(caffe2_engine.run("staged", {}, ["y"])["y"], [[1, 2, 3], [0, 1, 2]])
    with pytest.raises(EngineError, match="staged"):
        caffe2_engine.create(net)
    assert set(caffe2_engine.profile("staged", {})) == {"SparseLengthsSum", "FC"}


def test_fetched_arrays_are_copies_that_can_be_written(caffe2_engine):
    caffe2_engine.feed({"x": np.ones(3, np.float32)})
    caffe2_engine.fetch(["x"])["x"][:] = 7
    np.testing.assert_array_equal(caffe2_engine.fetch(["x"])["x"], np.ones(3, np.float32))


def test_reset_drops_blobs_and_nets(caffe2_engine):
    caffe2_engine.feed({"x": np.ones(3, np.float32)})
    caffe2_engine.create(relu())
    caffe2_engine.reset()
    with pytest.raises(EngineError, match="blob: x"):
        caffe2_engine.fetch(["x"])
    caffe2_engine.feed({"x": np.ones(3, np.float32)})
    caffe2_engine.create(relu())


def test_description_says_what_runs(caffe2_engine):
    assert caffe2_engine.description.startswith("Caffe2 of PyTorch 1.10.2")
    assert "986 operators" in caffe2_engine.description
    assert caffe2_engine.description.endswith(f"cpu, {caffe2_engine.threads} threads")


def test_a_failing_operator_is_named_and_the_engine_goes_on(caffe2_engine):
    good = {"x": np.ones((2, 3), np.float32), "w": np.ones((4, 3), np.float32), "b": np.zeros(4, np.float32)}
    caffe2_engine.feed(good)
    caffe2_engine.create(make_net("fc", make_operator("FC", ["x", "w", "b"], ["y"], axis=1)))
    with pytest.raises(EngineError) as caught:
        caffe2_engine.run("fc", {"x": np.ones((2, 5), np.float32)}, ["y"])
    text = str(caught.value)
    assert "net 'fc'" in text and "K == W.numel() / N" in text and 'type: "FC"' in text
    assert "\n" not in text and "frame #" not in text
    np.testing.assert_array_equal(caffe2_engine.run("fc", good, ["y"])["y"], np.full((2, 4), 3, np.float32))


@pytest.mark.parametrize("net, message", [
    (make_net("n", make_operator("NoSuch", [], ["y"])), "Cannot create operator of type 'NoSuch'"),
    (make_net("n", make_operator("Relu", ["missing"], ["y"])), "non-existing input blob: missing"),
    (make_net("n", make_operator("Relu", [], ["y"])), "did not pass schema checking"),
    (make_net("n", make_operator("ThrowException", [], [])), "Exception from ThrowExceptionOp"),
    (make_net("n", make_operator("Fail", [], [])), "net 'n'"),
])
def test_nets_that_caffe2_refuses(caffe2_engine, net, message):
    with pytest.raises(EngineError, match=message):
        caffe2_engine.run_once(net)
    caffe2_engine.run_once(make_net("good", make_operator("ConstantFill", [], ["x"], shape=[1])))


def test_names_of_nets(caffe2_engine):
    with pytest.raises(EngineError, match="Can't find net absent"):
        caffe2_engine.run("absent", {})
    with pytest.raises(EngineError, match="Can't find net absent"):
        caffe2_engine.profile("absent", {})
    caffe2_engine.feed({"x": np.ones(3, np.float32)})
    caffe2_engine.create(relu())
    with pytest.raises(EngineError, match="refuse to overwrite an existing net"):
        caffe2_engine.create(relu())


def test_a_blob_without_a_tensor_cannot_be_fetched(caffe2_engine):
    caffe2_engine.feed({"x": np.ones(3, np.float32)})
    caffe2_engine.create(relu())
    with pytest.raises(EngineError, match="blob 'y' holds no tensor"):
        caffe2_engine.fetch(["y"])


@pytest.mark.parametrize("type", ["simple", "dag", "async_scheduling"])
def test_profile_is_one_run(caffe2_engine, type):
    caffe2_engine.feed({"x": np.ones((512, 512), np.float32), "b": np.zeros(512, np.float32),
                        "it": np.zeros(1, np.int64)})
    caffe2_engine.create(make_net(
        "net", make_operator("FC", ["x", "x", "b"], ["y"]), make_operator("Relu", ["y"], ["z"]),
        make_operator("Relu", ["z"], ["z"]), make_operator("Iter", ["it"], ["it"]), type=type))
    for runs in (1, 2):
        start = time.perf_counter()
        seconds = caffe2_engine.profile("net", {})
        assert sum(seconds.values()) < time.perf_counter() - start
        assert set(seconds) == {"FC", "Relu", "Iter"} and min(seconds.values()) > 0
        assert seconds["FC"] > seconds["Iter"]
        assert caffe2_engine.fetch(["it"])["it"] == runs
    assert caffe2_engine.run("net", {}, ["it"])["it"] == 3
    np.testing.assert_array_equal(caffe2_engine.fetch(["z"])["z"], np.full((512, 512), 512, np.float32))


def test_the_same_bits_in_every_run(caffe2_engine):
    generator = np.random.default_rng(0)
    x, w, d = (generator.standard_normal(shape, dtype=np.float32) for shape in [(203, 517), (301, 517), (203, 301)])
    feeds = {"x": x, "w": w, "b": np.zeros(301, np.float32), "d": d}
    net = make_net("net", make_operator("FC", ["x", "w", "b"], ["y"]),
                   make_operator("FCGradient", ["x", "w", "d"], ["w_grad", "b_grad", "x_grad"]))

    def run(engine):
        engine.feed(feeds)
        engine.create(net)
        return engine.run("net", {}, ["y", "w_grad", "b_grad", "x_grad"])

    settings = {setting.variable for setting in caffe2.current_settings()}
    first = run(caffe2_engine)
    gauge = np.abs(x).astype(float) @ np.abs(w).T.astype(float)
    assert (np.abs(first["y"] - x.astype(float) @ w.T.astype(float)) <= 518 * 2.0**-24 * gauge).all()
    threads = (1, 2) if "MKL_CBWR" in settings else (caffe2_engine.threads,)
    for count in threads:
        other = Caffe2Engine(threads=count)
        try:
            for name, array in run(other).items():
                np.testing.assert_array_equal(array, first[name], err_msg=f"{name}, {count} threads")
        finally:
            other.close()


def test_an_aborting_operator_is_an_error_and_leaves_no_process(engine):
    with pytest.raises(EngineError, match=r"net 'crash': no worker: it died of SIGABRT.*engine aten"):
        engine.run_once(make_net("crash", make_operator("Crash", [], [])))
    assert ended(engine.pid, 0.1)
    with pytest.raises(EngineError, match=r"no worker: it died of SIGABRT.*make a new one"):
        engine.fetch([])
    engine.close()


def test_kill_9_in_the_middle_of_a_net_is_noticed_at_once(engine):
    net, feeds = long_net()
    engine.feed(feeds)
    engine.create(net)
    killed = []

    def kill():
        killed.append(time.monotonic())
        os.kill(engine.pid, signal.SIGKILL)

    timer = threading.Timer(0.5, kill)
    timer.start()
    with pytest.raises(EngineError, match=r"net 'long': no worker: it died of SIGKILL \(killed from outside"):
        engine.run("long", {})
    assert time.monotonic() - killed[0] < 2
    timer.join()
    assert ended(engine.pid, 0.1)


def test_closing_in_the_middle_of_a_net(engine):
    net, feeds = long_net()
    engine.feed(feeds)
    engine.create(net)
    timer = threading.Timer(0.5, engine.close)
    timer.start()
    with pytest.raises(EngineError, match="it was closed"):
        engine.run("long", {})
    timer.join()
    assert ended(engine.pid, 0.1)
    engine.close()


def test_an_interrupted_request_ends_the_worker(engine):
    """Its reply, still to come, must not be taken for the next one's."""
    net, feeds = long_net()
    engine.feed(feeds)
    engine.create(net)
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        engine.run("long", {})
    timer.join()
    assert ended(engine.pid, 0.1)
    with pytest.raises(EngineError, match="it was interrupted; make a new one"):
        engine.fetch([])


def test_the_worker_leaves_interrupts_to_its_parent(engine):
    os.kill(engine.pid, signal.SIGINT)
    time.sleep(0.1)
    engine.feed({"x": np.zeros(1)})


def test_an_engine_that_is_forgotten_ends_its_worker(caffe2_engine):
    pid = Caffe2Engine().pid
    assert ended(pid, 1)


def test_requests_of_several_threads_do_not_mix(caffe2_engine):
    wrong = []

    def use(number):
        for _ in range(50):
            array = np.full(1000, number, np.int64)
            caffe2_engine.feed({f"x{number}": array})
            if not (caffe2_engine.fetch([f"x{number}"])[f"x{number}"] == number).all():
                wrong.append(number)

    threads = [threading.Thread(target=use, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


PARENT = """
import os, sys, time
sys.path.insert(0, {tests!r})
from test_caffe2_engine import Caffe2Engine, long_net
engine = Caffe2Engine()
net, feeds = long_net()
engine.feed(feeds)
engine.create(net)
if {fork} and os.fork() == 0:  # a child that holds the parent's end of the socket
    os.close(1)
    time.sleep(6)
    os._exit(0)
print(engine.pid, flush=True)
if {running}:
    engine.run("long", {{}})
time.sleep(60)
"""


@pytest.mark.parametrize("running", [False, True])
@pytest.mark.parametrize("fork", [False, True])
def test_no_worker_outlives_a_parent_killed_with_9(caffe2_engine, running, fork):
    code = PARENT.format(tests=str(Path(__file__).parent), fork=fork, running=running)
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        pid = int(parent.stdout.readline())
        time.sleep(0.3)
        assert not ended(pid, 0.1)
        parent.kill()
    assert ended(pid, 3)


def test_another_version_of_the_protocol_is_refused(caffe2_engine, tmp_path, monkeypatch):
    folder = Path(protocol.__file__).parent
    shutil.copy(folder / "worker.py", tmp_path)
    source = (folder / "protocol.py").read_text()
    (tmp_path / "protocol.py").write_text(source.replace(f"VERSION = {protocol.VERSION}", "VERSION = 99"))
    monkeypatch.setattr(caffe2, "WORKER", tmp_path / "worker.py")
    with pytest.raises(EngineError, match=f"expected protocol {protocol.VERSION} of its worker, found 99"):
        Caffe2Engine()


def test_a_net_of_several_workers_gets_one_for_each_thread():
    """With no number named, Caffe2 would take one for each core of the machine."""
    net = make_net("two", *(make_operator("Relu", ["x"], [name]) for name in ("a", "b")), type="dag")
    tasks = []
    for threads in (1, 4):
        engine = Caffe2Engine(threads)
        try:
            engine.feed({"x": np.ones(3, np.float32)})
            engine.create(net)
            np.testing.assert_array_equal(engine.run("two", {}, ["b"])["b"], np.ones(3, np.float32))
            tasks.append(len(list(Path(f"/proc/{engine.pid}/task").iterdir())))
        finally:
            engine.close()
    assert tasks[1] - tasks[0] == 3
    assert net.num_workers == 0, "the caller's own net stays as it was"
