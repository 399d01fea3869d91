"""Nearest neighbors: reference votes, ties, chunks and shards."""

import pathlib

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from big_ssl.ops import knn

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / "goldens" / "dino_knn.npz")


def mesh_of(data, fsdp, tensor=1):
  devices = jax.devices()[: data * fsdp * tensor]
  return jax.make_mesh(
    (data, fsdp, tensor), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3, devices=devices
  )


@pytest.mark.parametrize("k", [int(k) for k in GOLDEN["ks"]])
def test_predictions_votes_and_accuracies_match_the_reference(k):
  temperature, labels = float(GOLDEN["T"]), GOLDEN["test_labels"]
  found = knn.nearest(GOLDEN["test_features"], bank=GOLDEN["train_features"], k=20, bank_chunk=70, query_chunk=50)
  vote = knn.votes(
    found, labels=GOLDEN["train_labels"], k=k, temperature=temperature, num_classes=int(GOLDEN["num_classes"])
  )
  np.testing.assert_array_equal(vote.argmax(1), GOLDEN[f"k{k}/pred"])
  np.testing.assert_allclose(vote * np.exp(found.similarity[:, :1] / temperature), GOLDEN[f"k{k}/votes"], rtol=1e-5)
  assert knn.top_k_accuracy(vote, labels=labels, k=1) == pytest.approx(float(GOLDEN[f"k{k}/top1"]), abs=1e-4)
  assert knn.top_k_accuracy(vote, labels=labels, k=5) == pytest.approx(float(GOLDEN[f"k{k}/top5_strict"]), abs=1e-4)


@pytest.mark.parametrize("chunks", [(1, 1), (7, 5), (300, 120), (1000, 1000)])
def test_chunk_sizes_change_nothing(chunks):
  bank, queries = GOLDEN["train_features"], GOLDEN["test_features"]
  expected = np.argsort(-(queries.astype(np.float64) @ bank.T.astype(np.float64)), axis=1, kind="stable")[:, :9]
  if chunks == (1, 1):
    bank, queries = bank[:12], queries[:3]
    expected = np.argsort(-(queries.astype(np.float64) @ bank.T.astype(np.float64)), axis=1, kind="stable")[:, :9]
  found = knn.nearest(queries, bank=bank, k=9, bank_chunk=chunks[0], query_chunk=chunks[1])
  np.testing.assert_array_equal(found.index, expected)


@pytest.mark.parametrize("shape", [(8, 1), (2, 2, 2), (3, 1)])
def test_a_bank_spread_over_devices_gives_the_same_neighbors_and_ties_go_to_the_lower_index(shape):
  rng = np.random.default_rng(0)
  bank = rng.integers(-1, 2, (101, 3)).astype(np.float32)  # many exact ties
  queries = rng.integers(-1, 2, (10, 3)).astype(np.float32)
  expected = np.argsort(-(queries @ bank.T), axis=1, kind="stable")[:, :30]
  for mesh in (None, mesh_of(*shape)):
    found = knn.nearest(queries, bank=bank, k=30, mesh=mesh, bank_chunk=4, query_chunk=6)
    np.testing.assert_array_equal(found.index, expected)
    np.testing.assert_array_equal(found.similarity, np.take_along_axis(queries @ bank.T, expected, axis=1))


def test_k_may_be_the_whole_bank_and_no_more():
  bank = np.eye(5, dtype=np.float32)
  assert sorted(knn.nearest(bank[:1], bank=bank, k=5, mesh=mesh_of(8, 1)).index[0]) == [0, 1, 2, 3, 4]
  with pytest.raises(ValueError, match="k=6 of 5"):
    knn.nearest(bank[:1], bank=bank, k=6)
  assert knn.nearest(bank[:0], bank=bank, k=2).index.shape == (0, 2)


def test_a_tiny_temperature_votes_with_the_nearest_and_does_not_overflow():
  found = knn.Neighbors(np.array([[0.1, -0.8, -0.8]], np.float32), np.array([[0, 1, 2]]))
  vote = knn.votes(found, labels=np.array([2, 1, 1]), k=3, temperature=1e-3, num_classes=3)
  assert np.isfinite(vote).all() and vote.argmax() == 2
  wide = knn.votes(found, labels=np.array([2, 1, 1]), k=3, temperature=10.0, num_classes=3)
  assert wide.argmax() == 1


def test_top_five_does_not_credit_a_class_without_a_vote():
  vote = np.array([[3.0, 0.0, 0.0], [0.0, 1.0, 2.0]])
  assert knn.top_k_accuracy(vote, labels=np.array([1, 1]), k=5) == 50.0


def test_neighbors_and_votes_of_npid_are_the_recorded_ones(golden):
  z = golden("npid_knn")
  queries = z["test_features"] / np.linalg.norm(z["test_features"], axis=1, keepdims=True)
  found = knn.nearest(queries, bank=z["train_features"], k=10)
  np.testing.assert_array_equal(found.index, z["neighbours"])
  np.testing.assert_allclose(found.similarity, z["similarities"], atol=1e-5)
  vote = knn.votes(found, labels=z["train_labels"], k=10, temperature=0.07, num_classes=5)
  np.testing.assert_allclose(vote * np.exp(found.similarity[:, :1].astype(float) / 0.07), z["scores"], rtol=1e-4)
  np.testing.assert_array_equal(vote.argmax(1), z["predictions"])


@pytest.mark.parametrize("width,k", [(1024, 3), (2048, 7), (4096, 20), (1000, 3)])
def test_the_grouped_search_of_wide_rows_is_top_k_also_among_ties(width, k):
  rng = np.random.default_rng(width)
  x = rng.integers(0, 9, (5, width)).astype(np.float32)
  x[0], x[1, : width - 2], x[2] = 1.0, -np.inf, np.arange(width)
  best, index = jax.jit(knn._top, static_argnames="k")(x, k=k)
  expected = np.argsort(-x, axis=1, kind="stable")[:, :k]
  np.testing.assert_array_equal(index, expected)
  np.testing.assert_array_equal(best, np.take_along_axis(x, expected, axis=1))


@pytest.mark.parametrize("devices", [1, 8])
def test_the_plan_bounds_what_the_compiled_search_takes(devices):
  mesh = mesh_of(devices, 1)
  found = knn.plan(100, bank=9000, dim=16, k=5, devices=devices, bank_chunk=1024, query_chunk=64)
  shapes = [(64, 16), (found.rows * devices, 16)]
  args = [jax.ShapeDtypeStruct(s, np.float32) for s in shapes] + [jax.ShapeDtypeStruct((), np.int32)]
  memory = knn._search.lower(*args, k=5, chunk=found.bank_chunk, mesh=mesh).compile().memory_analysis()
  if memory is None:
    pytest.skip("the backend does not tell")
  used = memory.temp_size_in_bytes + 4 * (found.rows + 64) * 16
  assert used <= found.bytes_per_device < 2.5 * used and found.rows * devices >= 9000


def test_votes_in_chunks_count_as_all_at_once():
  rng = np.random.default_rng(0)
  found = knn.nearest(rng.normal(size=(23, 4)), bank=rng.normal(size=(40, 4)), k=9)
  labels, query_labels = rng.integers(0, 7, 40), rng.integers(0, 7, 23)
  vote = knn.votes(found, labels=labels, k=9, temperature=0.1, num_classes=7)
  for chunk in (1, 5, 100):
    settings = {"k": 9, "temperature": 0.1, "num_classes": 7, "chunk": chunk}
    scores = knn.accuracies(found, labels=labels, query_labels=query_labels, **settings)
    for top, value in scores.items():
      assert value == pytest.approx(knn.top_k_accuracy(vote, labels=query_labels, k=top))
