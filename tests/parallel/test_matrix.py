"""Every parallelism and their combinations, both families, at several sizes: the losses of one process.

Not in `make test`, which has one small case of each (tests/trainer/test_parallel.py): `make test-parallel`. A case is a
few steps of a model of two blocks, since what it takes grows with the ranks, their blocks and their micro-batches.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from pretrain_api.messages.reports import Restored, Sampled
from support.trainer.parallel import GPT2, LLAMA, STEADY, Case, Laid, assert_same_training, run_cases
from support.trainer.world import RankEnd, a_corpus

COMPILING_SECONDS = 600
END = 5
"""The token that ends a document: so does every second window."""
ALONE = Laid()
SMALL = {"layers": 2}
MODELS = {
    "gpt2": GPT2 | SMALL,
    "llama": LLAMA | SMALL,
    "free head": GPT2 | SMALL | {"tiedHead": False, "bias": False},
    "post-norm": GPT2 | SMALL | {"norm": "post"},
}
SIZES = ((1, 1), (2, 1), (1, 2), (2, 2))
"""Tensor and pipeline."""
WIDE = (
    Laid(tensor=4, world_size=4),
    Laid("full", tensor=4, world_size=8),
    Laid(pipeline=4, world_size=4),
    Laid("full", pipeline=4, world_size=8),
    Laid("hybrid", pipeline=4, world_size=8, worker_size=4),
)
COMBINED = (
    Laid("full", pipeline=2, world_size=4),
    Laid(tensor=2, pipeline=2, world_size=4),
    Laid("hybrid", tensor=2, world_size=4, worker_size=2),
    Laid("full", tensor=2, pipeline=2, world_size=8),
)
CUT = (
    Laid("hybrid", world_size=4, worker_size=2),
    Laid(tensor=2, world_size=2),
    Laid("full", tensor=2, world_size=4),
    Laid(pipeline=2, world_size=4),
    *COMBINED,
)
"""One of each."""
RESHAPED = (ALONE, Laid(world_size=3), Laid("full", world_size=3), Laid(pipeline=4, world_size=4), *CUT)
OPTIONS: dict[str, dict[str, Any]] = {
    "dropout": {"model": {"dropout": 0.2}},
    "documents": {"data": {"maskDocuments": True}},
    "z-loss": {"loss": {"zLoss": 0.1}},
}
"""Each of which changes what one process computes."""
SPARING: dict[str, dict[str, Any]] = {
    "full": {"activationCheckpointing": "full", "loss": {"chunk": 7}},
    "selective": {"activationCheckpointing": "selective"},
}


def ways(shard: str, most: int) -> Iterator[Laid]:
    """Layouts of one to three replicas; hybrid ones of two and four, of which a worker has half, and of three."""
    for tensor, pipeline in SIZES:
        for replicas in (2, 3, 4) if shard == "hybrid" else (1, 2, 3):
            world_size = tensor * pipeline * replicas
            if 1 < world_size <= most:
                worker_size = world_size // 2 if shard == "hybrid" and replicas % 2 == 0 else world_size
                yield Laid(shard, tensor, pipeline, world_size, worker_size)


def a_run(corpus: Path, way: Laid, model: Mapping[str, Any], folder: Path, generation: int = 1, **more: Any) -> Case:
    """A few steps, of three micro-batches each: so replicas have different numbers of them, or none."""
    sources = [{"name": "held-out", "uri": str(corpus / "held-out")}]
    settings: dict[str, Any] = {
        "steps": 3,
        "batch": {"sequences": 12, "microBatch": 4},
        "schedule": {"kind": "constant"},
        "evaluation": {"every": 2, "sequences": 6, "sources": sources},
        "sampling": {"prompt": "w1 w3", "tokens": 3},
    } | more
    if "data" in settings:
        settings["data"] = a_data(corpus) | settings["data"]
    return way.case(corpus, model, folder, generation, **settings)


def a_data(corpus: Path) -> dict[str, Any]:
    sources = [{"name": name, "uri": str(corpus / name)} for name in ("prose", "code")]
    return {"tokenizer": str(corpus / "tokenizer.json"), "sources": sources}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return a_corpus(tmp_path_factory.mktemp("corpus"), END)


@pytest.mark.parametrize(("name", "most"), [("gpt2", 8), ("llama", 4)])
@pytest.mark.parametrize("shard", ["none", "full", "hybrid"])
def test_all_layouts_have_the_losses_of_one_process(
    corpus: Path, tmp_path: Path, name: str, most: int, shard: str
) -> None:
    laid = list(ways(shard, most))

    cases = [a_run(corpus, way, MODELS[name], tmp_path / str(number)) for number, way in enumerate((ALONE, *laid))]
    alone, *ends = run_cases(cases)

    assert_each_is(laid, ends, alone)


def test_so_has_a_head_of_its_own_without_biases(corpus: Path, tmp_path: Path) -> None:
    cases = [
        a_run(corpus, way, MODELS["free head"], tmp_path / str(number)) for number, way in enumerate((ALONE, *CUT))
    ]
    alone, *ends = run_cases(cases)

    assert_each_is(CUT, ends, alone)


def test_four_stages_and_four_tensor_ranks_have_them_too(corpus: Path, tmp_path: Path) -> None:
    cases = [a_run(corpus, way, GPT2, tmp_path / str(number)) for number, way in enumerate((ALONE, *WIDE))]
    alone, *ends = run_cases(cases)

    assert_each_is(WIDE, ends, alone)


def test_bf16_comes_near_fp32(corpus: Path, tmp_path: Path) -> None:
    alone = a_run(corpus, ALONE, MODELS["gpt2"], tmp_path / "alone")
    cases = [
        a_run(corpus, way, MODELS["gpt2"], tmp_path / str(number), precision="bf16")
        for number, way in enumerate(COMBINED)
    ]
    wanted, *ends = run_cases([alone, *cases])

    for way, end in zip(COMBINED, ends, strict=True):
        assert end.losses == pytest.approx(wanted.losses, rel=1e-2), way


@pytest.mark.parametrize(("name", "sparing"), [("gpt2", "selective"), ("llama", "full"), ("post-norm", "full")])
def test_every_option_goes_with_all(corpus: Path, tmp_path: Path, name: str, sparing: str) -> None:
    """Dropout's masks are the same everywhere, as are documents; what saves memory changes nothing."""
    model = MODELS[name] | OPTIONS["dropout"]["model"]
    loss = OPTIONS["z-loss"]["loss"]
    common: dict[str, Any] = {"optimizer": STEADY, "data": OPTIONS["documents"]["data"]}
    spared = common | SPARING[sparing] | {"loss": loss | SPARING[sparing].get("loss", {})}

    cases = [a_run(corpus, ALONE, model, tmp_path / "alone", **common, loss=loss)]
    cases += [a_run(corpus, way, model, tmp_path / str(number), **spared) for number, way in enumerate(CUT)]
    alone, *ends = run_cases(cases)

    assert_each_is(CUT, ends, alone)


def test_each_of_the_options_is_seen_in_the_losses(corpus: Path, tmp_path: Path) -> None:
    cases = [a_run(corpus, ALONE, MODELS["gpt2"], tmp_path / "without")]
    for name, option in OPTIONS.items():
        model = MODELS["gpt2"] | option.get("model", {})
        training = {field: value for field, value in option.items() if field != "model"}
        cases.append(a_run(corpus, ALONE, model, tmp_path / name, **training))
    without, *ends = run_cases(cases)

    for name, end in zip(OPTIONS, ends, strict=True):
        assert end.losses[-1] != pytest.approx(without.losses[-1], rel=1e-4), name


@pytest.mark.usefixtures("cpp_compiler")
def test_compiled_blocks_have_the_losses_of_plain_ones(corpus: Path, tmp_path: Path) -> None:
    """Each rank compiles, and waits for the others."""
    way, bare = Laid("full", pipeline=2, world_size=4), {"evaluation": None, "sampling": None}

    plain = a_run(corpus, ALONE, MODELS["llama"], tmp_path / "alone", **bare)
    compiled = a_run(corpus, way, MODELS["llama"], tmp_path / "compiled", **bare, compile=True)
    alone, end = run_cases([plain, compiled], COMPILING_SECONDS)

    assert end.exit_code == 0, end.reports[-1]
    assert end.losses == pytest.approx(alone.losses, rel=1e-5)


@pytest.mark.parametrize(("model", "stride"), [(GPT2, 5), (LLAMA, 7)], ids=["gpt2", "llama"])
def test_a_checkpoint_of_each_is_gone_on_with_by_others(
    corpus: Path, tmp_path: Path, model: Mapping[str, Any], stride: int
) -> None:
    """A step of each in turn, in an order of which none comes after the one before it in the list."""
    walk = [RESHAPED[stride * turn % len(RESHAPED)] for turn in range(len(RESHAPED))]
    bare: dict[str, Any] = {"evaluation": None, "sampling": None}

    cases = [a_run(corpus, ALONE, model, tmp_path / "alone", **bare, steps=len(walk))]
    cases += [
        a_run(corpus, way, model, tmp_path / "walk", turn, **bare, steps=turn) for turn, way in enumerate(walk, 1)
    ]
    alone, *ends = run_cases(cases)

    for way, end, wanted in zip(walk, ends, alone.losses, strict=True):
        assert end.losses == pytest.approx([wanted], rel=1e-5), way


def test_a_restart_at_the_same_size_changes_no_bit(corpus: Path, tmp_path: Path) -> None:
    """Of those that `make test` leaves out."""
    model = MODELS["gpt2"] | {"dropout": 0.1}

    cases: list[Case] = []
    for number, way in enumerate(COMBINED):
        whole, cut = tmp_path / f"{number}", tmp_path / f"{number}-restarted"
        cases += [
            a_run(corpus, way, model, whole),
            a_run(corpus, way, model, cut, steps=1),
            a_run(corpus, way, model, cut, 2),
        ]
    ends = run_cases(cases)

    for way, whole, before, after in zip(COMBINED, ends[::3], ends[1::3], ends[2::3], strict=True):
        assert numbers(before) + numbers(after) == numbers(whole), way


def test_the_weights_of_another_run_begin_each(corpus: Path, tmp_path: Path) -> None:
    """With what its optimizer keeps."""
    start = {"from": {"run": str(tmp_path / "other"), "optimizer": True}}
    ways = (ALONE, *CUT)

    cases = [a_run(corpus, Laid("full", world_size=2), MODELS["llama"], tmp_path / "other")]
    cases += [
        a_run(corpus, way, MODELS["llama"], tmp_path / str(number), **start, seed=7) for number, way in enumerate(ways)
    ]
    other, alone, *ends = run_cases(cases)

    assert alone.losses[0] < other.losses[0]
    assert [end.of(Restored)[0].origin for end in ends] == [alone.of(Restored)[0].origin] * len(ends)
    assert_each_is(CUT, ends, alone)


def assert_each_is(ways: tuple[Laid, ...] | list[Laid], ends: list[RankEnd], alone: RankEnd) -> None:
    """As one process was; all that are not are named."""
    failed: list[str] = []
    for way, end in zip(ways, ends, strict=True):
        print(way, worst(end, alone))
        try:
            assert_same_training(end, alone)
        except AssertionError:
            failed.append(f"{way}: {described(end)} instead of {described(alone)}")
    assert not failed, "\n\n".join(failed)


def described(end: RankEnd) -> str:
    if end.exit_code:
        return f"{end.reports[-1]}"
    return f"{end.losses} {[step.grad_norm for step in end.steps]} {[sample.text for sample in end.of(Sampled)]}"


def worst(end: RankEnd, alone: RankEnd) -> float:
    """The greatest relative difference of a step's loss."""
    pairs = zip(end.losses, alone.losses, strict=False)
    return max((abs(mine - other) / other for mine, other in pairs), default=float("nan"))


def numbers(end: RankEnd) -> list[tuple[float, float]]:
    return [(step.loss, step.grad_norm) for step in end.steps]
