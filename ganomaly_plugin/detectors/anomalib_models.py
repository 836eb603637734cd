"""Any model of anomalib as a detector: `anomalib:Padim`, `anomalib:Patchcore`, `anomalib:Ganomaly`, ...

The model is built after seeding, trained by anomalib's Engine on the images in memory, and scores without anomalib's
post-processing: thresholds, scaling to [0, 1] and clamping are left out, so a ranking is that of the raw scores.
anomalib is imported inside the functions, since it takes seconds.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import tempfile
import traceback
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, get_type_hints

import torch
from torch import Tensor

from ganomaly_plugin.core import OnEpoch
from ganomaly_plugin.detectors.base import BaseDetector
from ganomaly_plugin.errors import BenchError, CorruptFile, InvalidInput, check_known, one_line
from ganomaly_plugin.hparams import canonical_hparams
from ganomaly_plugin.images import to_float
from ganomaly_plugin.seeding import seeded

if TYPE_CHECKING:
    from ganomaly_plugin.detectors.anomalib_data import AfterEpoch

_COMPONENTS = ("pre_processor", "post_processor", "evaluator", "visualizer")  # the detector sees to these
_NETWORK = ("Connect", "httpx", "huggingface_hub", "Offline")  # in names of errors that are no OSError
_MIXED = 0.05  # of the spread of scores: a difference beyond rounding
_OURS = ("image_size", "batch_size", "input_range", "drop_last")


class AnomalibDetector(BaseDetector):
    """One anomalib model behind our interface; `for_name` makes the class for each model.

    Args:
        image_size: Side the model's pre-processor resizes to; None: the model's own, 256 for most.
        batch_size: Images in a training step and scored at once.
        input_range: What black and white become; None: the model's own normalisation, ImageNet's for most.
        drop_last: Whether the last batch of an epoch is left out where it is shorter. anomalib trains on it.
        **init_args: The model's own arguments, as in anomalib's configs.
    """

    #: The budget of models that do not set their own; GANomaly's.
    default_epochs: ClassVar[int] = 15
    model_name: ClassVar[str] = ""
    mixes_ = False  # whether an image's score depends on its batch, as far as it was tried: not of a file that is read
    conformance_hparams: ClassVar[dict[str, Any]] = {"image_size": 32, "batch_size": 8}

    def __init__(
        self,
        image_size: int | None = None,
        batch_size: int = 32,
        input_range: tuple[float, float] | None = None,
        drop_last: bool = False,
        **init_args: Any,
    ) -> None:
        if image_size is not None and image_size < 1:
            raise InvalidInput(f"image_size must be at least 1, got {image_size}.")
        if batch_size < 1:
            raise InvalidInput(f"batch_size must be at least 1, got {batch_size}.")
        if input_range is not None and not input_range[0] < input_range[1]:
            raise InvalidInput(f"input_range must be (low, high) with low < high, got {input_range}.")
        self.image_size, self.batch_size, self.input_range = image_size, batch_size, input_range
        self.drop_last, self.init_args = drop_last, init_args

    @classmethod
    def for_name(cls, name: str) -> type[AnomalibDetector]:
        """The detector class of the anomalib model `name`, its init arguments checked like any hyperparameter.

        Raises:
            InvalidInput: anomalib is not installed or has no such model.
        """
        return _detector_class(name)

    @property
    def hparams(self) -> dict[str, Any]:
        """Our options and the model's init arguments, defaults filled in; `drop_last`, which came late, where it is set."""
        ours = {name: getattr(self, name) for name in _OURS if name != "drop_last" or self.drop_last}
        own = {**_init_defaults(self.model_name), **self.init_args}
        return {name: _plain(value) for name, value in canonical_hparams(type(self), {**own, **ours}).items()}

    def _fit(self, images: Tensor, *, seed: int, epochs: int | None, device: torch.device, on_epoch: OnEpoch | None) -> None:
        from ganomaly_plugin.detectors.anomalib_data import AfterEpoch, ImagesInMemory, make_engine

        if self.drop_last and len(images) < self.batch_size:
            raise InvalidInput(f"drop_last leaves nothing of {len(images)} images with batch_size={self.batch_size}. Lower it.")
        self.history_: list[dict[str, float]] = []
        self.device_ = device
        after_epoch = AfterEpoch(self, on_epoch if self.has_epochs else None)
        with seeded(seed), quiet(), tempfile.TemporaryDirectory() as folder, self.readable_errors(after_epoch):
            self.model_ = self.build_model()
            engine = make_engine(device, folder, [after_epoch], max_epochs=epochs or self.default_epochs)
            data: Any = ImagesInMemory(images, self.batch_size, drop_last=self.drop_last)
            engine.fit(self.model_, datamodule=data)
        self.model_.to(device).eval()
        few = images[:3].flip(-1)  # mirrored: some models have a distance of 0, and rounding, to images that they know
        with self.readable_errors():  # some models leave themselves untrained where images are few, and only log it
            found = self._forward(few)
        self.has_anomaly_map = found.anomaly_map is not None  # type: ignore[misc]
        together = self._of(found, "score", images.shape[-2:])
        if not together.isfinite().all():  # PaDiM's covariance of one image, for one
            raise InvalidInput(f"{self.name} scores {float(together[0])} after training on {len(images)} images. Give it more.")
        alone = torch.cat([self._of(self._forward(image), "score", images.shape[-2:]) for image in few.split(1)])
        self.mixes_ = bool(((together - alone).abs() > _MIXED * (together.max() - together.min())).any())

    def build_model(self, **changes: Any) -> Any:
        """The model as anomalib has it, untrained; `changes` come before what the detector was made with."""
        cls = _model_class(self.model_name)
        ours = {name: getattr(self, name) for name in _OURS if name in _init_parameters(self.model_name)}
        return cls(
            pre_processor=self._pre_processor(cls), post_processor=False, evaluator=False, visualizer=False,
            **{**ours, **self.init_args, **changes},
        )  # fmt: skip

    def _pre_processor(self, cls: Any) -> Any:
        if self.input_range is not None:
            from anomalib.pre_processing import PreProcessor
            from torchvision.transforms.v2 import Compose, Normalize, Resize

            low, high = self.input_range
            std = 1 / (high - low)  # (x - mean) / std takes 0 to low and 1 to high
            side = self.image_size or 256
            steps = [Resize((side, side), antialias=True), Normalize(mean=[-low * std] * 3, std=[std] * 3)]
            return PreProcessor(transform=Compose(steps))
        return True if self.image_size is None else cls.configure_pre_processor(image_size=(self.image_size, self.image_size))

    def _score(self, images: Tensor) -> Tensor:
        return self._predict(images, "score")

    def _anomaly_map(self, images: Tensor) -> Tensor:
        return self._predict(images, "map")

    def _predict(self, images: Tensor, what: str) -> Tensor:
        parts = [self._of(self._forward(chunk), what, images.shape[-2:]) for chunk in images.split(self.batch_size)]
        return torch.cat(parts)

    def _forward(self, images: Tensor) -> Any:
        transform = self.model_.pre_processor.transform if self.model_.pre_processor else None
        self.model_.eval()
        with torch.no_grad():
            x = as_photographs(images).to(self.device_)
            return self.model_.model(transform(x) if transform is not None else x)

    def _of(self, found: Any, what: str, size: Any) -> Tensor:
        score, anomaly_map = found.pred_score, found.anomaly_map
        if what == "score":
            return (score.flatten() if score is not None else anomaly_map.flatten(1).amax(1)).float().cpu()
        if anomaly_map is None:
            raise InvalidInput(f"{self.name} has no anomaly map: it scores whole images.")
        maps = anomaly_map.reshape(len(anomaly_map), 1, *anomaly_map.shape[-2:]).float().cpu()
        return torch.nn.functional.interpolate(maps, tuple(size), mode="bilinear", antialias=True).squeeze(1)

    def describe(self) -> dict[str, Any]:
        """The class, anomalib's version, the number of weights; and what there is to be said of the scores."""
        from importlib.metadata import version

        weights = sum(p.numel() for p in self.model_.parameters())
        told = {"class_path": f"anomalib.models.{self.model_name}", "anomalib": version("anomalib"), "parameters": weights}
        if self.mixes_:
            told["fallbacks"] = ["an image's score depends on the others of its batch, and AUROC compares scores of several"]
        return told

    def _state(self) -> dict[str, Any]:
        weights = {name: value.detach().cpu() for name, value in self.model_.state_dict().items()}
        return {"model": weights, "has_anomaly_map": self.has_anomaly_map}

    def _load_state(self, state: dict[str, Any], device: torch.device) -> None:
        with quiet(), self.readable_errors():  # the saved weights are all there: nothing is to be downloaded
            known = _init_defaults(self.model_name)
            self.model_ = self.build_model(**({"pre_trained": False} if "pre_trained" in known else {}))
        try:
            self.model_.load_state_dict(state["model"])
            self.has_anomaly_map = bool(state["has_anomaly_map"])  # type: ignore[misc]
        except (KeyError, RuntimeError) as error:
            raise CorruptFile(f"The weights do not fit {self.name}: {one_line(error)[:200]}.") from error
        self.model_.to(device).eval()
        self.device_, self.history_ = device, []

    @contextlib.contextmanager
    def readable_errors(self, after_epoch: AfterEpoch | None = None) -> Iterator[None]:
        """anomalib's, timm's and huggingface's errors as one line; a failed download says what to put where.

        What `on_epoch` raised stays what it was, and so does an interrupt, of which Lightning makes an exit.
        """
        try:
            yield
        except BenchError:
            raise
        except SystemExit as error:
            if isinstance(error.__context__, KeyboardInterrupt):
                raise KeyboardInterrupt from error
            raise
        except Exception as error:
            if after_epoch is not None and after_epoch.error is error:
                raise
            name = self.name or f"anomalib:{self.model_name}"
            wanted = failed_download(error)
            if wanted is None:
                raise InvalidInput(f"{name} failed in anomalib: {one_line(error)[:300]}") from error
            what, where, is_backbone = wanted
            hint = ", or set pre_trained=false" if is_backbone and "pre_trained" in _init_defaults(self.model_name) else ""
            raise InvalidInput(
                f"{name} needs {what}, which is not here and cannot be downloaded. Fetch it on a machine with a network, by "
                f"running the same there, and copy its {where} here{hint}. ({one_line(error)[:160]})"
            ) from error


def as_photographs(images: Tensor) -> Tensor:
    """Our images as anomalib's: float `(n, 3, h, w)` in [0, 1]; grey ones get three equal channels."""
    x = (to_float(images.clone()) + 1) / 2
    return x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x


def failed_download(error: BaseException) -> tuple[str, str, bool] | None:
    """What could not be downloaded, where it belongs, and whether it may be a backbone's weights; None for another error.

    Errors do not say it: it stands in the arguments of the functions that `error` and its causes came through.
    """
    calls: dict[str, dict[str, Any]] = {}
    is_network = False
    cause: BaseException | None = error
    while cause is not None:
        words = type(cause).__name__ + type(cause).__module__
        is_network |= isinstance(cause, OSError) or any(word in words for word in _NETWORK)
        calls |= {frame.f_code.co_name: frame.f_locals for frame, _ in traceback.walk_tb(cause.__traceback__)}
        cause = cause.__cause__ or cause.__context__
    if told := calls.get("download_and_extract"):  # anomalib's, of weights and of data sets
        if calls.keys() & {"urlretrieve", "check_hash"}:
            _remove_unfinished(told["downloaded_file_path"])
        return told["info"].url, str(told["root"]), False
    if not is_network:
        return None
    if told := calls.get("hf_hub_download"):
        return f"{told['repo_id']} of the Hugging Face hub", "~/.cache/huggingface/hub (HF_HOME)", True
    if told := calls.get("download_url_to_file"):  # torch's
        return told["url"], "~/.cache/torch/hub/checkpoints (TORCH_HOME)", True
    if told := calls.get("urlretrieve"):
        return told["url"], str(told["filename"]), False
    return None


def _remove_unfinished(archive: Path) -> None:
    """Remove what anomalib's failed download left, the folder too: it counts as the whole data set the next time."""
    with contextlib.suppress(OSError):
        archive.unlink(missing_ok=True)
        archive.parent.rmdir()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps anomalib's and Lightning's notes and warnings off the terminal."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _model_class(name: str) -> Any:
    try:
        with quiet():
            import anomalib.models as models
            from anomalib.models import AnomalibModule
    except ImportError as error:
        raise InvalidInput(f"anomalib:{name} needs anomalib: {one_line(error)}. Run pip install anomalib.") from error
    image_models = [n for n in models.__all__ if _is_model(getattr(models.image, n, None), AnomalibModule)]
    found = getattr(models.image, name, None)
    check_known("anomalib model", name, image_models, todo="Write its class name, as in anomalib:Padim.")
    return found


def _is_model(value: Any, base: type) -> bool:
    return inspect.isclass(value) and issubclass(value, base) and not inspect.isabstract(value)


@functools.cache
def _init_parameters(name: str) -> dict[str, inspect.Parameter]:
    """The init arguments of an anomalib model that users may set, with types instead of text as annotations."""
    init = _model_class(name).__init__
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {
        p.name: p.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=_type_of(p, inspect.unwrap(init).__globals__))
        for p in inspect.signature(init).parameters.values()
        if p.kind in kinds and p.name != "self" and p.name not in _COMPONENTS
    }


def _type_of(parameter: inspect.Parameter, known: dict[str, Any]) -> Any:
    """The type that an annotation means; Any where there is none, or it is imported for type checkers only."""
    alone = types.SimpleNamespace(__annotations__={parameter.name: parameter.annotation})
    try:
        return Any if parameter.annotation is parameter.empty else get_type_hints(alone, known)[parameter.name]
    except NameError:
        return Any


def _init_defaults(name: str) -> dict[str, Any]:
    return {p.name: p.default for p in _init_parameters(name).values() if p.default is not p.empty}


def _plain(value: Any) -> Any:
    """A hyperparameter as a JSON value; what has none, such as a module, as its text."""
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _sets_epochs(cls: Any) -> bool:
    """Whether the model trains for a number of epochs (or steps) of its own, whatever the user says."""
    try:
        own = cls.trainer_arguments.fget(None)  # most return constants
    except Exception:  # those that ask their instance do so for other things
        return False
    return "max_epochs" in own


@functools.cache
def _detector_class(name: str) -> type[AnomalibDetector]:
    init_parameters = _init_parameters(name)
    base = inspect.signature(AnomalibDetector.__init__)
    hints = get_type_hints(AnomalibDetector.__init__)
    own = [
        p.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[p.name])
        for p in base.parameters.values()
        if p.name in _OURS and p.name not in init_parameters
    ]

    def __init__(self: AnomalibDetector, **kwargs: Any) -> None:
        AnomalibDetector.__init__(self, **kwargs)

    first = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    __init__.__signature__ = inspect.Signature([first, *own, *init_parameters.values()])  # type: ignore[attr-defined]
    namespace = {
        "__init__": __init__,
        "__module__": __name__,
        "__doc__": f"anomalib's {name} as a detector.",
        "model_name": name,
        "has_epochs": not _sets_epochs(_model_class(name)),
    }
    return types.new_class(f"Anomalib{name}", (AnomalibDetector,), exec_body=lambda body: body.update(namespace))
