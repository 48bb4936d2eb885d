"""Cross-field rules as CEL, so that the API server refuses what `pretrain_api.spec.job` refuses.

Each rule matches a validator in `job`, `training` or `model`. CEL cannot express, or only at a high cost: the size of
a compiled `onLog`, that a duration is at most ten years, that a warm-up or decay in tokens fits
the run, that a default `hidden` is divisible, and replicas without `processesPerWorker`. Rules on `oldSelf` match no
validator: they protect the fields that running workers were started with.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from pydantic import BaseModel

from pretrain_api.spec import data, job, training
from pretrain_api.spec.model import Model, RopeScaling
from pretrain_api.spec.presets import PRESETS


class CelRule(NamedTuple):
    """Entry of `x-kubernetes-validations`: `message` is the error if `rule` does not hold."""

    rule: str
    message: str


def _field(model: str, name: str, presets: Mapping[str, object]) -> str:
    """Build CEL for a model's field, or the preset's if it is absent."""
    table = ", ".join(f"'{preset}': {value!r}" for preset, value in presets.items())
    return f"(has({model}.{name}) ? {model}.{name} : {{{table}}}[{model}.preset])"


def _number(model: str, name: str) -> str:
    return _field(model, name, {preset: getattr(shape, name) for preset, shape in PRESETS.items()})


def _known(model: str, *names: str) -> str:
    """Build CEL that checks that the preset or the user gives all these fields."""
    own = " && ".join(f"has({model}.{name})" for name in names)
    return f"(has({model}.preset) || ({own}))"


def _fixed(field: str) -> CelRule:
    return CelRule("self == oldSelf", f"{field} is immutable: delete the job and create it again; checkpoints are kept")


_HEADS, _WIDTH = _number("self", "heads"), _number("self", "width")
_IS_LLAMA = (
    f"(has(self.family) || has(self.preset)) && "
    f"{_field('self', 'family', {name: shape.family for name, shape in PRESETS.items()})} == 'llama'"
)
_PRESET_KV_HEADS = {preset: shape.kv_heads or shape.heads for preset, shape in PRESETS.items()}
# A preset's kvHeads applies only if heads and width are the preset's too, as in `model.resolve`.
_KV_HEADS = (
    "(has(self.model.kvHeads) ? self.model.kvHeads : "
    "(has(self.model.preset) && !has(self.model.heads) && !has(self.model.width)) ? "
    f"{_field('self.model', 'kvHeads', _PRESET_KV_HEADS)} : {_number('self.model', 'heads')})"
)
# `10B` -> `10e9`, which CEL reads as a double.
_TOKENS = "double(string(self.tokens).replace('K', 'e3').replace('M', 'e6').replace('B', 'e9').replace('T', 'e12'))"
_TOKENS_PER_STEP = f"double(self.batch.sequences * {_number('self.model', 'context')})"
_DECAY = "(has(self.schedule.decaySteps) ? self.schedule.decaySteps : 0)"

_MODEL_RULES = (
    CelRule(
        _known("self", "layers", "heads", "width", "context"),
        "give a preset, or all of layers, heads, width and context",
    ),
    CelRule(
        f"!{_known('self', 'heads', 'width')} || {_WIDTH} % {_HEADS} == 0",
        "heads does not divide width: choose a divisor",
    ),
    CelRule(
        f"!has(self.kvHeads) || !{_known('self', 'heads')} || {_HEADS} % self.kvHeads == 0",
        "kvHeads does not divide heads: choose a divisor",
    ),
    CelRule(
        f"!has(self.kvHeads) || !{_known('self', 'heads')} || self.kvHeads == {_HEADS} || ({_IS_LLAMA})",
        "kvHeads is for family llama: leave it out, or set family to llama",
    ),
    CelRule(
        f"!(has(self.ropeTheta) || has(self.ropeScaling)) || ({_IS_LLAMA})",
        "ropeTheta and ropeScaling are for family llama: leave them out, or set family to llama",
    ),
    CelRule(
        f"!has(self.bias) || !self.bias || !({_IS_LLAMA})",
        "bias is for family gpt2: leave it out, or set family to gpt2",
    ),
    CelRule(
        f"!has(self.norm) || self.norm != 'post' || !({_IS_LLAMA})",
        "norm post is for family gpt2: leave it out, or set family to gpt2",
    ),
    CelRule(
        f"!{_known('self', 'heads', 'width')} || !({_IS_LLAMA}) || {_WIDTH} / {_HEADS} % 2 == 0",
        "width / heads is odd, which rotary positions of family llama cannot use: change width or heads",
    ),
)
_TRAINING_RULES = (
    CelRule("has(self.steps) != has(self.tokens)", "give exactly one of steps and tokens"),
    CelRule(
        f"!has(self.steps) || self.schedule.warmupSteps + {_DECAY} <= self.steps",
        "schedule.warmupSteps and schedule.decaySteps are more than all steps: lower one of them, or train longer",
    ),
    CelRule(
        f"!has(self.tokens) || !{_known('self.model', 'context')} || "
        f"double(self.schedule.warmupSteps + {_DECAY} - 1) * {_TOKENS_PER_STEP} < {_TOKENS}",
        "schedule.warmupSteps and schedule.decaySteps are more than all tokens: lower one of them, or train longer",
    ),
    CelRule(
        f"!{_known('self.model', 'heads')} || ({_number('self.model', 'heads')} % self.parallelism.tensor == 0 && "
        f"{_KV_HEADS} % self.parallelism.tensor == 0)",
        "parallelism.tensor does not divide the model's heads or kvHeads: choose a divisor",
    ),
    CelRule(
        f"!{_known('self.model', 'context')} || {_number('self.model', 'context')} % self.parallelism.tensor == 0",
        "parallelism.tensor does not divide the model's context: choose a divisor",
    ),
    CelRule(
        "!has(self.model.hidden) || self.model.hidden % self.parallelism.tensor == 0",
        "parallelism.tensor does not divide the model's hidden: choose a divisor",
    ),
    CelRule(
        f"!{_known('self.model', 'layers')} || {_number('self.model', 'layers')} % self.parallelism.pipeline == 0",
        "parallelism.pipeline does not divide the model's layers: choose a divisor",
    ),
    _fixed("training"),
)

_REPLICA = "(self.training.parallelism.tensor * self.training.parallelism.pipeline)"
_SPEC_RULES = (
    CelRule(
        f"!has(self.workers.processesPerWorker) || "
        f"self.workers.replicas * self.workers.processesPerWorker % {_REPLICA} == 0",
        "workers.replicas times processesPerWorker is not a multiple of parallelism.tensor times "
        "parallelism.pipeline, the processes of one replica of the model: change replicas",
    ),
    CelRule(
        f"self.training.parallelism.shard != 'hybrid' || !has(self.workers.processesPerWorker) || "
        f"self.workers.processesPerWorker % {_REPLICA} == 0",
        "shard hybrid needs whole replicas of the model in a worker: set workers.processesPerWorker to a multiple of "
        "parallelism.tensor times parallelism.pipeline",
    ),
)

RULES: Mapping[type[BaseModel], tuple[CelRule, ...]] = MappingProxyType(
    {
        job.Elastic: (
            CelRule(
                "!has(self.max) || self.min <= self.max",
                "min is greater than max: lower min or raise max",
            ),
        ),
        job.Workers: (
            CelRule(
                "self.replicas >= self.elastic.min",
                "replicas is less than elastic.min: raise replicas or lower elastic.min",
            ),
            CelRule(
                "!has(self.elastic.max) || self.replicas <= self.elastic.max",
                "replicas is greater than elastic.max: lower replicas or raise elastic.max",
            ),
        ),
        Model: _MODEL_RULES,
        RopeScaling: (
            CelRule(
                "self.lowFrequencyFactor < self.highFrequencyFactor",
                "lowFrequencyFactor is not less than highFrequencyFactor: lower the first",
            ),
        ),
        training.From: (
            CelRule("has(self.run) != has(self.huggingFace)", "give exactly one of run and huggingFace"),
            CelRule(
                "has(self.run) || !(has(self.step) || self.optimizer)",
                "step and optimizer are for run: leave them out",
            ),
        ),
        data.Sampling: (
            CelRule(
                "self.prompt == '' || !has(self.prompts) || self.prompts.size() == 0",
                "give prompt or prompts, not both",
            ),
        ),
        training.Batch: (
            CelRule("self.sequences % self.microBatch == 0", "microBatch does not divide sequences: choose a divisor"),
        ),
        training.Schedule: (
            CelRule(
                "!has(self.decaySteps) || self.kind == 'wsd'",
                "decaySteps is for kind wsd: leave it out, or set kind to wsd",
            ),
            CelRule(
                "!has(self.decayTokens) || self.kind == 'wsd'",
                "decayTokens is for kind wsd: leave it out, or set kind to wsd",
            ),
            CelRule("!has(self.warmupTokens) || self.warmupSteps == 0", "give warmupSteps or warmupTokens, not both"),
            CelRule("!has(self.decayTokens) || !has(self.decaySteps)", "give decaySteps or decayTokens, not both"),
        ),
        training.Training: _TRAINING_RULES,
        job.PretrainJobSpec: _SPEC_RULES,
        job.Checkpoint: (_fixed("checkpoint"),),
        job.Divergence: (_fixed("recovery.divergence"),),
        job.Storage: (CelRule("has(self.s3) != has(self.path)", "give exactly one of s3 and path"),),
        job.Interval: (CelRule("has(self.steps) != has(self.duration)", "give exactly one of steps and duration"),),
        job.Rule: (
            CelRule(
                "[has(self.onExitCodes), has(self.onReason), has(self.onLog)].exists_one(given, given)",
                "give exactly one of onExitCodes, onReason and onLog",
            ),
            # CEL's expressions are RE2 too: an invalid one is an error of the evaluation, which refuses the job.
            CelRule("!has(self.onLog) || ''.matches(self.onLog) in [true, false]", "onLog must be valid in RE2 syntax"),
        ),
    }
)
ROOT_RULES = (
    CelRule(
        "self.metadata.name.size() <= 40 && self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')",
        "metadata.name must have at most 40 lower-case letters, digits and hyphens and begin with a letter",
    ),
)
