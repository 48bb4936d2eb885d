"""Options of the model's computation: each agrees with an independent implementation."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor.runtime.cache_dir_utils import default_cache_dir
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM
from transformers.models.openai import OpenAIGPTConfig

from pretrain_api.messages.reports import StepDone
from pretrain_api.messages.trainer_config import TrainerConfig
from pretrain_api.spec.model import Model, resolve
from pretrain_trainer.core.environment import Environment
from pretrain_trainer.core.errors import InvalidInput
from pretrain_trainer.loop.train import train
from pretrain_trainer.models.activation_checkpointing import recompute_activations
from pretrain_trainer.models.compile import CACHE_VARIABLE, compile_blocks
from pretrain_trainer.models.decoder import Decoder, build, initialise
from pretrain_trainer.models.document_mask import end_of_document
from pretrain_trainer.models.loss import Objective
from support.trainer.world import FakeLink, NoCheckpointer, a_config, a_corpus, run_ranks, run_training

ROWS, WIDTH = 112, 32
END = 5


def a_model(**fields: Any) -> Decoder:
    """Off the initial zeros and ones, so that every term counts."""
    shape = resolve(Model.model_validate({"layers": 2, "heads": 4, "width": WIDTH, "context": 32} | fields))
    model = build(shape, ROWS, torch.device("cpu"))
    initialise(model, 1)
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def some_windows() -> Tensor:
    return torch.randint(ROWS, (2, 33), generator=torch.Generator().manual_seed(3))


def loss_and_gradients(model: Decoder, loss: Callable[[Decoder, Tensor], Tensor]) -> tuple[float, dict[str, Tensor]]:
    torch.manual_seed(4)
    model.zero_grad()
    value = loss(model, some_windows())
    value.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return float(value.detach()), {name: gradient.clone() for name, gradient in gradients.items()}


class Calls(TorchDispatchMode):
    """Counts operations, and sees the most numbers that a result over the vocabulary has."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.count[func.overloadpacket.__name__] += 1
        weights = (WIDTH, ROWS)  # the embedding, transposed
        if isinstance(result, Tensor) and result.dim() == 2 and result.shape[1] == ROWS and result.shape != weights:
            self.most = max(self.most, result.numel())
        return result


@torch.no_grad()
def test_post_norm_has_the_logits_of_the_first_gpt() -> None:
    model = a_model(norm="post").eval()
    config = OpenAIGPTConfig(vocab_size=ROWS, n_positions=32, n_embd=WIDTH, n_layer=2, n_head=4)
    peer = AutoModelForCausalLM.from_config(config).eval()
    names = {"attention.qkv": "attn.c_attn", "attention.proj": "attn.c_proj", "norm_1": "ln_1", "norm_2": "ln_2",
             "up": "mlp.c_fc", "down": "mlp.c_proj"}  # fmt: skip
    state = {"transformer.tokens_embed.weight": cast("nn.Embedding", model.token_embedding).weight}
    for name, value in model.state_dict().items():
        if name == "position_embedding.weight":
            state["transformer.positions_embed.weight"] = value
        elif name.startswith("blocks."):
            _, layer, *path, kind = name.split(".")
            theirs = names[".".join(path)]
            if path[-1] == "qkv":  # ours by heads, theirs all queries first
                value = value.unflatten(0, (4, 3, WIDTH // 4)).transpose(0, 1).flatten(0, 2)
            transposed = kind == "weight" and "ln" not in theirs
            state[f"transformer.h.{layer}.{theirs}.{kind}"] = value.T if transposed else value

    missing, unexpected = peer.load_state_dict(state, strict=False)
    peer.tie_weights()

    assert ([name for name in missing if name != "lm_head.weight"], unexpected) == ([], [])
    tokens = some_windows()[:, :-1]
    torch.testing.assert_close(model(tokens), peer(tokens).logits, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("fields", [{}, {"family": "llama", "kvHeads": 2}], ids=["gpt2, tied", "llama"])
@pytest.mark.parametrize("z", [0.0, 0.01])
def test_the_loss_by_chunks_is_the_whole_one_without_all_logits(fields: dict[str, Any], z: float) -> None:
    model = a_model(**fields)
    whole, gradients = loss_and_gradients(model, Objective(z))
    with Calls() as calls:
        chunked, same = loss_and_gradients(model, Objective(z, chunk=9))

    assert chunked == pytest.approx(whole, rel=1e-6)
    assert all(torch.allclose(same[name], gradient, atol=1e-4, rtol=1e-4) for name, gradient in gradients.items())
    assert 0 < calls.most <= 9 * ROWS


def test_z_loss_is_in_the_gradient_and_not_in_the_value() -> None:
    model, z = a_model(), 0.01

    def written_out(model: Decoder, windows: Tensor) -> Tensor:
        loss = torch.zeros(())
        for logits, target in zip(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten(), strict=True):
            denominator = logits.exp().sum()
            loss = loss - (logits[target].exp() / denominator).log() + z * denominator.log() ** 2
        return loss

    plain, without = loss_and_gradients(model, Objective())
    value, gradients = loss_and_gradients(model, Objective(z))
    _, wanted = loss_and_gradients(model, written_out)

    assert value == plain
    assert all(torch.allclose(gradients[name], gradient, atol=1e-3, rtol=1e-3) for name, gradient in wanted.items())
    assert not torch.allclose(gradients["norm.weight"], without["norm.weight"], atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_documents_side_by_side_have_the_logits_of_each_alone() -> None:
    """Rotary positions are relative, so a document's place in the window does not matter."""
    alone = a_model(family="llama", kvHeads=2)
    masked = a_model(family="llama", kvHeads=2)
    masked.document_end = END
    tokens = torch.arange(10, 42)
    tokens[[7, 8, 20]] = END  # documents of 8, 1, 12 and 11 tokens

    together = masked(tokens[None])[0]

    apart = torch.cat([alone(part[None])[0] for part in tokens.split([8, 1, 12, 11])])
    torch.testing.assert_close(together, apart, atol=2e-5, rtol=1e-4)
    assert not torch.allclose(alone(tokens[None])[0], apart, atol=1e-3)


@pytest.mark.parametrize(("words", "end"), [({"a": 0, "</s>": 1}, 1), ({"</s>": 0, "<|endoftext|>": 1}, 1)])
def test_the_token_that_ends_documents_is_found(words: dict[str, int], end: int) -> None:
    assert end_of_document(Tokenizer(WordLevel(words, unk_token="a"))) == end


def test_without_such_a_token_masking_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"training.data.maskDocuments: .*<\|endoftext\|>"):
        end_of_document(Tokenizer(WordLevel({"a": 0}, unk_token="a")))


@pytest.mark.parametrize(("how", "products", "activations"), [("selective", 1, 2), ("full", 2, 2)])
def test_activations_computed_again_give_the_same_bits(how: Any, products: int, activations: int) -> None:
    model = a_model(dropout=0.1)
    with Calls() as plain:
        value, gradients = loss_and_gradients(model, Objective())
    recompute_activations(model, how)
    with Calls() as calls:
        again, same = loss_and_gradients(model, Objective())

    assert again == value
    assert all(torch.equal(same[name], gradient) for name, gradient in gradients.items())
    assert calls.count["addmm"] == products * plain.count["addmm"]
    assert calls.count["gelu"] == activations * plain.count["gelu"]


@pytest.mark.bare
@pytest.mark.usefixtures("cpp_compiler")
def test_compiled_blocks_keep_names_and_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, "replaced")
    monkeypatch.delenv(CACHE_VARIABLE)
    model = a_model()
    names = list(model.state_dict())
    value, gradients = loss_and_gradients(model, Objective())
    recompute_activations(model, "selective")
    compile_blocks(model, tmp_path, {}, backend="aot_eager")
    compiled, same = loss_and_gradients(model, Objective())

    assert list(model.state_dict()) == names
    assert list(same) == list(gradients)
    assert compiled == pytest.approx(value, rel=1e-6)
    assert all(torch.allclose(same[name], gradient, atol=1e-4, rtol=1e-4) for name, gradient in gradients.items())
    assert os.environ[CACHE_VARIABLE] == str(tmp_path / "inductor")


@pytest.mark.usefixtures("cpp_compiler")
@pytest.mark.parametrize(
    ("before", "after"), [(None, "{cache}"), (default_cache_dir(), "{cache}"), ("/theirs", "/theirs")]
)
def test_compiled_code_is_kept_in_the_cache_unless_the_user_says_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str | None, after: str
) -> None:
    """Torch sets the variable to its own default when some of its modules are imported."""
    monkeypatch.setenv(CACHE_VARIABLE, before or "replaced")
    if before is None:
        monkeypatch.delenv(CACHE_VARIABLE)

    compile_blocks(a_model(), tmp_path, {}, backend="eager")

    assert os.environ[CACHE_VARIABLE] == after.format(cache=tmp_path / "inductor")


def test_compiling_without_a_compiler_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))

    with pytest.raises(InvalidInput, match=r"training\.compile needs a C\+\+ compiler"):
        compile_blocks(a_model(), tmp_path, {})


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return a_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.mark.parametrize("shard", ["none", "full"])
def test_ranks_that_save_memory_have_the_losses_of_one_that_does_not(corpus: Path, shard: str) -> None:
    sparing = {"loss": {"chunk": 7}, "activationCheckpointing": "selective", "parallelism": {"shard": shard}}

    alone = run_training(a_config(corpus, {"steps": 4}), 1)[0].losses
    spared = run_training(a_config(corpus, {"steps": 4, **sparing}), 2)[0].losses

    assert spared == pytest.approx(alone, rel=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("cpp_compiler")
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("shard", "world_size"), [("none", 1), ("none", 2), ("full", 2)])
def test_a_compiled_run_has_the_losses_of_a_plain_one_and_the_next_one_compiles_nothing(
    corpus: Path, tmp_path: Path, shard: str, world_size: int
) -> None:
    compiled = {"compile": True, "parallelism": {"shard": shard}, "steps": 4}
    config = a_config(corpus, compiled, cache={"path": str(tmp_path)})

    plain = run_training(a_config(corpus, {"steps": 4}), 1)[0].losses
    first = run_ranks(world_size, _train_compiled, config, seconds=600)
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "inductor").rglob("*.so")}
    second = run_ranks(world_size, _train_compiled, config, seconds=600)

    for losses, _ in (first[0], second[0]):
        assert losses == pytest.approx(plain, rel=1e-5)
    assert made
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "inductor").rglob("*.so")} == made
    assert [compilations for _, compilations in second] == [0] * world_size


def _train_compiled(environ: Mapping[str, str], config: TrainerConfig) -> tuple[list[float], int]:
    """(the losses that it reported, how many graphs were compiled and not found)."""
    link = FakeLink()
    train(config, link, lambda *_: NoCheckpointer(), Environment.of(environ))
    losses = [report.loss for report in link.reports if isinstance(report, StepDone)]
    return losses, counters["inductor"]["fxgraph_cache_miss"]
