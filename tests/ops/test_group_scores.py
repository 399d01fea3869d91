"""Scores by group against recorded ones, and intervals against their definition."""

import numpy as np
import pytest

from big_ssl.ops import group_scores


def test_masked_top1_is_the_recorded_one(golden):
  z = golden("seer10b_eval_metrics")
  found = group_scores.masked_prediction(z["mask_logits"], present=z["mask_present"])
  assert 100 * np.mean(found == z["mask_labels"]) == pytest.approx(float(z["mask_top1"]))
  everything = group_scores.masked_prediction(z["mask_logits"], present=np.arange(12))
  assert 100 * np.mean(everything == z["mask_labels"]) == pytest.approx(float(z["mask_top1_unmasked"]))


def test_retrieval_precision_by_group_is_the_recorded_one(golden):
  z = golden("seer10b_eval_metrics")
  gender = z["fair_query_gender"]
  groups = group_scores.attribute_groups(gender=gender, skin=z["fair_query_skin"], age=z["fair_query_age"])
  assert list(groups) == [str(name) for name in z["fair_groups"]]
  for row, k in zip(z["fair_precision"], (1, 5, 10), strict=True):
    found = group_scores.retrieval_precision(
      z["fair_query_features"],
      database=z["fair_db_features"],
      query_labels=gender,
      database_labels=z["fair_db_gender"],
      k=k,
    )
    np.testing.assert_allclose([found[m].mean() if m.any() else -1 for m in groups.values()], row, atol=1e-5)


@pytest.mark.parametrize(("attribute", "first"), [("assoc_gender", 0), ("assoc_skin", 2)])
def test_label_association_is_the_recorded_one(golden, attribute, first):
  z = golden("seer10b_fairness")
  groups, predictions = z[attribute], z["assoc_pred_top5"]
  differences = group_scores.rate_differences(predictions, groups=groups, num_classes=12)
  for group in (0, 1):
    rates = [group_scores.association_rate(predictions[groups == group], classes=c) for c in ([0, 1], [2, 3, 4])]
    np.testing.assert_allclose(np.round(rates, 3), z["assoc_rate_percent"][first + group], atol=1e-4)
    np.testing.assert_allclose(differences[group], z["assoc_rate_difference"][first + group], atol=2e-3)
    confidences = z["assoc_conf_top5"][groups == group]
    found = group_scores.mean_top_confidence(confidences)
    assert found == pytest.approx(float(z["assoc_mean_top1_conf"][first + group]), abs=6e-5)
    rate = group_scores.confident_rate(predictions[groups == group], confidences=confidences, label=2, threshold=0.2)
    assert rate / 100 == pytest.approx(float(z["assoc_above_threshold"][first + group]), abs=6e-6)


def test_dollar_street_hits_by_income_and_region_are_the_recorded_ones(golden):
  z = golden("seer10b_fairness")
  hits = group_scores.set_hits(z["ds_pred_label_sets"], concepts=z["ds_concept"], confidences=z["ds_conf"])
  np.testing.assert_array_equal(hits, z["ds_hit"])
  income = group_scores.income_bucket(z["ds_income_of_household"])
  for buckets, expected, names in (
    (income, z["ds_hit_low_medium_high"], (1, 2, 3)),
    (z["ds_region_of_household"], z["ds_hit_by_region"], range(4)),
  ):
    found = group_scores.household_rate(hits, households=z["ds_household"], buckets=buckets)
    np.testing.assert_allclose([found.get(n, -1) for n in names], expected, atol=1e-5)


def test_a_prediction_without_confidence_is_no_hit_and_padding_is_no_concept():
  sets = np.array([[[3, -1], [5, -1]], [[3, -1], [5, -1]], [[-1, -1], [-1, -1]]])
  confidences = np.array([[0.9, 0.0], [0.9, 0.1], [0.9, 0.1]])
  found = group_scores.set_hits(sets, concepts=np.array([5, 5, -1]), confidences=confidences)
  np.testing.assert_array_equal(found, [False, True, False])


def test_people_without_a_known_attribute_are_in_no_group_of_it():
  nobody = {"gender": np.array([-1]), "skin": np.array([0]), "age": np.array([-1.0])}
  assert [name for name, mask in group_scores.attribute_groups(**nobody).items() if mask.any()] == ["overall"]
  edge = {"gender": np.array([1]), "skin": np.array([4]), "age": np.array([70.0])}
  found = [name for name, mask in group_scores.attribute_groups(**edge).items() if mask.any()]
  assert found == ["overall", "male", "darker", "male_darker", "70+"]


def test_the_interval_of_a_difference_is_newcombes_and_covers_a_planted_one():
  # Newcombe (1998), table II, method 10: 56/70 - 48/80 and 9/10 - 3/10.
  for hits, counts, low, high in (((56, 48), (70, 80), 5.24, 33.39), ((9, 3), (10, 10), 17.05, 80.90)):
    a, b = (group_scores.wilson(h, count=n) for h, n in zip(hits, counts, strict=True))
    found = group_scores.difference(a, b=b)
    assert (found.low, found.high) == (pytest.approx(low, abs=0.005), pytest.approx(high, abs=0.005))
  rng, covered = np.random.default_rng(0), 0
  for _ in range(400):
    a, b = (group_scores.wilson(int(rng.binomial(n, p)), count=n) for n, p in ((60, 0.9), (40, 0.6)))
    found = group_scores.difference(a, b=b)
    covered += found.low <= 30 <= found.high
  assert 0.92 < covered / 400 < 0.99, covered


def test_wilson_interval_solves_its_equation_and_stays_inside():
  for hits, count in ((0, 5), (5, 5), (7, 20), (600, 1000)):
    share = group_scores.wilson(hits, count=count)
    assert 0 <= share.low <= share.percent <= share.high <= 100 and share.low < share.high
    for end in (share.low / 100, share.high / 100):
      if 0 < end < 1:  # the ends are the shares from which what was seen is Z_95 deviations away
        away = abs(hits / count - end) / np.sqrt(end * (1 - end) / count)
        assert away == pytest.approx(group_scores.Z_95, rel=1e-6)
  with pytest.raises(ValueError, match="no image"):
    group_scores.wilson(0, count=0)


def test_groups_are_counted_and_rows_without_one_left_out():
  found = group_scores.by_group(np.array([1, 0, 1, 1, 0], bool), groups=np.array(["a", "a", "b", "", ""]))
  assert {k: (v.percent, v.count) for k, v in found.items()} == {"a": (50.0, 2), "b": (100.0, 1)}


def test_impossible_scores_are_errors():
  with pytest.raises(ValueError, match="two groups"):
    group_scores.rate_differences(np.zeros((3, 5), int), groups=np.zeros(3, int), num_classes=2)
  with pytest.raises(ValueError, match="precision at 4 of 3"):
    labels = np.arange(3)
    group_scores.retrieval_precision(np.eye(3), database=np.eye(3), query_labels=labels, database_labels=labels, k=4)


def test_shape_bias_counts_decisions_for_either_cue_where_these_differ():
  shapes, textures = np.array([0, 0, 1, 1, 2, 2]), np.array([1, 1, 2, 2, 2, -1])
  found = group_scores.shape_bias(np.array([0, 1, 1, 0, 2, 2]), shapes=shapes, textures=textures)
  assert (found.percent, found.count) == (pytest.approx(200 / 3), 3)
  with pytest.raises(ValueError, match="no image with two cues"):
    group_scores.shape_bias(np.full(6, 9), shapes=shapes, textures=textures)
