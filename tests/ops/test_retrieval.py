"""Retrieval scores and descriptors against recorded ones, and what they must not depend on."""

import numpy as np
import pytest

from big_ssl.ops import pca, retrieval


def unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def listed(indices, count):
  """[Q, n] numbers padded with -1 -> [Q, count] bool."""
  return np.array([np.isin(np.arange(count), row[row >= 0]) for row in indices])


@pytest.mark.parametrize("protocol", ["medium", "hard"])
def test_dino_retrieval_is_the_recorded_one(golden, protocol):
  z = golden("dino_retrieval_map")
  kinds = z["labels_0neg_1easy_2hard_3junk"]
  judged = retrieval.revisited(protocol, easy=kinds == 1, hard=kinds == 2, junk=kinds == 3)
  ks = tuple(int(k) for k in z["kappas"])
  found = retrieval.score(unit(z["queries"]) @ unit(z["database"]).T, judged=judged, ks=ks)
  expected = z["medium_aps" if protocol == "medium" else "hard_aps_minus1_if_no_positive"]
  np.testing.assert_allclose(np.nan_to_num(found.average_precision, nan=-1), expected, atol=1e-5)
  assert np.nanmean(found.average_precision) == pytest.approx(float(z[f"{protocol}_map"]), abs=1e-5)
  if protocol == "medium":
    np.testing.assert_allclose(np.nanmean(found.precision, axis=0), z["medium_mean_precision"], atol=1e-5)


@pytest.mark.parametrize("protocol", ["easy", "medium", "hard"])
def test_revisited_protocols_are_the_recorded_ones(golden, protocol):
  z = golden("segmentation_eval_retrieval_map")
  count = len(z["database"])
  judged = retrieval.revisited(protocol, **{k: listed(z[k], count) for k in ("easy", "hard", "junk")})
  found = retrieval.score(unit(z["queries"]) @ unit(z["database"]).T, judged=judged)
  np.testing.assert_allclose(np.nan_to_num(found.average_precision, nan=-1), z[f"ap_{protocol}"], atol=1e-5)
  assert np.nanmean(found.average_precision) == pytest.approx(float(z[f"map_{protocol}"]), abs=1e-5)
  np.testing.assert_allclose(np.nanmean(found.precision, axis=0), z[f"mp_at_1_5_10_{protocol}"], atol=1e-5)


def test_copy_descriptor_and_its_whitening_are_the_recorded_ones(golden):
  z = golden("dino_copy_descriptor")
  found = retrieval.copy_descriptor(z["tokens"][:, 0], patches=z["tokens"][:, 1:])
  np.testing.assert_allclose(found, z["descriptor"], atol=1e-5)
  white = pca.whiten(found, whitening=retrieval.fit_uncentered_whitening(z["whitening_set"]))
  np.testing.assert_allclose(white @ white.T, z["whitened_gram"], atol=1e-5)


def test_rmac_and_gem_are_the_recorded_ones(golden):
  z = golden("seer10b_eval_metrics")
  maps = z["rmac_features"].transpose(0, 2, 3, 1)
  np.testing.assert_array_equal(retrieval.rmac_regions(7, 9), z["rmac_regions_xywh"])
  regions = retrieval.rmac_region_descriptors(maps)
  np.testing.assert_allclose(regions, z["rmac_region_descriptors"], atol=1e-5)
  flat = regions.reshape(-1, regions.shape[-1])
  white = pca.whiten(flat, whitening=pca.fit_whitening(flat, dim=8, floor=1e-5)).reshape(*regions.shape[:2], 8)
  found = retrieval.rmac(white)
  np.testing.assert_allclose(found @ found.T, z["rmac_gram"], atol=1e-4)
  pooled = retrieval.gem(maps.reshape(10, -1, 12))
  np.testing.assert_allclose(pooled, z["gem_p4"], atol=1e-5)
  np.testing.assert_allclose(retrieval.l2_normalize(pooled), z["gem_p4_l2n"], atol=1e-6)


def test_rmac_regions_turn_with_the_map_and_cover_a_square():
  wide, high = retrieval.rmac_regions(7, 12), retrieval.rmac_regions(12, 7)
  assert sorted(map(tuple, wide)) == sorted(map(tuple, high[:, [1, 0, 3, 2]]))
  square = retrieval.rmac_regions(8, 8)
  assert len(square) == 1 + 4 + 9 and square.min() == 0 and (square[:, 0] + square[:, 2]).max() == 8


@pytest.mark.parametrize(("shape", "squares"), [((3, 11), 6), ((22, 6), 6), ((5, 9), 3), ((47, 11), 7)])
def test_of_two_overlaps_as_near_the_released_expression_decides_by_its_rounding(shape, squares):
  regions = retrieval.rmac_regions(*shape)
  assert np.sum(regions[:, 2] == min(shape)) == squares, regions


def test_seer_scores_are_the_recorded_ones(golden):
  z = golden("seer10b_eval_metrics")
  judged = retrieval.Judged(z["relevant"] == 1, z["junk"] == 1)
  found = retrieval.score(z["sim"], judged=judged, ks=(1, 3, 5))
  np.testing.assert_allclose(found.average_precision, z["AP"], atol=1e-5)
  assert np.nanmean(found.average_precision) == pytest.approx(float(z["mAP"]), abs=1e-5)
  np.testing.assert_allclose(np.nanmean(found.precision, axis=0), z["mP_at_1_3_5"], atol=1e-5)


def test_order_and_junk_of_the_database_do_not_matter():
  rng = np.random.default_rng(0)
  similarity, relevant = rng.normal(size=(4, 30)), rng.random((4, 30)) < 0.3
  base = retrieval.score(similarity, judged=retrieval.Judged(relevant, np.zeros((4, 30), bool)))
  order = rng.permutation(40)
  similarity = np.concatenate([similarity, rng.normal(size=(4, 10))], axis=1)[:, order]
  relevant = np.concatenate([relevant, np.ones((4, 10), bool)], axis=1)[:, order]
  found = retrieval.score(similarity, judged=retrieval.Judged(relevant, np.tile(order >= 30, (4, 1))))
  np.testing.assert_allclose(found.average_precision, base.average_precision, atol=1e-12)
  np.testing.assert_array_equal(found.recall, base.recall)


def test_an_unknown_protocol_is_an_error():
  with pytest.raises(ValueError, match="easy, medium or hard"):
    retrieval.revisited("simple", easy=None, hard=None, junk=None)


def test_copy_detection_is_the_recorded_one(golden):
  z = golden("segmentation_eval_copy_detection")
  describe = lambda name: retrieval.copy_descriptor(z[f"{name}_cls"], patches=z[f"{name}_patches"])
  np.testing.assert_allclose(describe("query"), z["query_descriptor_before_whitening"], atol=1e-5)
  whitening = retrieval.fit_uncentered_whitening(describe("whitening"))
  query, database = (pca.whiten(describe(name), whitening=whitening) for name in ("query", "database"))
  np.testing.assert_allclose(query @ database.T, z["similarity"], atol=1e-4)
  relevant = z["query_positive"][:, None] == np.arange(len(database))
  found = retrieval.score(query @ database.T, judged=retrieval.Judged(relevant, np.zeros_like(relevant)), top=20)
  np.testing.assert_allclose(found.average_precision, z["ap"], atol=1e-5)
  assert np.mean(found.average_precision) == pytest.approx(float(z["map"]), abs=1e-5)


def test_what_is_found_after_the_top_ranks_adds_nothing():
  similarity, relevant = -np.arange(6.0)[None], np.array([[0, 1, 0, 0, 1, 0]], bool)
  judged = retrieval.Judged(relevant, np.array([[1, 0, 0, 0, 0, 0]], bool))  # junk takes no rank
  expected = {0: (1 + (1 / 3 + 2 / 4) / 2) / 2, 4: (1 + (1 / 3 + 2 / 4) / 2) / 2, 3: 0.5}
  for top, value in expected.items():
    assert retrieval.score(similarity, judged=judged, top=top).average_precision == pytest.approx(value), top
