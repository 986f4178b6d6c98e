"""What the layers of an attached model compute, and how alike they are: pure functions on tensors, no drawing.

`extract_features` gives the layers, `distance_matrix`, `cosine_matrix` and `cka_matrix` compare them, and
`feature_reuse` is one number for the whole model. `lesions` tells what each branch is worth. `spiral` and `grid` are
the paper's probe.
"""

from rdp.analysis.features import extract_features
from rdp.analysis.lesions import Lesion, Lesions, lesions
from rdp.analysis.reuse import FeatureReuse, feature_reuse
from rdp.analysis.similarity import MinibatchCKA, cka_matrix, cosine_matrix, distance_matrix, linear_cka
from rdp.analysis.spiral import grid, spiral

__all__ = [
    "FeatureReuse",
    "Lesion",
    "Lesions",
    "MinibatchCKA",
    "cka_matrix",
    "cosine_matrix",
    "distance_matrix",
    "extract_features",
    "feature_reuse",
    "grid",
    "lesions",
    "linear_cka",
    "spiral",
]
