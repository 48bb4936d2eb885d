"""The model gives the logits of Hugging Face's, with the same weights, in both families."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.gpt2 import GPT2Config
from transformers.models.llama import LlamaConfig

from pretrain_api.spec.model import Model, ResolvedModel, resolve
from pretrain_trainer.hf import mapping as hugging_face
from pretrain_trainer.models.decoder import Decoder, build, initialise

ROWS = 96
SCALING = {"factor": 8.0, "lowFrequencyFactor": 1.0, "highFrequencyFactor": 4.0, "originalContext": 16}
SHAPES = {
    "gpt2": {},
    "gpt2 with a head of its own": {"tiedHead": False},
    "gpt2 without biases": {"bias": False},
    "gpt2 with a narrow perceptron": {"hidden": 48},
    "llama": {"family": "llama"},
    "llama with grouped queries and a tied head": {"family": "llama", "kvHeads": 2, "tiedHead": True},
    "llama with stretched positions": {"family": "llama", "ropeTheta": 500.0, "ropeScaling": SCALING},
}


def a_shape(fields: dict[str, object]) -> ResolvedModel:
    return resolve(Model.model_validate({"layers": 3, "heads": 4, "width": 32, "context": 64} | fields))


def a_model(shape: ResolvedModel) -> Decoder:
    """Off the initial zeros and ones, so that every term counts."""
    model = build(shape, ROWS, torch.device("cpu"))
    initialise(model, 1)
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def their_model(shape: ResolvedModel) -> torch.nn.Module:
    kind = GPT2Config if shape.family == "gpt2" else LlamaConfig
    return AutoModelForCausalLM.from_config(kind(**hugging_face.config(shape, ROWS))).eval()


def some_tokens() -> torch.Tensor:
    return torch.randint(ROWS, (2, 64), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("fields", SHAPES.values(), ids=SHAPES)
@torch.no_grad()
def test_the_logits_are_those_of_transformers(fields: dict[str, object]) -> None:
    shape = a_shape(fields)
    model, peer = a_model(shape), their_model(shape)

    missing, unexpected = peer.load_state_dict(hugging_face.export_state(model.state_dict(), shape), strict=False)
    peer.tie_weights()

    assert [name for name in missing if name != "lm_head.weight" or not shape.tied_head] == []
    assert unexpected == []
    torch.testing.assert_close(model(some_tokens()), peer(some_tokens()).logits, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("fields", SHAPES.values(), ids=SHAPES)
def test_what_was_exported_comes_back(fields: dict[str, object]) -> None:
    shape = a_shape(fields)
    state = a_model(shape).state_dict()

    back = hugging_face.import_state(hugging_face.export_state(state, shape), shape)

    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())


@torch.no_grad()
def test_a_later_token_does_not_change_earlier_logits_of_a_llama() -> None:
    model, tokens = a_model(a_shape({"family": "llama", "kvHeads": 2})), some_tokens()
    changed = tokens.clone()
    changed[:, 40] = (tokens[:, 40] + 1) % ROWS

    before, after = model(tokens), model(changed)

    assert torch.equal(before[:, :40], after[:, :40])
    assert not torch.allclose(before[:, 40], after[:, 40])
