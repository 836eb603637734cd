"""The way of stacking that is chosen for a long training on a GPU."""

from __future__ import annotations

import pytest
import torch
from test_stacked import STACKABLE, digits, recipe_of

from ganomaly_plugin.errors import one_line
from ganomaly_plugin.registry import make_detector
from ganomaly_plugin.training import choice, together
from ganomaly_plugin.training.choice import LONG, Choice, fastest, way_for
from ganomaly_plugin.training.stack import WAYS
from ganomaly_plugin.training.together import Member, fit_together

CPU, GPU = torch.device("cpu"), torch.device("cuda")
CHW = (1, 16, 16)


def times(monkeypatch, **seconds: float | Exception) -> list[str]:
    """Trials take so long, or fail; returns which there were."""
    asked = []

    def trial(recipe, chw, models, device, record, how):
        asked.append(how)
        value = seconds[how]
        if isinstance(value, Exception):
            raise value
        return value

    monkeypatch.setattr(choice, "_seconds_per_model", trial)
    monkeypatch.setattr(choice, "make_room", lambda: None)
    fastest.cache_clear()
    return asked


@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [
        ({"matmul": 2.0, "grouped": 1.0, "streams": 3.0}, "grouped"),
        ({"matmul": 2.0, "grouped": 1.95, "streams": 3.0}, "matmul"),  # not clearly faster
        ({"matmul": 2.0, "grouped": torch.OutOfMemoryError("no"), "streams": 1.0}, "streams"),
        ({"matmul": RuntimeError("no"), "grouped": ValueError("no"), "streams": 9.0}, "streams"),
        ({"matmul": RuntimeError("no"), "grouped": ValueError("no"), "streams": RuntimeError("no")}, "matmul"),
    ],
)
def test_the_fastest_way_is_taken_that_works(seconds, chosen, monkeypatch):
    asked = times(monkeypatch, **seconds)
    for _ in range(2):
        assert way_for(recipe_of("ae"), CHW, 3, LONG, GPU, None).how == chosen
    assert sorted(asked) == sorted(seconds)  # once each
    for how, told in way_for(recipe_of("ae"), CHW, 3, LONG, GPU, None).tried.items():
        what = seconds[how]
        assert told == (f"{what * 1e3:.3f} ms a model and step" if isinstance(what, float) else one_line(what))


def test_kernels_for_tensor_cores_are_tried_where_they_work(monkeypatch):
    asked = times(monkeypatch, implicit=1.0, matmul=2.0, grouped=3.0, streams=3.0)
    monkeypatch.setattr(choice, "default_how", lambda device: "implicit")
    assert way_for(recipe_of("ae", precision="tf32"), CHW, 3, LONG, GPU, None).how == "implicit" and "implicit" in asked


def test_nothing_is_tried_on_a_cpu_or_for_a_short_training(monkeypatch):
    asked = times(monkeypatch)
    assert way_for(recipe_of("ae"), CHW, 3, 10 * LONG, CPU, None) == ("turns", {})
    assert way_for(recipe_of("ae"), CHW, 3, LONG - 1, GPU, None) == ("matmul", {}) and not asked


@pytest.mark.parametrize("how", ["grouped", "matmul", "streams"])
def test_a_trial_takes_steps_and_leaves_random_numbers_as_they_were(how):
    state = torch.get_rng_state()
    assert 0 < choice._seconds_per_model(recipe_of("ganomaly"), CHW, 2, CPU, None, how) < 60
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", STACKABLE)
def test_every_recipe_is_tried_once_only(name, monkeypatch):
    asked = times(monkeypatch, matmul=1.0, grouped=1.0, streams=1.0)
    for _ in range(2):
        way_for(recipe_of(name, **STACKABLE[name]), CHW, 2, LONG, GPU, None)
    assert len(asked) == 3


@pytest.mark.parametrize(("budget", "steps"), [({"epochs": 3, "steps": None}, 6), ({"epochs": None, "steps": 5}, 5)])
def test_a_stack_asks_with_its_budget(budget, steps, monkeypatch):
    asked = []

    def way(recipe, chw, models, steps, device, record):
        asked.append((chw, models, steps))
        return Choice("matmul", {"matmul": "1 ms", "grouped": "OutOfMemoryError: no"})

    monkeypatch.setattr(together, "way_for", way)
    members = [Member(make_detector("ae", features=2, latent_dim=2), torch.arange(128), seed) for seed in (0, 1)]
    fit_together(members, digits()[:128], **budget, device=CPU)
    assert asked == [(CHW, 2, steps)] and {m.detector.facts_["stacked_by"] for m in members} == {"matmul"}
    assert all(m.detector.describe()["ways_tried"]["grouped"] == "OutOfMemoryError: no" for m in members)
    assert set(WAYS.values()) == {"grouped", "matmul", "implicit", "streams", "turns"}
