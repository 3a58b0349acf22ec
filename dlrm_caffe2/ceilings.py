"""How fast genuine Caffe2's libraries multiply and gather: the entry point `caffe2` of the group `dlrm.ceilings`."""

from collections.abc import Callable

import numpy as np

from dlrm_caffe2.engine.blas import MKL, current_settings
from dlrm_caffe2.engine.caffe2 import Caffe2Engine
from dlrm_caffe2.net import make_operator
from dlrm_caffe2.proto.caffe2_pb2 import NetDef

BAG = 50


def kernels(gemm: tuple[int, int, int], rows: int, width: int, lookups: int,
            ) -> tuple[str, Callable[[], object], Callable[[], object]]:
    """The library, one multiplication [m, k] by [k, n] for gemm (m, n, k), and one lookup of so many rows.

    Raises EngineError where genuine Caffe2 is not installed.
    """
    m, n, k = gemm
    engine = Caffe2Engine()
    engine.feed({
        "a": np.ones((m, k), np.float32), "b": np.ones((k, n), np.float32), "table": np.ones((rows, width), np.float32),
        "indices": np.random.default_rng(0).integers(0, rows, lookups // BAG * BAG),
        "lengths": np.full(lookups // BAG, BAG, np.int32)})
    nets = {"multiply": make_operator("MatMul", ["a", "b"], ["c"]),
            "gather": make_operator("SparseLengthsSum", ["table", "indices", "lengths"], ["pooled"])}
    for name, operator in nets.items():
        engine.create(NetDef(name=name, op=[operator]))
    settings = ", ".join(f"{setting.variable}={setting.value}" for setting in current_settings())
    return f"{MKL} ({settings})", lambda: engine.run("multiply", {}), lambda: engine.run("gather", {})
