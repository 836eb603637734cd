"""Protocols: who is normal, what is trained on, what is tested. Versioned, because AUROCs of two protocols do not compare.

A protocol never changes under its id: a better rule gets a new version.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ganomaly_plugin.datasets.base import ImageDataset
from ganomaly_plugin.errors import InvalidInput, unknown

TEST_SHARE = 0.2  # of a data set without an official split, and of paper-v1's pooled normals
REFERENCE_SHARE = 0.1  # of the training normals, held out by the strict protocols for thresholds
_FIXED_SPLIT_SEED = 20180517  # strict protocols split a data set without official split once, for all seeds


@dataclass(frozen=True)
class Split:
    """Indices into a data set: `train` and `reference` are normal, `test` has `is_anomaly` beside it."""

    train: np.ndarray
    reference: np.ndarray
    test: np.ndarray
    is_anomaly: np.ndarray
    digest: str = ""


@dataclass(frozen=True)
class Protocol:
    """One way to make an anomaly detection problem of a labelled data set.

    Attributes:
        id: Name and version.
        summary: One line for `bench ls`.
        category_is: Whether a job's class is the anomalous one or the normal one.
        batchnorm: The statistics that scoring uses unless the user sets the hyperparameter.
        oracle: Also record the best test AUROC over the epochs, labelled an oracle (it is chosen on test data).
        indices: (data set, index of the class, seed) → Split.
    """

    id: str
    summary: str
    category_is: Literal["anomalous", "normal"]
    batchnorm: Literal["running", "batch"]
    oracle: bool
    indices: Callable[[ImageDataset, int, int], Split]


def _strict(dataset: ImageDataset, is_normal: np.ndarray, seed: int) -> Split:
    """Train on the training part's normals less a held-out tenth; test on the test part, all of it."""
    is_test = dataset.is_test if dataset.is_test is not None else _fixed_test_part(dataset.labels)
    normals = np.random.default_rng([seed, 1]).permutation(np.flatnonzero(is_normal & ~is_test))
    held_out = int(REFERENCE_SHARE * len(normals))
    test = np.flatnonzero(is_test)
    return Split(np.sort(normals[held_out:]), np.sort(normals[:held_out]), test, ~is_normal[test])


def _fixed_test_part(labels: np.ndarray) -> np.ndarray:
    """A fifth of each class, the same for every seed and protocol class."""
    is_test = np.zeros(len(labels), dtype=bool)
    rng = np.random.default_rng(_FIXED_SPLIT_SEED)
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        is_test[members[: round(TEST_SHARE * len(members))]] = True
    return is_test


def _one_anomalous_strict(dataset: ImageDataset, category: int, seed: int) -> Split:
    return _strict(dataset, dataset.labels != category, seed)


def _one_normal_strict(dataset: ImageDataset, category: int, seed: int) -> Split:
    return _strict(dataset, dataset.labels == category, seed)


def _one_anomalous_paper(dataset: ImageDataset, category: int, seed: int) -> Split:
    """Official train and test pooled; normals 80:20 by seed; every anomaly is tested; the test order is shuffled."""
    rng = np.random.default_rng([seed, 2])
    normals = rng.permutation(np.flatnonzero(dataset.labels != category))
    n_train = int((1 - TEST_SHARE) * len(normals))
    test = np.concatenate([normals[n_train:], np.flatnonzero(dataset.labels == category)])
    # Differs: the authors leave CIFAR-10's test set in class order, which makes batch statistics nearly class-pure.
    # Here every data set is shuffled, as they do for MNIST and folders.
    test = rng.permutation(test)
    none = np.empty(0, dtype=np.int64)
    return Split(np.sort(normals[:n_train]), none, test, dataset.labels[test] == category)


PROTOCOLS = {
    protocol.id: protocol
    for protocol in (
        Protocol(
            "one-anomalous/strict-v1",
            "one class anomalous; official split, a tenth of the training normals held out; last epoch",
            "anomalous",
            "running",
            False,
            _one_anomalous_strict,
        ),
        Protocol(
            "one-anomalous/paper-v1",
            "GANomaly's: pooled normals 80:20 by seed, all anomalies tested, batch statistics; oracle beside last epoch",
            "anomalous",
            "batch",
            True,
            _one_anomalous_paper,
        ),
        Protocol(
            "one-normal/strict-v1",
            "one class normal, all others anomalous (Deep SVDD's); official split, a tenth of the normals held out",
            "normal",
            "running",
            False,
            _one_normal_strict,
        ),
    )
}


def get_protocol(name: str) -> Protocol:
    """The protocol with the id `name`.

    Raises:
        InvalidInput: There is none.
    """
    if name not in PROTOCOLS:
        raise unknown("protocol", name, PROTOCOLS)
    return PROTOCOLS[name]


def categories(dataset: ImageDataset, protocol: Protocol) -> tuple[str, ...]:
    """The classes that may be a job's class under `protocol`."""
    if dataset.anomaly_classes is None:
        return dataset.classes
    if protocol.category_is == "anomalous":
        return dataset.anomaly_classes
    return tuple(name for name in dataset.classes if name not in dataset.anomaly_classes)


def make_split(dataset: ImageDataset, protocol_id: str, category: str, seed: int) -> Split:
    """The split of `dataset` for one job, with a digest that equal splits of equal pixels share.

    Raises:
        InvalidInput: The protocol or class is unknown, nothing is left to train on, or the test part lacks one kind.
    """
    protocol = get_protocol(protocol_id)
    allowed = categories(dataset, protocol)
    if category not in allowed:
        raise unknown(f"class of {dataset.name} under {protocol_id}", category, allowed)
    split = protocol.indices(dataset, dataset.classes.index(category), seed)
    where = f"{dataset.name}, class {category}, {protocol_id}"
    if len(split.train) == 0:
        raise InvalidInput(f"No normal image is left to train on ({where}). Add normal training images.")
    anomalous = int(split.is_anomaly.sum())
    if anomalous in (0, len(split.test)):
        kind = "anomalous" if anomalous == 0 else "normal"
        raise InvalidInput(f"The test part has no {kind} image ({where}); AUROC needs both kinds. Add some, or drop the class.")
    digest = hashlib.sha256(f"{protocol_id} {dataset.digest}".encode())
    for part in (split.train, split.reference, split.test, split.is_anomaly):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(np.ascontiguousarray(part, dtype=np.int64))
    return Split(split.train, split.reference, split.test, split.is_anomaly, digest.hexdigest()[:16])
