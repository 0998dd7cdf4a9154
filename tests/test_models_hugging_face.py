"""Hugging Face classifiers: the units of the inputs, what processors do to them, padding, and loading without code."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import saddlepoint as sp
from saddlepoint.models.huggingface_model import adapted, embed_tokens, hugging_face, recognises

transformers = pytest.importorskip("transformers")

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def image_classifier() -> Any:
    torch.manual_seed(0)
    config = transformers.ViTConfig(**SMALL, image_size=16, patch_size=4, num_labels=5)
    return transformers.ViTForImageClassification(config).eval()


def audio_classifier() -> Any:
    torch.manual_seed(0)
    config = transformers.Wav2Vec2Config(
        **SMALL, conv_dim=(8, 8), conv_stride=(5, 2), conv_kernel=(10, 3), num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2, classifier_proj_size=8, num_labels=3, feat_extract_norm="layer", conv_bias=True,
    )  # fmt: skip
    return transformers.Wav2Vec2ForSequenceClassification(config).eval()


def text_classifier() -> Any:
    torch.manual_seed(0)
    config = transformers.BertConfig(**SMALL, vocab_size=50, num_labels=3, pad_token_id=0)
    return transformers.BertForSequenceClassification(config).eval()


def images(count: int = 4, size: int = 16) -> Tensor:
    """Of 8 bits, as processors want them."""
    return torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(0)) / 255


# Images


PROCESSORS = {
    "ViT": {},
    "ViT with means and deviations of its own": {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]},
    "ViT without normalisation": {"do_normalize": False},
    "ViT in units of its own": {"rescale_factor": 1 / 127.5, "do_normalize": False},
    "ViT without rescaling": {"do_rescale": False, "image_mean": [120.0] * 3, "image_std": [60.0] * 3},
    "EfficientNet": {"rescale_factor": 1 / 127.5, "rescale_offset": True, "include_top": False},
    "MobileViT": {"do_center_crop": False},
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_the_network_sees_what_the_processor_would_give_it(name: str) -> None:
    family = getattr(transformers, f"{name.split()[0]}ImageProcessorPil")
    processor = family(do_resize=False, **PROCESSORS[name])
    net, x = image_classifier(), images()
    raw = [(255 * image).round().byte().permute(1, 2, 0).numpy() for image in x]
    expected = net(processor(raw, return_tensors="pt")["pixel_values"]).logits
    model = hugging_face(net, processor)
    torch.testing.assert_close(model.logits(x), expected.detach(), rtol=1e-5, atol=1e-5)
    settings = hugging_face(net, json.loads(processor.to_json_string()))
    assert settings.logits(x).equal(model.logits(x))


def test_an_image_classifier_is_attacked_in_units_of_its_images() -> None:
    x = images()
    model = hugging_face(image_classifier(), transformers.ViTImageProcessorPil())
    assert model.bounds == (0, 1)
    assert model.describe()["name"] == "ViTForImageClassification"
    result = sp.attack(model, x, model.predict(x), sp.attacks.PGD(steps=5), sp.Linf(8 / 255))
    assert bool((result.distances["linf"] <= 8 / 255).all())
    assert int(result.queries.backward.sum()) > 0
    assert (
        model.features(
            x, "net.vit.encoder.layer.0" if hasattr(model.networks()[0].net.vit, "encoder") else "net.vit.layers.0"
        ).shape[0]
        == 4
    )


def test_a_processor_with_several_parts() -> None:
    inner = transformers.ViTImageProcessorPil(image_mean=[0.1] * 3)
    both, x = SimpleNamespace(image_processor=inner, tokenizer=None), images()
    net = image_classifier()
    assert hugging_face(net, both).logits(x).equal(hugging_face(net, inner).logits(x))


def test_without_a_processor_it_is_the_network_as_it_is() -> None:
    net, x = image_classifier(), images()
    assert recognises(net)
    assert not recognises(torch.nn.Linear(1, 1))
    assert adapted(net).access is sp.Access.PARAMETERS
    torch.testing.assert_close(adapted(net).call(x).logits, net(x).logits)
    with pytest.raises(sp.InputError, match="takes pixel_values: give hugging_face"):
        hugging_face(net)
    with pytest.raises(sp.InputError, match="image_mean"):
        hugging_face(net, {"do_normalize": True})
    with pytest.raises(sp.InputError, match="transformers model"):
        hugging_face(torch.nn.Linear(1, 1))


# Sounds


@pytest.mark.parametrize("normalised", [True, False])
def test_waveforms_are_normalised_one_by_one(normalised: bool) -> None:
    extractor = transformers.Wav2Vec2FeatureExtractor(do_normalize=normalised)
    net = audio_classifier()
    x = torch.rand(3, 400, generator=torch.Generator().manual_seed(0)) - 0.3
    prepared = extractor(list(x.numpy()), sampling_rate=16000, return_tensors="pt")["input_values"]
    model = hugging_face(net, extractor)
    torch.testing.assert_close(model.logits(x), net(prepared).logits.detach(), rtol=1e-5, atol=1e-6)
    assert model.bounds == (-1, 1)
    assert torch.allclose(model.logits(x + 0.1), model.logits(x), atol=1e-5) == normalised
    point = x.double().requires_grad_()
    network = model.networks()[0].double()
    assert torch.autograd.gradcheck(lambda point: network(point).logits, point, fast_mode=True)


def test_spectrograms_are_refused() -> None:
    with pytest.raises(sp.InputError, match="spectrograms"):
        hugging_face(audio_classifier(), SimpleNamespace(num_mel_bins=128, feature_size=1))
    with pytest.raises(sp.InputError, match="spectrograms"):
        hugging_face(audio_classifier(), SimpleNamespace(feature_size=80))


# Texts


IDS = torch.tensor([[5, 9, 12, 3, 7], [8, 4, 0, 0, 0], [11, 30, 2, 0, 0]])
MASK = (IDS != 0).long()


def test_texts_are_attacked_as_embeddings_and_padding_stays() -> None:
    net = text_classifier()
    x, model = embed_tokens(net, IDS, MASK), hugging_face(net)
    assert x.shape == (3, 5, 32)
    assert (x != 0).any(-1).long().equal(MASK)
    assert model.bounds is None
    torch.testing.assert_close(model.logits(x), net(input_ids=IDS, attention_mask=MASK).logits.detach(), rtol=1e-5, atol=1e-6)
    alone = torch.cat([model.logits(text[None, : int(length)]) for text, length in zip(x, MASK.sum(1), strict=True)])
    torch.testing.assert_close(model.logits(x), alone, rtol=1e-5, atol=1e-6)
    threat = sp.L2(1.0, mask=(x != 0).any(-1, keepdim=True).expand_as(x))
    result = sp.attack(model, x, model.predict(x), sp.attacks.PGD(steps=5), threat)
    assert (result.adversarial != 0).any(-1).long().equal(MASK)
    assert not result.adversarial.equal(x)


def test_a_network_for_which_embeddings_mean_something_else_is_refused() -> None:
    net = text_classifier()
    table = net.get_input_embeddings()
    net.get_input_embeddings = lambda: lambda ids: 3 * table(ids)  # as if it scaled them
    with pytest.raises(sp.ModelError, match="other logits for these texts' embeddings"):
        embed_tokens(net, IDS, MASK)


def test_a_decoder_needs_its_padding_on_the_left() -> None:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=32, n_layer=1, n_head=2, vocab_size=50, num_labels=3, pad_token_id=0, bos_token_id=1, eos_token_id=1
    )
    net = transformers.GPT2ForSequenceClassification(config).eval()
    with pytest.raises(sp.ModelError, match="padding on the left"):
        embed_tokens(net, IDS, MASK)
    full = embed_tokens(net, IDS[:1])
    torch.testing.assert_close(hugging_face(net).logits(full), net(input_ids=IDS[:1]).logits.detach(), rtol=1e-5, atol=1e-6)


# Folders


def stored(folder: Path) -> Any:
    net = image_classifier()
    net.save_pretrained(folder)
    transformers.ViTImageProcessorPil(image_mean=[0.2] * 3).save_pretrained(folder)
    return net


def test_a_folder_is_read_with_its_processor(tmp_path: Path) -> None:
    net, x = stored(tmp_path), images()
    expected = hugging_face(net, transformers.ViTImageProcessorPil(image_mean=[0.2] * 3)).logits(x)
    torch.testing.assert_close(hugging_face(tmp_path).logits(x), expected)
    torch.testing.assert_close(hugging_face(str(tmp_path)).logits(x), expected)


def test_nothing_in_a_folder_is_run(tmp_path: Path) -> None:
    net, x = stored(tmp_path), images()
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Net"}, "attn_implementation": "some/kernel"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    processor = transformers.ViTImageProcessorPil(image_mean=[0.2] * 3)
    torch.testing.assert_close(hugging_face(tmp_path).logits(x), hugging_face(net, processor).logits(x))


def test_folders_that_hold_no_classifier_are_refused(tmp_path: Path) -> None:
    def refused(match: str, folder: Path) -> None:
        with pytest.raises(sp.DataError, match=match):
            hugging_face(folder)

    refused(r"config\.json can't be read", tmp_path / "absent")
    whole = tmp_path / "whole"
    stored(whole)
    cut = Path(shutil.copytree(whole, tmp_path / "cut"))
    (cut / "model.safetensors").write_bytes((whole / "model.safetensors").read_bytes()[:1000])
    refused("can't be loaded", cut)
    pickled = Path(shutil.copytree(whole, tmp_path / "pickled"))
    (pickled / "model.safetensors").unlink()
    torch.save(image_classifier().state_dict(), pickled / "pytorch_model.bin")
    refused("safetensors", pickled)
    for text in ("{", "[]", '{"architectures": ["ViTModel"]}', '{"architectures": ["AnyForClassification"]}'):
        (cut / "config.json").write_text(text)
        refused(r"config\.json can't be read|no classifier", cut)


def test_without_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(sp.MissingExtraError, match=r"saddlepoint\[huggingface\]"):
        hugging_face(tmp_path)
