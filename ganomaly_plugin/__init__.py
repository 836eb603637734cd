"""Honest, fast benchmarks of GAN-based image anomaly detection, with GANomaly as its authors wrote it.

`make_detector`, `load_detector` and `list_detectors` are the programming interface; `bench` is the command.
Everything heavy is imported on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ganomaly_plugin.checkpoints import load_authors_checkpoint, save_authors_checkpoint
    from ganomaly_plugin.registry import list_detectors, load_detector, make_detector

_LAZY = {
    "load_authors_checkpoint": "ganomaly_plugin.checkpoints",
    "save_authors_checkpoint": "ganomaly_plugin.checkpoints",
    "make_detector": "ganomaly_plugin.registry",
    "load_detector": "ganomaly_plugin.registry",
    "list_detectors": "ganomaly_plugin.registry",
}
__all__ = [
    "__version__",
    "list_detectors",
    "load_authors_checkpoint",
    "load_detector",
    "make_detector",
    "save_authors_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)
