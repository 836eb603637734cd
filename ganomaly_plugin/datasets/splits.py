"""Protocols: who is normal, what is trained on, what is tested. Versioned, because AUROCs of two protocols do not compare.

A protocol never changes under its id: a better rule gets a new version.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ganomaly_plugin.datasets.base import ImageDataset
from ganomaly_plugin.errors import InvalidInput, check_known, check_seed

TEST_SHARE = 0.2  # of a data set without an official split, and of paper-v1's pooled normals
REFERENCE_SHARE = 0.1  # of the training normals, held out by the strict protocols for thresholds
_FIXED_SPLIT_SEED = 20180517  # strict protocols split a data set without official split once, for all seeds


@dataclass(frozen=True)
class Split:
    """Indices into a data set: `reference` is normal, `test` has `is_anomaly` beside it.

    `train` is normal too, but for the `contaminating` anomalies that were mixed in on request.
    """

    train: np.ndarray
    reference: np.ndarray
    test: np.ndarray
    is_anomaly: np.ndarray
    digest: str = ""
    contaminating: int = 0


@dataclass(frozen=True)
class Protocol:
    """One way to make an anomaly detection problem of a labelled data set.

    Attributes:
        id: Name and version.
        summary: One line for `bench ls`.
        category_is: Whether a job's class is the anomalous one or the normal one.
        batchnorm: The statistics that scoring uses unless the user sets the hyperparameter.
        oracle: Also record the best test AUROC over the epochs, labelled an oracle (it is chosen on test data).
        indices: (data set, who is normal, who is anomalous, seed) → Split. Images that are neither take no part.
    """

    id: str
    summary: str
    category_is: Literal["anomalous", "normal"]
    batchnorm: Literal["running", "batch"]
    oracle: bool
    indices: Callable[[ImageDataset, np.ndarray, np.ndarray, int], Split]


def _strict(dataset: ImageDataset, is_normal: np.ndarray, is_anomalous: np.ndarray, seed: int) -> Split:
    """Train on the training part's normals less a held-out tenth; test on the test part, all of it."""
    is_test = _test_part(dataset)
    normals = np.random.default_rng([seed, 1]).permutation(np.flatnonzero(is_normal & ~is_test))
    held_out = int(REFERENCE_SHARE * len(normals))
    test = np.flatnonzero(is_test & (is_normal | is_anomalous))
    return Split(np.sort(normals[held_out:]), np.sort(normals[:held_out]), test, is_anomalous[test])


def _test_part(dataset: ImageDataset) -> np.ndarray:
    return dataset.is_test if dataset.is_test is not None else _fixed_test_part(dataset.labels)


def _fixed_test_part(labels: np.ndarray) -> np.ndarray:
    """A fifth of each class, the same for every seed and protocol class."""
    is_test = np.zeros(len(labels), dtype=bool)
    rng = np.random.default_rng(_FIXED_SPLIT_SEED)
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        is_test[members[: round(TEST_SHARE * len(members))]] = True
    return is_test


def _paper(dataset: ImageDataset, is_normal: np.ndarray, is_anomalous: np.ndarray, seed: int) -> Split:
    """Official train and test pooled; normals 80:20 by seed; every anomaly is tested; the test order is shuffled."""
    rng = np.random.default_rng([seed, 2])
    normals = rng.permutation(np.flatnonzero(is_normal))
    n_train = int((1 - TEST_SHARE) * len(normals))
    test = np.concatenate([normals[n_train:], np.flatnonzero(is_anomalous)])
    # Differs: the authors leave CIFAR-10's test set in class order, which makes batch statistics nearly class-pure.
    # Here every data set is shuffled, as they do for MNIST and folders.
    test = rng.permutation(test)
    none = np.empty(0, dtype=np.int64)
    return Split(np.sort(normals[:n_train]), none, test, is_anomalous[test])


PROTOCOLS = {
    protocol.id: protocol
    for protocol in (
        Protocol(
            "one-anomalous/strict-v1",
            "one class anomalous; official split, a tenth of the training normals held out; last epoch",
            "anomalous",
            "running",
            False,
            _strict,
        ),
        Protocol(
            "one-anomalous/paper-v1",
            "GANomaly's: pooled normals 80:20 by seed, all anomalies tested, batch statistics; oracle beside last epoch",
            "anomalous",
            "batch",
            True,
            _paper,
        ),
        Protocol(
            "one-normal/strict-v1",
            "one class normal, all others anomalous (Deep SVDD's); official split, a tenth of the normals held out",
            "normal",
            "running",
            False,
            _strict,
        ),
    )
}


def get_protocol(name: str) -> Protocol:
    """The protocol with the id `name`.

    Raises:
        InvalidInput: There is none.
    """
    check_known("protocol", name, PROTOCOLS)
    return PROTOCOLS[name]


def categories(dataset: ImageDataset, protocol: Protocol) -> tuple[str, ...]:
    """The classes that may be a job's class under `protocol`."""
    if dataset.anomaly_classes is None:
        return dataset.classes
    if protocol.category_is == "anomalous":
        return dataset.anomaly_classes
    return tuple(name for name in dataset.classes if name not in dataset.anomaly_classes)


def make_split(
    dataset: ImageDataset,
    protocol_id: str,
    category: str,
    seed: int,
    *,
    train_fraction: float = 1.0,
    contamination: float = 0.0,
) -> Split:
    """The split of `dataset` for one job, with a digest that equal splits of equal pixels share.

    In a data set that names its defects (`anomaly_classes`), a defect other than `category` is neither normal nor
    anomalous, and takes no part.

    Args:
        dataset: What to split.
        protocol_id: One of `PROTOCOLS`.
        category: The class that is anomalous, or normal: the protocol says which.
        seed: Of the protocol's draws, and of those below. For one seed a smaller fraction is a subset of a larger.
        train_fraction: Share in (0, 1] of the training normals that is kept; reference and test stay as they are.
        contamination: Share in [0, 0.5] of the training set that is anomalies, mixed in beside the normals. They
            come from the official training part where it has anomalies and the protocol does not test those, else
            from the test part, which loses them.

    Raises:
        InvalidInput: The protocol or class is unknown, a share is out of range, is of no image or needs more anomalies than
            there are, the seed is not one, nothing is left to train on, or the test part lacks one kind.
    """
    protocol = get_protocol(protocol_id)
    allowed = categories(dataset, protocol)
    check_known(f"class of {dataset.name} under {protocol_id}", category, allowed)
    check_shares(train_fraction, contamination)
    seed = check_seed(seed)
    is_normal, is_anomalous = _kinds(dataset, protocol, category)
    split = protocol.indices(dataset, is_normal, is_anomalous, seed)
    where = f"{dataset.name}, class {category}, {protocol_id}"
    if len(split.train) == 0:
        raise InvalidInput(f"No normal image is left to train on ({where}). Add normal training images.")
    if train_fraction != 1.0:
        kept = np.random.default_rng([seed, 4]).permutation(split.train)[: max(1, round(train_fraction * len(split.train)))]
        split = dataclasses.replace(split, train=np.sort(kept))
    if contamination != 0.0:
        split = _contaminate(split, is_anomalous, contamination, seed, where)
    anomalous = int(split.is_anomaly.sum())
    if anomalous in (0, len(split.test)):
        kind = "anomalous" if anomalous == 0 else "normal"
        there = int((is_anomalous if anomalous == 0 else is_normal).sum())
        why = f": a fifth of each class is tested, and {there} are too few" if dataset.is_test is None and there else ""
        todo = "Add some, or drop the class."
        raise InvalidInput(f"The test part has no {kind} image ({where}){why}; AUROC needs both kinds. {todo}")
    return dataclasses.replace(split, digest=_digest(dataset, protocol_id, split, train_fraction, contamination))


def leaked(dataset: ImageDataset, split: Split) -> int:
    """How many test images are among the training images too, pixel by pixel: what was learned by heart is no detection."""
    return int(np.isin(dataset.first_equal[split.test], dataset.first_equal[split.train]).sum())


def _kinds(dataset: ImageDataset, protocol: Protocol, category: str) -> tuple[np.ndarray, np.ndarray]:
    """Who is normal and who is anomalous, bool `(n,)` each."""
    chosen = dataset.labels == dataset.classes.index(category)
    if protocol.category_is == "normal":
        return chosen, ~chosen
    defects = [dataset.classes.index(name) for name in dataset.anomaly_classes or (category,)]
    return ~np.isin(dataset.labels, defects), chosen


def check_shares(train_fraction: float, contamination: float) -> None:
    """Raise InvalidInput for a share of the training images that no split can have."""
    if not 0 < train_fraction <= 1:  # also NaN
        raise InvalidInput(f"train_fraction must be in (0, 1], got {train_fraction}.")
    if not 0 <= contamination <= 0.5:
        raise InvalidInput(f"contamination must be in [0, 0.5], got {contamination}. It is a share of the training set.")


def _contaminate(split: Split, is_anomalous: np.ndarray, share: float, seed: int, where: str) -> Split:
    """Mix anomalies into `train` until they are `share` of it."""
    wanted = round(len(split.train) * share / (1 - share))
    tested = split.test[split.is_anomaly]
    spare = np.setdiff1d(np.flatnonzero(is_anomalous), tested)
    pool, available = (spare, len(spare)) if len(spare) else (tested, len(tested) - 1)  # one stays to be tested
    if wanted == 0:
        least = math.ceil(1000 * 0.5 / (0.5 + len(split.train))) / 1000
        raise InvalidInput(
            f"contamination={share} of {len(split.train)} training images is less than one ({where}). "
            f"Take at least {least}, or 0."
        )
    if available <= 0:
        raise InvalidInput(
            f"contamination={share} needs an anomaly to train on, and there is none to spare ({where}): one stays to be "
            "tested. Leave this class out, or take contamination=0."
        )
    if wanted > available:
        most = available / (available + len(split.train))
        raise InvalidInput(
            f"contamination={share} needs {wanted} anomalies to train on, and there are {available} to spare ({where}). "
            f"Take at most {math.floor(most * 1000) / 1000}, or a smaller train_fraction."
        )
    drawn = np.random.default_rng([seed, 5]).permutation(np.sort(pool))[:wanted]
    stays = ~np.isin(split.test, drawn)
    return dataclasses.replace(
        split,
        train=np.sort(np.concatenate([split.train, drawn])),
        test=split.test[stays],
        is_anomaly=split.is_anomaly[stays],
        contaminating=len(drawn),
    )


def _digest(dataset: ImageDataset, protocol_id: str, split: Split, train_fraction: float, contamination: float) -> str:
    digest = hashlib.sha256(f"{protocol_id} {dataset.digest}".encode())
    for part in (split.train, split.reference, split.test, split.is_anomaly):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(np.ascontiguousarray(part, dtype=np.int64).data)
    if (train_fraction, contamination) != (1.0, 0.0):  # the digest of a plain split is as it was before there were shares
        digest.update(f"train_fraction={train_fraction} contamination={contamination}".encode())
    return digest.hexdigest()[:16]
