"""Jobs that break one rule each, for both who must refuse them: the parser and the API server."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

GOOD: dict[str, Any] = {
    "apiVersion": "pretrain.dev/v1alpha1",
    "kind": "PretrainJob",
    "metadata": {"name": "good"},
    "spec": {
        "training": {
            "model": {"preset": "gpt2-tiny"},
            "data": {"tokenizer": "data/tokenizer.json", "sources": [{"name": "web", "uri": "data/web"}]},
            "steps": 100,
        },
        "checkpoint": {"storage": {"path": "checkpoints"}},
    },
}
ABSENT = object()
OWN_SHAPE = {"layers": 2, "heads": 4, "width": 32, "context": 32}


@dataclass(frozen=True)
class BadJob:
    """What is changed in GOOD (dotted paths from its top), and the beginning of what the API server answers."""

    name: str
    changes: dict[str, Any]
    says: str
    parser_says: str = ""
    """Where the parser words it otherwise, with the numbers at hand."""

    def document(self) -> dict[str, Any]:
        """The whole job."""
        return with_changes(self.changes)


def with_changes(changes: dict[str, Any]) -> dict[str, Any]:
    """GOOD with values at dotted paths replaced, or removed where ABSENT."""
    document = copy.deepcopy(GOOD)
    for path, value in changes.items():
        *parents, last = path.split(".")
        place = document
        for key in parents:
            place = place.setdefault(key, {})
        if value is ABSENT:
            del place[last]
        else:
            place[last] = value
    return document


_W, _T, _C, _R = "spec.workers", "spec.training", "spec.checkpoint", "spec.recovery"
_NO_LENGTH = {f"{_T}.steps": ABSENT}
BAD_JOBS = (
    BadJob("min above max", {f"{_W}.elastic": {"min": 3, "max": 2}, f"{_W}.replicas": 3}, "is greater than max"),
    BadJob("replicas below min", {f"{_W}.elastic": {"min": 3}}, "is less than elastic.min"),
    BadJob("replicas above max", {f"{_W}.elastic": {"max": 3}, f"{_W}.replicas": 4}, "is greater than elastic.max"),
    BadJob(
        "decayTokens of cosine",
        {f"{_T}.schedule": {"decayTokens": "1K"}},
        "decayTokens is for kind wsd",
    ),
    BadJob(
        "two warm-ups",
        {f"{_T}.schedule": {"warmupSteps": 2, "warmupTokens": "4K"}},
        "give warmupSteps or warmupTokens, not both",
    ),
    BadJob(
        "two decays",
        {f"{_T}.schedule": {"kind": "wsd", "decaySteps": 2, "decayTokens": "4K"}},
        "give decaySteps or decayTokens, not both",
    ),
    BadJob("prompt and prompts", {f"{_T}.sampling": {"prompt": "a", "prompts": ["b"]}}, "give prompt or prompts, not"),
    BadJob("no origin", {f"{_T}.from": {"step": 3}}, "give exactly one of run and huggingFace"),
    BadJob("two origins", {f"{_T}.from": {"run": "a", "huggingFace": "b"}}, "give exactly one of run and huggingFace"),
    BadJob(
        "step of Hugging Face",
        {f"{_T}.from": {"huggingFace": "b", "step": 3}},
        "step and optimizer are for run: leave them out",
    ),
    BadJob("micro-batch", {f"{_T}.batch": {"sequences": 10, "microBatch": 4}}, "does not divide sequences"),
    BadJob(
        "no model",
        {f"{_T}.model": {"layers": 2}},
        "give a preset, or all of layers, heads, width and context",
        "or the missing fields: heads, width, context",
    ),
    BadJob("heads", {f"{_T}.model": {**OWN_SHAPE, "heads": 5}}, "does not divide width"),
    BadJob("heads of a preset", {f"{_T}.model": {"preset": "gpt2-124m", "heads": 7}}, "does not divide width"),
    BadJob("kvHeads", {f"{_T}.model": {**OWN_SHAPE, "family": "llama", "kvHeads": 3}}, "does not divide heads"),
    BadJob("kvHeads of gpt2", {f"{_T}.model": {**OWN_SHAPE, "kvHeads": 2}}, "kvHeads is for family llama"),
    BadJob("bias of llama", {f"{_T}.model": {**OWN_SHAPE, "family": "llama", "bias": True}}, "bias is for family gpt2"),
    BadJob(
        "norm of llama", {f"{_T}.model": {**OWN_SHAPE, "family": "llama", "norm": "post"}}, "norm post is for family"
    ),
    BadJob("rotary base of gpt2", {f"{_T}.model": {**OWN_SHAPE, "ropeTheta": 1e4}}, "are for family llama"),
    BadJob(
        "rotary factors",
        {f"{_T}.model": {**OWN_SHAPE, "family": "llama", "ropeScaling": {"factor": 8, "lowFrequencyFactor": 4}}},
        "is not less than highFrequencyFactor",
        "(4.0) is not less than highFrequencyFactor",
    ),
    BadJob(
        "tensor parallelism over more than a preset's kvHeads",
        {f"{_T}.model": {"preset": "llama-8b"}, f"{_T}.parallelism": {"tensor": 16}},
        "heads or kvHeads",
        "parallelism.tensor",
    ),
    BadJob("odd heads", {f"{_T}.model": {**OWN_SHAPE, "family": "llama", "width": 12}}, "is odd, which rotary"),
    BadJob("decay without wsd", {f"{_T}.schedule": {"decaySteps": 5}}, "decaySteps is for kind wsd"),
    BadJob("no length", _NO_LENGTH, "give exactly one of steps and tokens"),
    BadJob("two lengths", {f"{_T}.tokens": "1M"}, "give exactly one of steps and tokens"),
    BadJob("warm-up", {f"{_T}.schedule": {"warmupSteps": 101}}, "more than all steps", "(101) is more"),
    BadJob(
        "warm-up and decay",
        {f"{_T}.schedule": {"kind": "wsd", "warmupSteps": 60, "decaySteps": 41}},
        "more than all steps",
    ),
    BadJob(
        "warm-up against tokens",
        {**_NO_LENGTH, f"{_T}.tokens": "20.48K", f"{_T}.schedule": {"warmupSteps": 11}},
        "more than all tokens",
        "more than all steps (10)",
    ),
    BadJob("tokens below one", {**_NO_LENGTH, f"{_T}.tokens": "0B"}, "must be at least 1"),
    BadJob(
        "tensor", {f"{_T}.parallelism": {"tensor": 3}}, "parallelism.tensor", "parallelism.tensor (3) does not divide"
    ),
    BadJob(
        "pipeline", {f"{_T}.parallelism": {"pipeline": 3}}, "parallelism.pipeline", "parallelism.pipeline (3) does not"
    ),
    BadJob(
        "context of tensor parallelism",
        {f"{_T}.model": {**OWN_SHAPE, "context": 31}, f"{_T}.parallelism": {"tensor": 2}},
        "parallelism.tensor does not divide the model's context",
        "parallelism.tensor (2) does not divide model.context (31)",
    ),
    BadJob(
        "hidden of tensor parallelism",
        {f"{_T}.model": {**OWN_SHAPE, "hidden": 63}, f"{_T}.parallelism": {"tensor": 2}},
        "parallelism.tensor does not divide the model's hidden",
        "parallelism.tensor (2) does not divide model.hidden (63)",
    ),
    BadJob(
        "workers that hold no whole replicas",
        {f"{_T}.parallelism": {"tensor": 2}, f"{_W}.replicas": 3, f"{_W}.processesPerWorker": 1},
        "workers.replicas times processesPerWorker is not a multiple of",
        "3 workers of 1 hold no whole number of replicas: use 2 or 4",
    ),
    BadJob(
        "hybrid shards of workers that hold no whole replicas",
        {f"{_T}.parallelism": {"tensor": 2, "shard": "hybrid"}, f"{_W}.replicas": 2, f"{_W}.processesPerWorker": 3},
        "shard hybrid needs whole replicas of the model in a worker",
        "set processesPerWorker to 2 or 4",
    ),
    BadJob("no storage", {f"{_C}.storage": {}}, "give exactly one of s3 and path"),
    BadJob(
        "two storages", {f"{_C}.storage": {"path": "a", "s3": {"bucket": "runs"}}}, "give exactly one of s3 and path"
    ),
    BadJob("no interval", {f"{_C}.interval": {}}, "give exactly one of steps and duration"),
    BadJob(
        "two intervals", {f"{_C}.interval": {"steps": 1, "duration": "1m"}}, "give exactly one of steps and duration"
    ),
    BadJob("no time", {f"{_C}.interval": {"duration": "0s"}}, "greater than 0s"),
    BadJob(
        "two matches", {f"{_R}.rules": [{"onReason": "A", "onLog": "b", "action": "Fail"}]}, "give exactly one of onE"
    ),
    BadJob("no match", {f"{_R}.rules": [{"action": "Fail"}]}, "give exactly one of onExitCodes, onReason and onLog"),
    BadJob(
        "lookahead",
        {f"{_R}.rules": [{"onLog": "a(?=b)", "action": "Fail"}]},
        "onLog must be valid in RE2 syntax",
        "no lookaround, no backreferences",
    ),
    BadJob("long expression", {f"{_R}.rules": [{"onLog": "a" * 1025, "action": "Fail"}]}, "Too long", "at most 1024"),
    BadJob("long name", {"metadata.name": "a" * 41}, "at most 40"),
    BadJob(
        "same name twice",
        {f"{_T}.data.sources": [{"name": "a", "uri": "a"}, {"name": "a", "uri": "b"}]},
        "Duplicate value",
        "the name 'a' is used twice",
    ),
    BadJob("betas", {f"{_T}.optimizer": {"betas": [0.9, 1.0]}}, "should be less than 1", "must be less than 1"),
    BadJob("text for a number", {f"{_W}.replicas": "3"}, "must be of type integer", "expected a whole number"),
    BadJob("unknown preset", {f"{_T}.model": {"preset": "gpt5"}}, "Unsupported value", "unknown preset 'gpt5'"),
)
"""Each beyond the first fields' bounds: every cross-field rule has at least one."""
