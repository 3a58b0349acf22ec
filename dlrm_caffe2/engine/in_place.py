"""Whether ONNX Runtime may be given one memory for a table and for what a ScatterND makes of it.

It then writes the rows and copies nothing. No documentation promises so, hence the trial.
"""

from functools import cache

import numpy as np

_TRIAL = """
    <ir_version: 8, opset_import: ["": 18]>
    trial (float[N, W] table, int64[K] rows, float[W] step) => (float[N, W] updated) {
        axis = Constant<value_ints = [1]>()
        old = Gather(table, rows)
        new = Add(old, step)
        places = Unsqueeze(rows, axis)
        updated = ScatterND(table, places, new)
    }
"""


@cache
def updates_in_place(threads: int) -> bool:
    """Tries it, once in a process."""
    import onnxruntime
    from onnx import parser

    table = np.arange(2**18, dtype=np.float32).reshape(-1, 64)
    rows, step = np.arange(0, len(table), 3)[::-1].copy(), np.ones(64, np.float32)
    expected = table.copy()
    expected[rows] += 2 * step
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(parser.parse_model(_TRIAL).SerializeToString(), options,
                                           providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    shared = onnxruntime.OrtValue.ortvalue_from_numpy(table)
    binding.bind_ortvalue_input("table", shared)
    for name, array in {"rows": rows, "step": step}.items():
        binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(array))
    binding.bind_ortvalue_output("updated", shared)
    try:
        for _ in range(2):
            session.run_with_iobinding(binding)
    except Exception:  # ONNX Runtime's errors have no common class; a version that refuses does not do it either
        return False
    return np.array_equal(table, expected)
