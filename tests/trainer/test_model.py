"""The GPT-2 style decoder."""

import math

import pytest
import torch
from torch import Tensor

from pretrain_api.spec.model import Model, ResolvedModel, resolve
from pretrain_trainer.models.decoder import Decoder, build, initialise
from pretrain_trainer.models.loss import Objective

ROWS = 64


def a_shape(**fields: object) -> ResolvedModel:
    return resolve(Model.model_validate({"layers": 3, "heads": 4, "width": 32, "context": 16} | fields))


def a_model(seed: int = 1, **fields: object) -> Decoder:
    model = build(a_shape(**fields), ROWS, torch.device("cpu"))
    initialise(model, seed)
    return model


def reference(model: Decoder, tokens: Tensor) -> Tensor:
    """GPT-2 written out for one sequence, head by head and position by position."""
    state = {name: value.double() for name, value in model.state_dict().items()}

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-5)
        return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def gelu(x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    x = state["token_embedding.weight"][tokens] + state["position_embedding.weight"][: len(tokens)]
    for index in range(len(model.blocks)):
        block, size = f"blocks.{index}", 32 // 4
        heads = linear(norm(x, f"{block}.norm_1"), f"{block}.attention.qkv").view(-1, 4, 3, size)
        query, key, value = (part.flatten(1) for part in heads.unbind(2))
        mixed = torch.zeros_like(x)
        for head in range(4):
            part = slice(head * size, (head + 1) * size)
            for place in range(len(tokens)):
                scores = key[: place + 1, part] @ query[place, part] / math.sqrt(size)
                mixed[place, part] = torch.softmax(scores, 0) @ value[: place + 1, part]
        x = x + linear(mixed, f"{block}.attention.proj")
        x = x + linear(gelu(linear(norm(x, f"{block}.norm_2"), f"{block}.up")), f"{block}.down")
    return norm(x, "norm") @ state["token_embedding.weight"].T


def test_logits_equal_those_of_gpt_2_written_out() -> None:
    model = a_model()
    for parameter in model.parameters():  # off the initial zeros and ones, so that every term counts
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    tokens = torch.randint(ROWS, (16,), generator=torch.Generator().manual_seed(3))

    torch.testing.assert_close(model(tokens[None])[0].double(), reference(model, tokens), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("place", [1, 7, 15])
def test_a_later_token_does_not_change_earlier_logits(place: int) -> None:
    model, tokens = a_model(), torch.arange(16)[None]
    changed = tokens.clone()
    changed[0, place] = 40

    before, after = model(tokens), model(changed)

    assert torch.equal(before[0, :place], after[0, :place])
    assert not torch.allclose(before[0, place], after[0, place])


def test_initial_weights_are_those_of_the_seed_and_of_gpt_2() -> None:
    model = a_model(seed=1, width=128)
    state, same, other = model.state_dict(), a_model(seed=1, width=128).state_dict(), a_model(seed=2, width=128)

    assert all(torch.equal(value, same[name]) for name, value in state.items())
    assert not torch.equal(state["token_embedding.weight"], other.state_dict()["token_embedding.weight"])
    assert state["blocks.0.up.weight"].std() == pytest.approx(0.02, rel=0.05)
    assert state["blocks.0.down.weight"].std() == pytest.approx(0.02 / math.sqrt(2 * 3), rel=0.05)
    assert state["blocks.0.attention.proj.weight"].std() == pytest.approx(0.02 / math.sqrt(2 * 3), rel=0.05)
    assert state["norm.weight"].eq(1).all()
    assert state["blocks.0.up.bias"].eq(0).all()


def test_the_initial_loss_is_that_of_a_uniform_guess() -> None:
    windows = torch.randint(ROWS, (8, 17), generator=torch.Generator().manual_seed(3))

    assert Objective()(a_model(), windows).item() / (8 * 16) == pytest.approx(math.log(ROWS), rel=0.02)


def test_a_tied_head_has_no_weights_of_its_own() -> None:
    tied = sum(parameter.numel() for parameter in a_model().parameters())
    untied = sum(parameter.numel() for parameter in a_model(tiedHead=False).parameters())

    assert untied - tied == ROWS * 32


def test_without_bias_no_layer_has_one() -> None:
    assert not [name for name, _ in a_model(bias=False).named_parameters() if name.endswith("bias")]


def test_dropout_acts_in_training_only_and_by_the_seed() -> None:
    model, tokens = a_model(dropout=0.2), torch.arange(16)[None]

    first, same, other, higher = (model(tokens, seed=seed) for seed in (1, 1, 2, 1 << 33 ^ 1))
    model.eval()

    assert torch.equal(first, same)
    assert not torch.allclose(first, other)
    assert not torch.allclose(first, higher)
    assert torch.equal(model(tokens, seed=1), model(tokens, seed=2))
