"""Detectors that train and score soundly, and say odd things of themselves: for tests of what becomes a record."""

from __future__ import annotations

import os

import numpy as np
from faulty_detectors import Sound


class DescribesNone(Sound):
    def describe(self):
        return None


class DescribesBytes(Sound):
    """A file name that is no UTF-8, as os.listdir gives it."""

    def describe(self):
        return {"file": os.fsdecode(b"w-\xe9.bin")}


class RaisesBytes(Sound):
    def _fit(self, images, **options):
        raise OSError(f"no such file: {os.fsdecode(b'w-%c.bin' % 0xE9)}")


class WritesHistory(Sound):
    def _fit(self, images, **options):
        super()._fit(images, **options)
        self.history_ = [{"loss": "small"}]


class HasNoHistory(Sound):
    def _fit(self, images, **options):
        super()._fit(images, **options)
        self.history_ = None


class NamesOthers(Sound):
    """Other names for other images."""

    def named_scores(self, images):
        return {f"of {len(images)}": np.zeros(len(images))}


class NamesShort(Sound):
    def named_scores(self, images):
        return {"short": np.zeros(3)}


class NamesNan(Sound):
    def named_scores(self, images):
        return {"nan": np.full(len(images), np.nan)}


class NamesObjects(Sound):
    def named_scores(self, images):
        return {"objects": np.array([object()] * len(images))}


class NamesNumbers(Sound):
    def named_scores(self, images):
        return {1: np.zeros(len(images))}


class NamesLists(Sound):
    """Lists will do."""

    def named_scores(self, images):
        return {"zero": [float(k) for k in range(len(images))]}


class MapsNothing(Sound):
    def anomaly_map(self, images):
        return None


class KeepsArrays(Sound):
    """Its state is no tensor."""

    def _state(self):
        return {"mean": self.mean_.numpy(), "weights": self.weights_}
