"""The experiment: one full configuration, composed of sections of other packages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Self

from pydantic import ConfigDict, Discriminator, Field, Tag, model_validator

from lit_llm.config.hashing import fingerprint
from lit_llm.config.section import Section, config_error
from lit_llm.data.config import identity_of, never_equal
from lit_llm.evaluation.config import EVALUATIONS, EvaluateConfig
from lit_llm.experiment.learned_positions import (
    TrainedTexts,
    evaluation_problems,
    finetuning_problems,
    positions_trained,
    pretraining_problems,
    teacher_problem,
)
from lit_llm.experiment.training_sections import (
    FinetuneConfig,
    PretrainConfig,
    Trained,
    prefix_problems,
    training_problems,
)
from lit_llm.models.adapt import Adaptation, Side, adaptation_of, problem_of
from lit_llm.models.config import ModelConfig
from lit_llm.models.parameters import parameter_shapes
from lit_llm.models.resolve import resolve_model
from lit_llm.models.resolved import ResolvedModel, not_analysed
from lit_llm.objectives.base import Lengths, described
from lit_llm.objectives.config import (
    CausalLM,
    continues,
    misfit,
)
from lit_llm.training.config import DistillConfig

EXTENDS: dict[str, Any] = {
    "description": "A preset, a file relative to this one, or a list of them, merged in order.",
    "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
}
"""JSON Schema of `extends`, a key that is resolved before validation."""


class Pretrained(Section):
    """A network and its pretraining, from which another experiment can be adapted."""

    model_config = ConfigDict(json_schema_extra=lambda schema: schema["properties"].update(extends=EXTENDS))

    model: ModelConfig
    """The network."""
    adapt: AdaptConfig | None = Field(None, exclude_if=lambda value: value is None)
    """Source of the initial weights; drawn by the seed when absent."""
    pretrain: PretrainConfig
    """The pretraining."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if findings := [*self._problems()]:
            raise config_error(*findings)
        return self

    def _problems(self) -> Iterator[tuple[str, str]]:
        """(key, message) of settings that do not fit each other."""
        tokens = self.pretrain.data.tokenizer.vocabulary
        objective, family = self.pretrain.objective, self.model.family
        extra = objective.extra_ids(self.pretrain.data.sequence_length)
        if (needed := tokens + sum(extra.values())) > self.model.vocabulary:
            message = f"{self.model.vocabulary} rows for a tokenizer of {tokens} tokens"
            if extra:
                message += f" and {described(extra)} of {objective.kind}: {needed} are needed"
            yield "model.vocabulary", message
        if problem := misfit(objective, family):
            yield "pretrain.objective", problem
        yield from training_problems("pretrain", self.pretrain.training, self.model)
        if isinstance(objective, CausalLM) and (part := resolve_model(self.model).reads_marked):
            message = (
                f"causal_lm has no source for {part} to read, and a window that were its own source would "
                "show every token its label; use `objective: prefix_lm`"
            )
            yield "pretrain.objective", message
        yield from prefix_problems("pretrain", self.pretrain.masks, self.model)
        length, validation = self.pretrain.data.sequence_length, self.pretrain.validation
        yield from pretraining_problems(resolve_model(self.model), objective, validation, length)
        if self.adapt is not None:
            yield from _adaptation_problems(self, self.adapt)

    @property
    def positions_trained(self) -> int:
        """Learned positions that the pretraining's texts read, or that its sources have trained."""
        model = resolve_model(self.model)
        trained = positions_trained(model, self.pretrain.objective.extremes(self.pretrain.data.sequence_length))
        if model.embedding.max_positions is None or self.adapt is None or problem_of(model, self.adapt.models):
            return trained
        tables = [name for name in parameter_shapes(model) if name.endswith("position_embedding.weight")]
        origins = [self.adaptation.taken.get(name) for name in tables]
        given = [0 if origin is None else self.adapt.sides[origin[0]].positions_trained for origin in origins]
        return max(trained, min(given))

    @property
    def adaptation(self) -> Adaptation:
        """Source of each parameter of an adapted model."""
        assert self.adapt is not None
        return adaptation_of(resolve_model(self.model), self.adapt.models)

    def seeded(self, seed: int) -> Experiment:
        """The pretraining alone, as an experiment, with this seed."""
        return Experiment(model=self.model, adapt=self.adapt, pretrain=self.pretrain, seed=seed)

    def trunk(self, steps: int, seed: int) -> Experiment:
        """The pretraining's trunk up to a step, as an experiment, with this seed."""
        pretrain = self.pretrain.model_copy(update={"training": self.pretrain.training.trunk(steps)})
        return Experiment(model=self.model, adapt=self.adapt, pretrain=pretrain, seed=seed)


class Checkpoint(Section):
    """A folder with `model.yaml` and `weights.safetensors`. The cost of its training is unknown."""

    checkpoint: str
    """The folder."""
    digest: str
    """Digest of model, weights and tokenizer when the configuration was read."""
    model: ModelConfig
    """The network in `model.yaml`."""
    tokenizer: str | None = Field(None, exclude_if=lambda value: value is None)
    """Identity of the tokenizer that `model.yaml` names; absent where it names none, so that it cannot be compared."""

    @property
    def positions_trained(self) -> int:
        """Learned positions; all of them, since the texts of its training are unknown."""
        return self.model.embedding.max_positions or 0


class _OrAName:
    """Adds a name (a preset, a file or a folder) to the JSON Schema, which is resolved before validation."""

    def __get_pydantic_json_schema__(self, core: Any, handler: Any) -> dict[str, Any]:
        schema = handler(core)
        # Not oneOf: a mapping with an `extends` may fit several.
        return {"anyOf": [{"type": "string"}, *schema["oneOf"]]}


def _form(value: Any) -> str:
    """Tag of a source's form: checkpoint, sides or experiment."""
    keys = {*(value if isinstance(value, Mapping) else getattr(type(value), "model_fields", ()))}
    return "checkpoint" if "checkpoint" in keys else "sides" if {"encoder", "decoder"} & keys else "experiment"


_Experiment = Annotated[Pretrained, Tag("experiment")]
_Checkpoint = Annotated[Checkpoint, Tag("checkpoint")]
_Given = (Discriminator(_form), _OrAName())
_Side = Annotated[_Experiment | _Checkpoint, *_Given]


class Sides(Section):
    """A source for the encoder and another for the decoder: T5Gemma's 9B-2B."""

    encoder: _Side
    """Gives the encoder its embedding and its layers."""
    decoder: _Side
    """Gives all other parameters."""


class AdaptConfig(Section):
    """A pretraining that begins with the weights of other models (T5Gemma, arXiv 2504.06225)."""

    model_config = ConfigDict(serialize_by_alias=True)  # `from` is no name in Python

    source: Annotated[_Experiment | _Checkpoint | Annotated[Sides, Tag("sides")], *_Given] = Field(alias="from")
    """A preset, an experiment file relative to this one, or a checkpoint's folder; `{extends: NAME, ...}` changes keys
    of an experiment, `{encoder: ..., decoder: ...}` has one for each side. The source is the experiment's
    pretraining with this run's seed, computed once for all arms that begin with it, and counted in the cost of each.
    Text, training and widths of a study's `base` or `-o` hold for it too, unless set here."""
    warmup_steps: int = Field(0, ge=0)
    """First steps of the pretraining, which train only the parameters that no source gives. T5Gemma: 1000."""
    distill: DistillConfig | None = None
    """Distillation from the decoder's source, which reads source and target as one causal text; none when absent."""

    @property
    def sides(self) -> dict[Side, Pretrained | Checkpoint]:
        """The source of each side; the same object where one source serves both."""
        if isinstance(self.source, Sides):
            return {"encoder": self.source.encoder, "decoder": self.source.decoder}
        return {"encoder": self.source, "decoder": self.source}

    @property
    def models(self) -> dict[Side, ResolvedModel]:
        """The resolved model of each side's source."""
        resolved = {id(given): resolve_model(given.model) for given in self.sides.values()}
        return {side: resolved[id(given)] for side, given in self.sides.items()}

    @property
    def experiments(self) -> dict[Side, Pretrained]:
        """The sources that are pretrained, each once; a single one is the decoder's."""
        both = {side: given for side, given in reversed(self.sides.items()) if isinstance(given, Pretrained)}
        if len(both) == 2 and both["encoder"] == both["decoder"]:
            del both["encoder"]
        return both


def _tokenizer_identity(pretrained: Pretrained) -> str:
    """Identity of the tokenizer; one that is still to be trained equals no checkpoint's."""
    return fingerprint(identity_of(pretrained.pretrain.data.tokenizer))


def _adaptation_problems(pretrained: Pretrained, adapt: AdaptConfig) -> Iterator[tuple[str, str]]:
    """(key, message) of the reasons why a pretraining cannot begin with its sources."""
    models, target = adapt.models, resolve_model(pretrained.model)
    apart = isinstance(adapt.source, Sides)
    if apart and not target.encoder:
        yield "adapt.from.encoder", "there is no encoder to adapt; name one source"
        return
    for side, given in adapt.experiments.items():
        if never_equal(given.pretrain.data.tokenizer, pretrained.pretrain.data.tokenizer):
            message = "has another tokenizer, so the rows of its embedding stand for other tokens"
            yield f"adapt.from.{side}" if apart else "adapt.from", message
            return
    for side, source in adapt.sides.items():
        if isinstance(source, Checkpoint) and source.tokenizer not in (None, _tokenizer_identity(pretrained)):
            message = (
                "has another tokenizer, so the rows of its embedding stand for other tokens; use the one that its "
                f"model.yaml names, `pretrain.data.tokenizer: {{kind: file, path: {source.checkpoint}/tokenizer.json, "
                "...}`"
            )
            yield f"adapt.from.{side}" if apart else "adapt.from", message
            return
    if problem := problem_of(target, models):
        yield f"adapt.from.{problem[0]}" if apart else "adapt.from", problem[1]
        return
    training = pretrained.pretrain.training
    steps, most = adapt.warmup_steps, (training.trunks or (training.max_steps,))[0]
    if steps and not pretrained.adaptation.newly_initialised:
        yield "adapt.warmup_steps", "every parameter is taken over, so no other could be trained alone; leave it out"
    elif steps >= most:
        before = " before the first branch" if training.trunks else ""
        yield "adapt.warmup_steps", f"{steps} leave none of the {most} steps{before} to train all parameters"
    teacher = models["decoder"]
    if adapt.distill and (teacher.family != "decoder" or teacher.reads_marked):
        yield "adapt.distill", "the teacher reads source and target as one causal text: it has to be a causal decoder"
    elif adapt.distill and target.family == "encoder_only":
        yield "adapt.distill", "a causal teacher has no distribution over a masked token; leave it out"
    elif adapt.distill and (too_long := _teacher_beyond_table(pretrained, adapt)):
        yield "adapt.distill", too_long
    elif adapt.distill and isinstance(source := adapt.sides["decoder"], Pretrained):
        yield from _teacher_problems(pretrained.pretrain, source.pretrain)


def _teacher_beyond_table(pretrained: Pretrained, adapt: AdaptConfig) -> str:
    """Message for a teacher with fewer learned positions than the texts of the pretraining have, or ''."""
    given, place = adapt.sides["decoder"], "adapt.from.decoder" if isinstance(adapt.source, Sides) else "adapt.from"
    rows = "embedding.max_positions"
    source = f"{rows} in {given.checkpoint}/model.yaml" if isinstance(given, Checkpoint) else f"{place}.model.{rows}"
    data = pretrained.pretrain
    return teacher_problem(adapt.models["decoder"], source, data.objective, data.data.sequence_length)


def _teacher_problems(student: PretrainConfig, teacher: PretrainConfig) -> Iterator[tuple[str, str]]:
    """(key, message) of inputs and ids that a teacher was not trained on."""
    if teacher.masks.prefix == "bidirectional":
        message = "the teacher reads source and target as one causal text, and this one is trained with an open prefix"
        yield "adapt.distill", f"{message} (`masks: {{prefix: bidirectional}}`); leave one of them out"
    student_ids, teacher_ids = (each.objective.extra_ids(each.data.sequence_length) for each in (student, teacher))
    # Ids follow in this order, so with fewer sentinels the next ids have other meanings.
    student_layout, teacher_layout = (
        [(what, n) for what in extra for n in range(extra[what])] for extra in (student_ids, teacher_ids)
    )
    if student_layout != teacher_layout[: len(student_layout)]:
        message = (
            f"the teacher's {teacher.objective.kind} has trained {described(teacher_ids) or 'no ids but the text'}"
        )
        message += f", not {described(student_ids)} of {student.objective.kind}: what it says of them is noise"
        yield "adapt.distill", f"{message}; leave it out, or give the source that objective"


Pretrained.model_rebuild()


class Experiment(Pretrained):
    """One full configuration of a run."""

    finetune: FinetuneConfig | None = None
    """Instruction tuning of the pretrained model; none when absent."""
    evaluate: EvaluateConfig | None = None
    """Evaluations of finished stages; none when absent."""
    seed: int = Field(0, ge=0)
    """Seed of the parameters, the order of the data and every random cut."""

    def _problems(self) -> Iterator[tuple[str, str]]:
        findings = [*super()._problems()]
        if not continues(self.model.family):
            findings += self._needs_continuation()
        if self.pretrain.data.tasks:
            findings += self._needs_text()
        if self.finetune is not None:
            findings += prefix_problems("finetune", self.finetune.masks, self.model)
            findings += training_problems("finetune", self.finetune.training, self.model)
            lengths = self.finetune.data.input_length, self.finetune.data.target_length
            findings += finetuning_problems(resolve_model(self.model), *lengths)
        if self.evaluate is not None:
            length = self.pretrain.data.sequence_length
            problems = self.evaluate.problems(length)
            data = None if self.finetune is None else self.finetune.data
            example = None if data is None else Lengths(data.input_length, data.target_length)
            trained = TrainedTexts(length, self.pretrain.objective, self.positions_trained, example)
            problems += evaluation_problems(resolve_model(self.model), self.evaluate, trained)
            findings += [(f"evaluate.{key}", message) for key, message in problems]
        if self.evaluate is not None and not self.evaluated:
            message = "finetune is to be evaluated, and there is no such section; add it, or evaluate after pretrain"
            findings.append(("evaluate.after", message))
        looked_at = self.evaluate is not None and self.evaluate.attention is not None
        if looked_at and (problem := not_analysed(resolve_model(self.model))):
            findings.append(("evaluate.attention", problem))
        packed = self.finetune is not None and self.finetune.data.packing == "greedy"
        if packed and (part := resolve_model(self.model).reads_marked):
            message = f"{part} reads the beginning of a row as the source, and a row would hold several"
            findings.append(("finetune.data.packing", f"{message}; use `packing: none`"))
        if self.evaluate is not None and self.evaluate.examples is not None and self.finetune is None:
            findings.append(("evaluate.examples", "are those that `finetune.data` holds out, and there is no finetune"))
        yield from findings

    def _needs_continuation(self) -> Iterator[tuple[str, str]]:
        """Problems of sections that need a continuation, for a model that writes none."""
        if self.finetune is not None:
            yield "finetune", "an encoder_only model writes no answers to instructions; leave it out"
        if self.evaluate is not None:
            yield "evaluate", "all evaluations ask how a text goes on, which an encoder_only model does not say"

    def _needs_text(self) -> Iterator[tuple[str, str]]:
        """Problems of sections that need a text, for a model that reads symbols."""
        if self.finetune is not None:
            yield "finetune", "a model that was trained on symbols reads no instructions; leave it out"
        if self.evaluate is not None:
            message = "all evaluations read text, and this model reads symbols; compare test/answer_accuracy, which a "
            yield "evaluate", f"{message}mixture of tasks also has by source"

    @property
    def trained(self) -> tuple[Trained, ...]:
        """The stages that train, in order."""
        return ("pretrain",) if self.finetune is None else ("pretrain", "finetune")

    @property
    def evaluated(self) -> tuple[Trained, ...]:
        """The stages that are evaluated."""
        return tuple(name for name in self.trained if self.evaluate is not None and name in self.evaluate.after)

    def evaluations(self, stage: Trained) -> tuple[str, ...]:
        """Names of the evaluations after a stage."""
        if self.evaluate is None or stage not in self.evaluated:
            return ()
        return tuple(name for name in EVALUATIONS if getattr(self.evaluate, name) is not None)

    def section(self, stage: Trained) -> PretrainConfig | FinetuneConfig:
        """The section of a stage that trains."""
        section = self.finetune if stage == "finetune" else self.pretrain
        assert section is not None
        return section
