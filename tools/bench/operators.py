"""Common names for the operators of every engine, as in the paper's figure 6 (Naumov et al. 2019).

A profile's key (`spec.backend.Model.profile`) is a path such as "embedding/aten.index_select" or
"SparseLengthsSum/Gather". Its first element decides: one of `spec.backend.PARTS`, or a Caffe2 operator of the table
below. What neither knows is "other", and reports list those names: no time is lost.
"""

from collections.abc import Mapping

from spec.backend import PARTS

OTHER = "other"

TITLES = {
    "fc": "FC", "activation": "activation", "embedding": "SparseLengthsSum / EmbeddingBag",
    "interaction": "interaction", "loss": "loss", "optimizer": "optimizer", OTHER: OTHER,
}
"""In the order in which they are shown."""

CAFFE2 = {
    "fc": "FC FCGradient",
    "activation": "Relu ReluGradient ATen Sigmoid SigmoidGradient",  # ATen: see dlrm_caffe2/engine/faster.py
    "embedding": """SparseLengthsSum SparseLengthsMean SparseLengthsWeightedSum Gather
        SparseLengthsIndicesInGradientSumGradient SparseLengthsIndicesInGradientMeanGradient
        SparseLengthsIndicesInGradientWeightedSumGradient
        SparseLengthsIndicesInGradientWeightedSumWithMainInputGradient LengthsToRanges""",
    "interaction": "BatchMatMul Flatten FlattenGradient BatchGather BatchGatherGradient Concat Split Sum ResizeLike",
    "loss": """SquaredL2Distance SquaredL2DistanceGradient Scale AveragedLoss AveragedLossGradient Clip ClipGradient
        MakeTwoClass MakeTwoClassGradient FlattenToVec Cast LabelCrossEntropy LabelCrossEntropyGradient
        SigmoidCrossEntropyWithLogits SigmoidCrossEntropyWithLogitsGradient Mul MulGradient ConstantFill""",
    "optimizer": """WeightedSum ScatterWeightedSum Adagrad SparseAdagrad RowWiseSparseAdagrad Unique
        UnsortedSegmentSum""",
}
"""What each of Caffe2's operators is part of in our nets. Gather fetches pooling weights and one-hot rows, Sum adds the
two gradients of the bottom MLP's output, and the gradients of Concat are Splits. What `one_product` fills with zeros
counts as the loss."""

_PART = {name: part for part, names in CAFFE2.items() for name in names.split()}


def part_of_key(key: str) -> str:
    """One of TITLES."""
    first = key.partition("/")[0]
    return first if first in PARTS else _PART.get(first, OTHER)


def breakdown(seconds: Mapping[str, float]) -> dict[str, float]:
    """A profile by common name; every part is there, in the order of TITLES, and the sum is the profile's."""
    parts = dict.fromkeys(TITLES, 0.0)
    for key, value in seconds.items():
        parts[part_of_key(key)] += value
    return parts


def unmapped(seconds: Mapping[str, float]) -> list[str]:
    """The names behind "other", the slowest first."""
    return sorted((key for key in seconds if part_of_key(key) == OTHER), key=lambda key: -seconds[key])
