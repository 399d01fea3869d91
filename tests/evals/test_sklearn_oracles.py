"""k-NN and linear classifiers are those of scikit-learn, on features as networks give them and on CIFAR-10 itself."""

import os

import numpy as np
import pytest
from sklearn import linear_model, neighbors

from big_ssl.evals.base import Features, unit
from big_ssl.evals.knn import Knn
from big_ssl.evals.linear import LinearProbe
from big_ssl.evals.lowshot import LowShot, draw, fit_logistic, preprocess
from big_ssl.ops import knn


def realistic(split, *, output="pooled", weights="current", count=None):
  """Positive, skewed, correlated features of ten overlapping classes, as after a ReLU and a mean."""
  del output, weights
  world, rng = np.random.default_rng(0), np.random.default_rng([1, split == "train"])
  means, mixing = world.normal(size=(10, 12)), world.normal(size=(12, 32))
  count = count or {"train": 400, "eval": 250}[split]
  labels = rng.integers(0, 10, count).astype(np.int32)
  features = np.log1p(np.exp((means[labels] + 1.2 * rng.normal(size=(count, 12))) @ mixing / 2))
  return Features(features.astype(np.float32), labels, np.arange(count))


def weighted_vote(train, queries, *, k, temperature):
  """Predicted classes of scikit-learn's classifier, with the weights of the cosine."""
  model = neighbors.KNeighborsClassifier(
    n_neighbors=k, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / temperature)
  )
  # Class numbers as they are, so that of equal votes both take the lower.
  return model.fit(train.features.astype(np.float64), train.labels).predict(queries.features.astype(np.float64))


def logistic(x, labels, *, l2):
  model = linear_model.LogisticRegression(C=1 / l2, fit_intercept=False, tol=1e-10, max_iter=20_000)
  return model.fit(x, labels)


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (20, 0.07), (200, 0.1)])
def test_knn_predicts_as_scikit_learn(mesh8, k, temperature):
  train, queries = realistic("train"), realistic("eval")
  expected = weighted_vote(train, queries, k=k, temperature=temperature)
  for mesh in (None, mesh8):
    found = knn.nearest(unit(queries.features), bank=unit(train.features), k=k, mesh=mesh)
    vote = knn.votes(found, labels=train.labels, k=k, temperature=temperature, num_classes=10)
    np.testing.assert_array_equal(vote.argmax(1), expected)
  accuracy = Knn(k=k, temperature=temperature)(realistic).metrics[f"top1_k{k}"]
  assert accuracy == pytest.approx(100 * np.mean(expected == queries.labels), abs=1e-6)
  assert 20 < accuracy < 95, accuracy  # a task on which predictions can differ


def test_equal_neighbors_are_taken_by_index_as_a_stable_sort_takes_them():
  rng = np.random.default_rng(0)
  bank, queries = rng.integers(0, 2, (90, 4)).astype(np.float32), rng.integers(0, 2, (9, 4)).astype(np.float32)
  order = np.argsort(-(queries @ bank.T), axis=1, kind="stable")[:, :11]
  np.testing.assert_array_equal(knn.nearest(queries, bank=bank, k=11).index, order)
  distance = neighbors.NearestNeighbors(n_neighbors=11, algorithm="brute", metric=lambda a, b: 9 - a @ b)
  products = 9 - distance.fit(bank).kneighbors(queries)[0]
  np.testing.assert_allclose(knn.nearest(queries, bank=bank, k=11).similarity, products)


@pytest.mark.parametrize("l2", [1.0, 100.0])
def test_the_linear_probe_predicts_as_scikit_learn(l2):
  train, held_out = realistic("train"), realistic("eval")
  mean, std = train.features.mean(0), train.features.std(0) + 1e-6
  x, test = (np.append((f.features - mean) / std, np.ones((len(f.labels), 1)), axis=1) for f in (train, held_out))
  model = logistic(x, train.labels, l2=l2)
  found = fit_logistic(x, labels=train.labels, num_classes=10, l2=l2)
  np.testing.assert_array_equal(np.argmax(test @ found.weights, axis=1), model.predict(test))
  accuracy = LinearProbe(l2=(l2,))(realistic).metrics["top1"]
  assert accuracy == pytest.approx(100 * model.score(test, held_out.labels), abs=1e-6)
  assert 20 < accuracy < 95, accuracy


def test_low_shot_accuracy_is_that_of_scikit_learn():
  train, held_out = realistic("train"), realistic("eval")
  rows = draw(train, count=5, classes=np.arange(10), seed=(0, 5, 0))
  model = logistic(preprocess(train.features[rows]), train.labels[rows], l2=0.01)
  found = LowShot(images_per_class=5, splits=1, l2=0.01)(realistic).metrics["top1_5img"]
  assert found == pytest.approx(100 * model.score(preprocess(held_out.features), held_out.labels), abs=1e-6)


@pytest.fixture(scope="module")
def cifar():
  """Raw pixels of CIFAR-10 as `Extract` gives them: 2,000 training and 500 test images, standardized."""
  directory = os.environ.get("BIG_SSL_TFDS")
  if not directory:
    pytest.skip("BIG_SSL_TFDS=DIR: a folder that holds a prepared TFDS cifar10, from tfds build cifar10 --data_dir=DIR")
  import tensorflow_datasets as tfds

  parts = {"train": "train[:2000]", "eval": "test[:500]"}
  loaded = {
    k: tfds.as_numpy(tfds.load("cifar10", split=v, data_dir=directory, batch_size=-1)) for k, v in parts.items()
  }
  flat = {k: v["image"].reshape(len(v["image"]), -1)[:, ::6] / np.float32(255) for k, v in loaded.items()}
  mean, std = flat["train"].mean(0), flat["train"].std(0)
  made = {
    k: Features((flat[k] - mean) / std, v["label"].astype(np.int32), np.arange(len(flat[k]))) for k, v in loaded.items()
  }
  return lambda split, **_: made[split]


@pytest.mark.slow  # data: CIFAR-10 (Krizhevsky, 2009) as TFDS prepares it, in the folder that BIG_SSL_TFDS names
def test_knn_of_cifar10_pixels_predicts_as_scikit_learn(cifar):
  expected = weighted_vote(cifar("train"), cifar("eval"), k=20, temperature=0.07)
  found = Knn(k=20)(cifar).metrics["top1_k20"]
  assert found == pytest.approx(100 * np.mean(expected == cifar("eval").labels), abs=1e-6) and found > 20


@pytest.mark.slow  # data: as above
def test_linear_probe_of_cifar10_pixels_predicts_as_scikit_learn(cifar):
  train, held_out = cifar("train"), cifar("eval")
  found = LinearProbe(l2=(1000.0,))(cifar).metrics["top1"]
  mean, std = train.features.mean(0), train.features.std(0) + 1e-6
  x, test = (np.append((f.features - mean) / std, np.ones((len(f.labels), 1)), axis=1) for f in (train, held_out))
  model = logistic(x, train.labels, l2=1000.0)
  assert found == pytest.approx(100 * model.score(test, held_out.labels), abs=1e-6) and found > 20
