"""Definitions and inputs that an operator must refuse.

`here_only`: Caffe2 1.10 itself checks nothing there, and reads or writes outside a tensor, divides by zero, ignores
a part of an input, or supports what we do not. Those are never run on it.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from operator_source import Case, make_case


@dataclass(frozen=True)
class Refusal:
    why: str
    case: Case
    here_only: bool = False

    def __str__(self) -> str:
        return f"{self.case.definition.type}: {self.why}"


def f32(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


def i32(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def i64(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def refused(why: str, type: str, inputs: list[Any], outputs: int = 1, **arguments: Any) -> Refusal:
    return Refusal(why, make_case(type, inputs, outputs, **arguments))


def refused_here(why: str, type: str, inputs: list[Any], outputs: int = 1, **arguments: Any) -> Refusal:
    return Refusal(why, make_case(type, inputs, outputs, **arguments), here_only=True)


_DOUBLE = np.ones((2, 2))
_TABLE = f32(5, 2)
_BACK = "SparseLengthsIndicesInGradient{}Gradient".format

_DENSE = [
    refused("K of X and W differ", "FC", [f32(2, 3), f32(4, 2), f32(4)]),
    refused("N of W and b differ", "FC", [f32(2, 3), f32(4, 3), f32(5)]),
    refused("b is a matrix", "FC", [f32(2, 3), f32(4, 3), f32(4, 1)]),
    refused("X is a vector", "FC", [f32(3), f32(4, 3), f32(4)]),
    refused("float64", "FC", [_DOUBLE, f32(4, 2), f32(4)]),
    refused("axis is a float", "FC", [f32(2, 3), f32(4, 3), f32(4)], axis=1.0),
    refused("two inputs", "FC", [f32(2, 3), f32(4, 3)]),
    refused_here("an unknown argument", "FC", [f32(2, 3), f32(4, 3), f32(4)], axes=1),
    refused_here("K is 0", "FC", [f32(2, 0), f32(4, 0), f32(4)]),
    refused("K of X and W differ", "FCGradient", [f32(2, 3), f32(4, 2), f32(2, 4)], 3),
    refused("one output", "FCGradient", [f32(2, 3), f32(4, 3), f32(2, 4)]),
    refused_here("dY has fewer rows than X", "FCGradient", [f32(2, 3), f32(4, 3), f32(1, 4)], 3),
    refused("K differs", "BatchMatMul", [f32(2, 3, 4), f32(2, 3, 5)]),
    refused("batches differ", "BatchMatMul", [f32(2, 3, 4), f32(3, 4, 5)]),
    refused("ranks differ", "BatchMatMul", [f32(2, 3, 4), f32(4, 5)]),
    refused_here("vectors", "BatchMatMul", [f32(4), f32(4)]),
    *(refused("float64", type, [_DOUBLE]) for type in ("Relu", "Sigmoid", "Clip", "AveragedLoss", "MakeTwoClass")),
    *(refused("shapes differ", type, [f32(3, 2), f32(6)]) for type in ("ReluGradient", "SigmoidGradient")),
]

_LOOKUP = [
    *(refused(why, type, [table, *([f32(len(indices))] if "Weighted" in type else []), indices, lengths])
      for type in ("SparseLengthsSum", "SparseLengthsMean", "SparseLengthsWeightedSum")
      for why, table, indices, lengths in [
          ("index above the table", _TABLE, i64(0, 5), i32(2)),
          ("negative index", _TABLE, i64(0, -1), i32(2)),
          ("lengths add up to less", _TABLE, i64(0, 1, 2), i32(1, 1)),
          ("lengths add up to more", _TABLE, i64(0, 1), i32(2, 1)),
          ("a negative length", _TABLE, i64(0, 1, 4), i32(3, -1, 1)),
          ("int64 lengths", _TABLE, i64(0, 1), i64(2)),
          ("float indices", _TABLE, f32(2), i32(2)),
          ("int16 indices", _TABLE, i64(0, 1).astype(np.int16), i32(2)),
          ("a matrix of lengths", _TABLE, i64(0, 1), i32(2).reshape(1, 1)),
          ("a matrix of indices", _TABLE, i64(0, 1).reshape(2, 1), i32(2)),
          ("rows without elements", f32(5, 0), i64(0, 1), i32(2)),
          ("a table of float64", _TABLE.astype(np.float64), i64(0, 1), i32(2)),
      ]),
    refused_here("a bag of another size", "SparseLengthsSum", [_TABLE, i64(0, 1), i32(2, 0)], fixed_lookups=1),
    refused("too many weights", "SparseLengthsWeightedSum", [_TABLE, f32(3), i64(0, 1), i32(2)]),
    refused("a matrix of weights", "SparseLengthsWeightedSum", [_TABLE, f32(2, 1), i64(0, 1), i32(2)]),
    refused("weights of float64", "SparseLengthsWeightedSum", [_TABLE, np.ones(2), i64(0, 1), i32(2)]),
    refused_here("a table of float16", "SparseLengthsSum", [_TABLE.astype(np.float16), i64(0, 1), i32(2)]),
    refused_here("a table of rank 0", "SparseLengthsSum", [np.float32(1), i64(0), i32(1)]),
    *(refused(why, _BACK(kind), [dy, lengths, indices])
      for kind in ("Sum", "Mean")
      for why, dy, lengths, indices in [
          ("dY has more rows than bags", f32(3, 2), i32(2, 1), i64(0, 1, 2)),
          ("int64 lengths", f32(2, 2), i64(2, 1), i64(0, 1, 2)),
          ("a negative length", f32(2, 2), i32(2, -1), i64(0)),
          ("float64", _DOUBLE, i32(2, 1), i64(0, 1, 2)),
      ]),
    refused_here("lengths do not add up", _BACK("Sum"), [f32(2, 2), i32(2, 1), i64(0, 1)]),
    refused_here("lengths do not add up", _BACK("Mean"), [f32(2, 2), i32(2, 1), i64(0, 1)]),
    refused("too few weights", _BACK("WeightedSum"), [f32(2), f32(2, 2), i32(2, 1), i64(0, 1, 2)]),
    refused_here("too few weights", _BACK("WeightedSumWithMainInput"),
                 [f32(2), f32(2, 2), i32(2, 1), _TABLE, i64(0, 1, 2)], 2),
    refused_here("index above the table", _BACK("WeightedSumWithMainInput"),
                 [f32(3), f32(2, 2), i32(2, 1), _TABLE, i64(0, 1, 5)], 2),
    refused_here("rows of dY and the table differ", _BACK("WeightedSumWithMainInput"),
                 [f32(3), f32(2, 3), i32(2, 1), _TABLE, i64(0, 1, 2)], 2),
    refused("index above the data", "Gather", [_TABLE, i64(0, 5)]),
    refused("index below -N", "Gather", [_TABLE, i64(0, -6)]),
    refused("float indices", "Gather", [_TABLE, f32(2)]),
    refused("data of rank 0", "Gather", [np.float32(1), i64(0)]),
    refused("negative index", "BatchGather", [_TABLE, i64(-1)]),
    refused("index above the columns", "BatchGather", [_TABLE, i64(2)]),
    refused("a vector of data", "BatchGather", [f32(3), i64(0)]),
    refused("index above the columns", "BatchGatherGradient", [f32(2, 3), i64(0, 3), f32(2, 2)]),
    refused("negative index", "BatchGatherGradient", [f32(2, 3), i64(0, -1), f32(2, 2)]),
    refused("float64", "BatchGatherGradient", [_DOUBLE, i64(0), np.ones((2, 1))]),
    refused_here("dY is too short", "BatchGatherGradient", [f32(2, 3), i64(0, 1, 1), f32(2, 2)]),
]

_SHAPE = [
    refused("dtypes differ", "Concat", [f32(2, 2), _DOUBLE], 2, axis=1),
    refused("another dimension differs", "Concat", [f32(2, 3), f32(3, 3)], 2, axis=1),
    refused("axis outside", "Concat", [f32(2, 3), f32(2, 3)], 2, axis=2),
    refused("one output", "Concat", [f32(2, 3)], 1, axis=1),
    refused("an axis and an order", "Concat", [f32(2, 3), f32(2, 3)], 2, axis=1, order="NCHW"),
    refused("order NHWC", "Concat", [f32(2, 3), f32(2, 3)], 2, order="NHWC"),
    refused("vectors, default axis", "Concat", [f32(2), f32(3)], 2),
    refused("shapes differ, new axis", "Concat", [f32(2, 3), f32(2, 4)], 2, axis=1, add_axis=1),
    refused_here("ranks differ", "Concat", [f32(2, 3), f32(2)], 2, axis=1),
    refused("not divisible", "Split", [f32(2, 3)], 2, axis=1),
    refused("lengths do not add up", "Split", [f32(2, 4), i32(1, 2)], 2, axis=1),
    refused("as many lengths as pieces", "Split", [f32(2, 4), i32(1, 1, 2)], 2, axis=1),
    refused("a negative length", "Split", [f32(2, 4), i32(-1, 5)], 2, axis=1),
    refused("int64 lengths", "Split", [f32(2, 4), i64(1, 3)], 2, axis=1),
    refused("lengths twice", "Split", [f32(2, 4), i32(1, 3)], 2, axis=1, split=[1, 3]),
    refused("argument does not add up", "Split", [f32(2, 4)], 2, axis=1, split=[1, 2]),
    refused("axis outside", "Split", [f32(2, 4)], 2, axis=2),
    refused("more than the pieces", "Split", [f32(2, 4, 3)], 2, axis=1, add_axis=1),
    refused("axis above the rank", "Flatten", [f32(2, 3)], axis=3),
    refused("negative axis", "Flatten", [f32(2, 3)], axis=-1),
    refused("rank 0", "FlattenToVec", [np.float32(1)]),
    refused("sizes differ", "ResizeLike", [f32(5), f32(2, 3)]),
    refused("unknown data type", "Cast", [f32(2)], to=99),
    refused("to float16", "Cast", [f32(2)], to=12),
    refused("from float16", "Cast", [f32(2).astype(np.float16)], to=1),
    refused_here("no target", "Cast", [f32(2)]),
    refused("dtypes differ", "Sum", [f32(2, 2), _DOUBLE]),
    refused("shapes differ", "Sum", [f32(2, 1), f32(2)]),
    refused("bool", "Sum", [np.array([True])]),
    refused("int32", "Scale", [i32(2)], scale=2.0),
    refused("scale is a whole number", "Scale", [f32(2)], scale=2),
]

_P = np.full((2, 2), 0.5, np.float32)
_LOSS = [
    refused("last dimension is not 2", "MakeTwoClassGradient", [f32(2, 3)]),
    refused("label above the classes", "LabelCrossEntropy", [_P, i32(0, 2)]),
    refused("negative label", "LabelCrossEntropy", [_P, i32(0, -1)]),
    refused("int64 label", "LabelCrossEntropy", [_P, i64(0, 1)]),
    refused("too few labels", "LabelCrossEntropy", [_P, i32(0)]),
    refused("a matrix of labels", "LabelCrossEntropy", [_P, i32(0, 1, 0, 1).reshape(2, 2)]),
    refused("dY is a matrix", "LabelCrossEntropyGradient", [_P, i32(0, 1), f32(2, 1)]),
    refused("dY is too short", "LabelCrossEntropyGradient", [_P, i32(0, 1), f32(1)]),
    refused_here("label above the classes", "LabelCrossEntropyGradient", [_P, i32(0, 2), f32(2)]),
    refused("shapes differ", "SigmoidCrossEntropyWithLogits", [f32(2, 3), f32(3, 2)]),
    refused_here("an empty last dimension", "SigmoidCrossEntropyWithLogits", [f32(2, 0), f32(2, 0)]),
    refused("dY is too short", "SigmoidCrossEntropyWithLogitsGradient", [f32(2), f32(3, 2), f32(3, 2)]),
    refused("shapes differ", "SquaredL2Distance", [f32(3, 2), f32(3, 3)]),
    refused("ranks differ", "SquaredL2Distance", [f32(3, 1), f32(3)]),
    refused_here("rank 0", "SquaredL2Distance", [np.float32(1), np.float32(1)]),
    refused("dZ is a matrix", "SquaredL2DistanceGradient", [f32(3, 2), f32(3, 2), f32(3, 1)], 2),
    refused("dZ is too short", "SquaredL2DistanceGradient", [f32(3, 2), f32(3, 2), f32(2)], 2),
    refused("sizes differ", "ClipGradient", [f32(3, 2), f32(5)]),
    refused("cannot broadcast", "Mul", [f32(3, 4), f32(3)]),
    refused("dtypes differ", "Mul", [f32(2), i64(3, 4)]),
    refused_here("dC is too short", "MulGradient", [f32(2), f32(3), f32(3)], 2),
    refused_here("dY has two elements", "AveragedLossGradient", [f32(3), f32(2)]),
]

_FILL = [
    refused("float32 with a whole number", "ConstantFill", [], shape=[2], value=3, dtype=1),
    refused("int64 with a float", "ConstantFill", [], shape=[2], value=3.0, dtype=10),
    refused("an input and a shape", "ConstantFill", [f32(2)], shape=[2], value=3.0),
    refused("a negative length", "ConstantFill", [], shape=[-1], value=3.0),
    refused("float16", "ConstantFill", [], shape=[2], value=3.0, dtype=12),
    refused("too few values", "GivenTensorFill", [], shape=[3], values=[1.0, 2.0]),
    refused("no values", "GivenTensorFill", [], shape=[0]),
    refused("whole numbers", "GivenTensorFill", [], shape=[2], values=[1, 2]),
    refused("floats", "GivenTensorInt64Fill", [], shape=[2], values=[1.0, 2.0]),
    refused("a value above int32", "GivenTensorIntFill", [], shape=[1], values=[2**40]),
]

_LR = f32(1)
_OPTIMIZER = [
    refused("sizes differ", "WeightedSum", [f32(2, 2), _LR, f32(3), _LR]),
    refused("a weight of two elements", "WeightedSum", [f32(2), f32(2), f32(2), _LR]),
    refused("no weight for the last", "WeightedSum", [f32(2), _LR, f32(2)]),
    refused("float64", "WeightedSum", [_DOUBLE, _LR, _DOUBLE, _LR]),
    refused("fewer rows than indices", "ScatterWeightedSum", [_TABLE, _LR, i64(0, 0, 1), f32(2, 2), _LR]),
    refused("a weight of two elements", "ScatterWeightedSum", [_TABLE, _LR, i64(0), f32(1, 2), f32(2)]),
    refused_here("index above the table", "ScatterWeightedSum", [_TABLE, _LR, i64(0, 5), f32(2, 2), _LR]),
    refused_here("negative index", "ScatterWeightedSum", [_TABLE, _LR, i64(0, -1), f32(2, 2), _LR]),
    refused("a matrix", "Unique", [i64(1, 2).reshape(1, 2)], 2),
    refused("floats", "Unique", [f32(2)], 2),
    refused("id above num_segments", "UnsortedSegmentSum", [f32(3, 2), i32(2, 0, 2)], num_segments=2),
    refused("negative id", "UnsortedSegmentSum", [f32(3, 2), i32(2, 0, -2)]),
    refused("int64 ids", "UnsortedSegmentSum", [f32(3, 2), i64(2, 0, 2)]),
    refused("fewer ids than rows", "UnsortedSegmentSum", [f32(3, 2), i32(2, 0)]),
    refused("moment of another size", "Adagrad", [_TABLE, f32(4), _TABLE, _LR], 2),
    refused("gradient of another size", "Adagrad", [_TABLE, _TABLE, f32(4), _LR], 2),
    refused("epsilon is a whole number", "Adagrad", [_TABLE, _TABLE, _TABLE, _LR], 2, epsilon=1),
    refused_here("no learning rate", "Adagrad", [_TABLE, _TABLE, _TABLE, f32(0)], 2),
    *(refused(why, type, [_TABLE, moment, indices, gradient, rate], 2)
      for type, moment in (("SparseAdagrad", f32(5, 2)), ("RowWiseSparseAdagrad", f32(5)))
      for why, indices, gradient, rate in [
          ("index above the table", i64(0, 5), f32(2, 2), _LR),
          ("rows of another size", i64(0, 1), f32(2, 3), _LR),
          ("rows do not fit the indices", i64(0, 1, 1), f32(2, 2), _LR),
          ("two learning rates", i64(0, 1), f32(2, 2), f32(2)),
      ]),
    refused_here("negative index", "SparseAdagrad", [_TABLE, _TABLE, i64(0, -1), f32(2, 2), _LR], 2),
    refused_here("negative index", "RowWiseSparseAdagrad", [_TABLE, f32(5), i64(0, -1), f32(2, 2), _LR], 2),
    refused("moment of another size", "SparseAdagrad", [_TABLE, f32(5), i64(0), f32(1, 2), _LR], 2),
    refused("a decay", "SparseAdagrad", [_TABLE, _TABLE, i64(0), f32(1, 2), _LR], 2, decay=0.5),
    refused("moment of another size", "RowWiseSparseAdagrad", [_TABLE, f32(5, 2), i64(0), f32(1, 2), _LR], 2),
    refused("two elements", "Iter", [i64(4, 5)]),
    refused_here("int32", "Iter", [i32(4)]),
    refused("int32", "LearningRate", [i32(4)], base_lr=-0.1, policy="fixed"),
    refused("no base_lr", "LearningRate", [i64(4)], policy="fixed"),
    refused("no policy", "LearningRate", [i64(4)], base_lr=-0.1),
    refused("unknown policy", "LearningRate", [i64(4)], base_lr=-0.1, policy="nope"),
    refused_here("another policy", "LearningRate", [i64(4)], base_lr=-0.1, policy="step"),
]

REFUSALS = [*_DENSE, *_LOOKUP, *_SHAPE, *_LOSS, *_FILL, *_OPTIMIZER]
