"""Honest, fast benchmarks of GAN-based image anomaly detection, with GANomaly as its authors wrote it.

`make_detector`, `load_detector` and `list_detectors` are the programming interface; `bench` is the command.
`ganomaly_plugin.Ganomaly`, `.Autoencoder` and so on, one for each recipe of the registry, are the anomalib modules.
Everything heavy is imported on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ganomaly_plugin.checkpoints import load_authors_checkpoint, save_authors_checkpoint
    from ganomaly_plugin.datasets.decode import read_images
    from ganomaly_plugin.registry import list_detectors, load_detector, make_detector
    from ganomaly_plugin.report.results import load_results

_LAZY = {
    "load_authors_checkpoint": "ganomaly_plugin.checkpoints",
    "save_authors_checkpoint": "ganomaly_plugin.checkpoints",
    "make_detector": "ganomaly_plugin.registry",
    "load_detector": "ganomaly_plugin.registry",
    "list_detectors": "ganomaly_plugin.registry",
    "load_results": "ganomaly_plugin.report.results",
    "read_images": "ganomaly_plugin.datasets.decode",
}
__all__ = [
    "__version__",
    "list_detectors",
    "load_authors_checkpoint",
    "load_detector",
    "load_results",
    "make_detector",
    "read_images",
    "save_authors_checkpoint",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    import importlib

    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name[:1].isupper():  # an anomalib module, made from the recipe of that name
        from ganomaly_plugin.registry import anomalib_modules

        target = anomalib_modules().get(name)
        if target is not None:
            from ganomaly_plugin.training.lightning_classes import module_class

            recipe_module, _, recipe = target.partition(":")
            made = module_class(getattr(importlib.import_module(recipe_module), recipe), module=__name__, name=name)
            globals()[name] = made
            return made
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
