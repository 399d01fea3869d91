"""The evaluators without a training of their own are found by file name and built from a config."""

import pytest

from big_ssl.core.config import build_named
from big_ssl.core.types import Interval
from big_ssl.evals.base import Evaluator
from big_ssl.evals.class_mean import ClassMean
from big_ssl.evals.clustering import Clustering
from big_ssl.evals.copy_detection import CopyDetection
from big_ssl.evals.health import FeatureHealth
from big_ssl.evals.landmark_retrieval import LandmarkRetrieval
from big_ssl.evals.retrieval import ClassRetrieval
from big_ssl.evals.robustness import Robustness


@pytest.mark.parametrize(
  ("fields", "expected"),
  [
    ({"name": "class_mean", "output": "projection"}, ClassMean(output="projection")),
    ({"name": "clustering", "clusters": 7, "every": "3epochs"}, Clustering(clusters=7, every=Interval(3, "epochs"))),
    ({"name": "copy_detection", "copies": ["blur"]}, CopyDetection(copies=("blur",))),
    ({"name": "landmark_retrieval", "scales": [1, 0.5], "output": "gem"}, LandmarkRetrieval(scales=(1.0, 0.5), output="gem")),
    ({"name": "health", "t": 1.0}, FeatureHealth(t=1.0)),
    ({"name": "retrieval", "k": [1, 5]}, ClassRetrieval(k=(1, 5))),
    ({"name": "robustness", "label_map": [2, -1]}, Robustness(label_map=(2, -1))),
  ],
)
def test_evaluators_are_found_by_name_and_built_from_a_config(fields, expected):
  assert build_named("evals", fields, Evaluator, path=f"config.evals.{fields['name']}") == expected
