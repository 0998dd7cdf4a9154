"""Classifiers of the transformers library: images, waveforms, and texts as embeddings."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn

from saddlepoint.errors import DataError, InputError, MissingExtraError, ModelError
from saddlepoint.models.adapt import Adapted
from saddlepoint.models.freeze import frozen
from saddlepoint.taxonomy import Access

if TYPE_CHECKING:
    from saddlepoint.models.torch_model import Model

_EMBEDDINGS, _PIXELS, _WAVEFORM = "inputs_embeds", "pixel_values", "input_values"
_PARTS = ("image_processor", "feature_extractor")  # of a processor that has others besides
_SETTINGS = ("preprocessor_config.json", "processor_config.json")
_AGREEMENT = 1e-3  # differences above this part of the largest logit are no rounding
_NOT_FROM_FILES = ("auto_map", "attn_implementation", "quantization_config")  # may bring in code; none is needed


@final
class HuggingFaceNetwork(nn.Module):
    """A transformers classifier as a function of its first floating input, whose name is `argument`.

    A text is given as embeddings (N, T, D). Positions whose embedding is 0 throughout are padding: they are masked.
    """

    def __init__(self, net: Any, prepare: Callable[[Tensor], Tensor] | None = None) -> None:  # Any: transformers is an extra
        super().__init__()
        self.net, self.prepare = net, prepare
        self.argument: str = _EMBEDDINGS if net.main_input_name == "input_ids" else net.main_input_name

    def forward(self, x: Tensor) -> Any:  # Any: `Model` finds the logits in it
        more = {"attention_mask": (x != 0).any(-1).long()} if self.argument == _EMBEDDINGS else {}
        return self.net(**{self.argument: x if self.prepare is None else self.prepare(x)}, **more)


def recognises(net: object) -> bool:
    """Whether it is a transformers model, or a `HuggingFaceNetwork`."""
    return isinstance(net, HuggingFaceNetwork) or _of_transformers(net)


def _of_transformers(net: object) -> bool:
    return any(cls.__name__ == "PreTrainedModel" and cls.__module__.startswith("transformers.") for cls in type(net).__mro__)


def adapted(net: object) -> Adapted:
    """What `Model` needs of a transformers model that takes what its processor would give it."""
    network = net if isinstance(net, HuggingFaceNetwork) else HuggingFaceNetwork(net)
    return Adapted(network, Access.PARAMETERS, name=type(network.net).__name__)


def hugging_face(net: object, processor: object = None, *, access: Access | None = None) -> Model:
    """A model from a transformers classifier, with the units that its inputs had before the processor.

    net: the classifier, or a folder with its config.json and safetensors. Nothing is downloaded, and no code in it is run.
    processor: the image processor or feature extractor that belongs to it, the one from the folder by default. Only what it
        does to the values is taken over, exactly and differentiably; resizing, cropping and padding are the caller's.

    Images (N, C, H, W) are in [0, 1]. Waveforms (N, T) are in [-1, 1], and are normalised one by one if the feature extractor
    does so. Texts are embeddings (N, T, D) without bounds, from `embed_tokens`; they need no processor.

    Errors: `InputError` where the processor is missing, or computes what is not differentiable here (spectrograms); `DataError`
    for folders that can't be loaded; `MissingExtraError` without transformers.
    """
    from saddlepoint.models.torch_model import Model

    if isinstance(net, str | os.PathLike):
        folder = Path(net)
        net = _loaded(folder)
        processor = _settings(folder) if processor is None else processor
    if not _of_transformers(net):
        raise InputError(f"net must be a transformers model or the folder of one; got {type(net).__name__}")
    name, argument = type(net).__name__, HuggingFaceNetwork(net).argument
    for part in _PARTS:
        processor = _get(processor, part, processor)
    if argument == _EMBEDDINGS:
        return Model(HuggingFaceNetwork(net), bounds=None, access=access)
    if argument not in (_PIXELS, _WAVEFORM) or processor is None:
        raise InputError(
            f"{name} takes {argument}: give hugging_face() the processor that makes them, or attack them as they are, "
            "sp.Model(net, bounds=None)"
        )
    if argument == _PIXELS:
        mean, std = _image_statistics(processor)
        flip = _channels_reversed if _get(processor, "do_flip_channel_order", False) else None
        return Model(HuggingFaceNetwork(net, flip), mean=mean, std=std, access=access)
    if _get(processor, "num_mel_bins") is not None or _get(processor, "feature_size", 1) != 1:
        raise InputError(
            f"{type(processor).__name__} computes spectrograms, which hugging_face() can't differentiate: attack those, "
            "sp.Model(net, bounds=None)"
        )
    each = _normalised if _get(processor, "do_normalize", False) else None
    return Model(HuggingFaceNetwork(net, each), bounds=(-1, 1), access=access)


def embed_tokens(net: Any, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Embeddings (N, T, D) of tokens (N, T), in the form that models of texts take: 0 where the mask (N, T) is 0.

    To leave the padding as it is give the threat a mask, `sp.L2(eps, mask=(x != 0).any(-1, keepdim=True).expand_as(x))`.
    Errors: `ModelError` if the network gives other logits for the embeddings than for the tokens, as those do that scale them
    first, or that read the last token of a text that is padded on the right.
    """
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    network = HuggingFaceNetwork(net)
    with frozen((network,)), torch.no_grad():
        x: Tensor = net.get_input_embeddings()(input_ids) * mask[..., None]
        expected, found = net(input_ids=input_ids, attention_mask=mask).logits, network(x).logits
    difference, scale = float((found - expected).abs().max()), float(expected.abs().max())
    if not difference <= _AGREEMENT * scale:
        raise ModelError(
            f"{type(net).__name__} gives other logits for these texts' embeddings than for their tokens (by {difference:.3g}): "
            "does it scale embeddings, or want padding on the left?"
        )
    return x


def _get(settings: object, name: str, default: Any = None) -> Any:  # Any: a number, a flag or a list
    """One of a processor's settings, from the object or from its JSON."""
    found = settings.get(name) if isinstance(settings, Mapping) else getattr(settings, name, None)
    return default if found is None else found


def _image_statistics(processor: object) -> tuple[Tensor, Tensor]:
    """mean and std for images in [0, 1]: what the processor makes of 255 x is (x - mean) / std."""
    mean, std = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    if _get(processor, "do_normalize", False):
        stated = [_get(processor, name) for name in ("image_mean", "image_std")]
        if None in stated:
            raise InputError("the image processor normalises, but doesn't say by which image_mean and image_std")
        mean, std = (torch.tensor(value, dtype=torch.float64) for value in stated)
    if not _get(processor, "do_rescale", True):
        return mean / 255, std / 255
    scale = 255 * _get(processor, "rescale_factor", 1 / 255)
    return (mean + bool(_get(processor, "rescale_offset", False))) / scale, std / scale


def _channels_reversed(x: Tensor) -> Tensor:
    return x.flip(1)


def _normalised(x: Tensor) -> Tensor:
    """Each waveform with mean 0 and variance 1, as Wav2Vec2's feature extractor."""
    return (x - x.mean(1, keepdim=True)) / (x.var(1, correction=0, keepdim=True) + 1e-7).sqrt()


def _settings(folder: Path) -> Any:  # Any: what JSON holds
    """The processor's settings in a model's folder, None if there are none."""
    found = [folder / name for name in _SETTINGS if (folder / name).is_file()]
    return _json(found[0]) if found else None


def _json(path: Path) -> Any:  # Any: what JSON holds
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} can't be read: {error}") from error


def _loaded(folder: Path) -> Any:  # Any: transformers is an extra
    """The classifier in a folder: one of transformers' own classes, with weights from safetensors."""
    try:
        import transformers
    except ImportError:
        raise MissingExtraError("loading a Hugging Face model", "transformers", "huggingface") from None
    document = _json(folder / "config.json")
    names = document.get("architectures") if isinstance(document, dict) else None
    name = str(names[0]) if names else "None"
    found = getattr(transformers, name, None)
    if not name.endswith("Classification") or found is None:
        raise DataError(f"{folder}: its architecture, {name}, is no classifier of transformers {transformers.__version__}")
    config = found.config_class.from_dict({key: value for key, value in document.items() if key not in _NOT_FROM_FILES})
    try:
        return found.from_pretrained(
            folder, config=config, local_files_only=True, use_safetensors=True, trust_remote_code=False
        )
    except Exception as error:  # transformers', safetensors' and torch's
        raise DataError(f"{folder} can't be loaded as a {name} with safetensors: {error}") from error
