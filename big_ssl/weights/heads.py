"""Rules of heads and prototypes: DINO's, the projection MLPs of MSN, PAWS and SwAV, and linear classifiers."""

from __future__ import annotations

from collections.abc import Collection

from big_ssl.weights.describe import matches
from big_ssl.weights.keymap import Keep, Rule, batch_norm, linear, tensor
from big_ssl.weights.moves import LINEAR, UNSTACK, chain


def dino_head(
  theirs: str, *, batch_norms: bool, single: bool = False, parametrized: bool = False, ours: str = "head"
) -> tuple[Rule | Keep, ...]:
  """DINO's head <-> `models.heads.DINOHead`; `theirs` is "head" in full checkpoints.

  Linear layers and activations are numbered through, and BN with them where there is one.

  Args:
    single: whether the MLP is one linear layer, which has no number then.
    parametrized: whether the weight normalization has the names of torch >= 2.1.
  """
  names = (("weight_g", "g"), ("weight_v", "v"))
  if parametrized:
    names = (("parametrizations.weight.original0", "g"), ("parametrizations.weight.original1", "v"))
  mlp = sequence(f"{theirs}.mlp", f"{ours}/mlp", batch_norms=batch_norms)
  return (
    *(linear(f"{theirs}.mlp", f"{ours}/mlp/fc1") if single else mlp),
    *(r for name, leaf in names for r in tensor(f"{theirs}.last_layer.{name}", f"{ours}/last_layer/{leaf}")),
  )


def dino_head_of(names: Collection[str]) -> tuple[Rule | Keep, ...]:
  """`dino_head` as the names of either side ask for it."""
  ours = matches(names, "params/head/mlp/fc1") and not matches(names, "params/head/mlp/fc2")
  return dino_head(
    "head",
    batch_norms=matches(names, r"head\.mlp\.\d+\.running_mean|batch_stats/head/mlp/"),
    single=ours or "head.mlp.weight" in names,
    parametrized=matches(names, r"head\.last_layer\.parametrizations"),
  )


def sequence(theirs: str, ours: str, *, batch_norms: bool) -> tuple[Rule | Keep, ...]:
  """A torch Sequential of Linear[, BN], activation, ..., Linear <-> fc1, bn1, fc2 ..."""
  if not batch_norms:
    return linear(f"{theirs}.{{2*i-2}}", f"{ours}/fc{{i}}")
  return linear(f"{theirs}.{{3*i-3}}", f"{ours}/fc{{i}}") + batch_norm(f"{theirs}.{{3*i-2}}", f"{ours}/bn{{i}}")


def projection(theirs: str, ours: str) -> tuple[Rule | Keep, ...]:
  """MSN's and PAWS's named layers fc1, bn1, fc2 ... <-> `models.heads.ProjectionHead` or `BottleneckPredictor`."""
  return linear(f"{theirs}.fc{{i}}", f"{ours}/fc{{i}}") + batch_norm(f"{theirs}.bn{{i}}", f"{ours}/bn{{i}}")


def swav_head(*, batch_norms: bool = True, heads: int = 1) -> tuple[Rule | Keep, ...]:
  """SwAV's `projection_head` and prototypes [K, D], one matrix or several (DeepCluster-v2, SeLa-v2)."""
  prototypes = (
    tensor("prototypes.weight", "prototypes/head0")
    if heads == 1
    else tensor("prototypes.prototypes{i}.weight", "prototypes/head{i}")
  )
  return (*sequence("projection_head", "head", batch_norms=batch_norms), *prototypes)


def classifier(theirs: str, ours: str = "head/fc") -> tuple[Rule, ...]:
  """A linear classifier <-> `models.heads.Linear`."""
  return linear(theirs, ours)


def classifiers(theirs: str, *, heads: int, ours: str = "head") -> tuple[Rule, ...]:
  """`theirs`0, `theirs`1, ... <-> the one tensor of `models.heads.LinearHeads`."""
  names = lambda leaf: tuple(f"{theirs}{h}.{leaf}" for h in range(heads))
  return (
    Rule(names("weight"), f"params/{ours}/kernel", chain(LINEAR, UNSTACK)),
    Rule(names("bias"), f"params/{ours}/bias", UNSTACK),
  )
