"""Where was a picture taken? Distances on the earth, and the shares of Im2GPS (arXiv 2202.08360; released code)."""

from __future__ import annotations

import dataclasses

import numpy as np

EARTH_RADIUS_KM = 6371.0
THRESHOLDS_KM = (1.0, 25.0, 200.0, 750.0, 2500.0)  # street, city, region, country, continent


@dataclasses.dataclass(frozen=True)
class Places:
  """latitude and longitude, [N], in degrees."""

  latitude: np.ndarray
  longitude: np.ndarray


def haversine_km(a: Places, *, b: Places) -> np.ndarray:
  """Great-circle distances [N] in kilometers on a sphere of radius 6371 km; float64."""
  lat_a, lon_a, lat_b, lon_b = (np.radians(np.asarray(x, np.float64)) for x in (a.latitude, a.longitude, b.latitude, b.longitude))
  inside = np.sin((lat_b - lat_a) / 2) ** 2 + np.cos(lat_a) * np.cos(lat_b) * np.sin((lon_b - lon_a) / 2) ** 2
  return 2 * EARTH_RADIUS_KM * np.arcsin(np.sqrt(np.clip(inside, 0.0, 1.0)))


def shares_within(distances: np.ndarray, *, thresholds: tuple[float, ...] = THRESHOLDS_KM) -> np.ndarray:
  """Share of `distances` [N] that are at most each of `thresholds`, in the same unit.

  Raises:
    ValueError: no distance.
  """
  if not len(distances):
    raise ValueError("shares of no picture")
  return np.array([np.mean(np.asarray(distances) <= t) for t in thresholds])


def cell_centers(places: Places, *, cells: np.ndarray, num_cells: int) -> Places:
  """Mean latitude and longitude of the training pictures of each cell, which is what a predicted cell stands for.

  Args:
    places: of the training pictures.
    cells: [N] their cells.
    num_cells: C; a cell without a picture is at NaN, which is within no threshold.
  """
  count = np.bincount(cells, minlength=num_cells).astype(np.float64)
  count[count == 0] = np.nan
  mean = lambda x: np.bincount(cells, weights=x, minlength=num_cells) / count
  return Places(mean(places.latitude), mean(places.longitude))
