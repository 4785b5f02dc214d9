"""Everything that decides the outcome of a run."""

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta

from forwardgrad._errors import MOST, InputError, check_seed, unknown_name
from forwardgrad._files import local
from forwardgrad.augmentation import AbstractAugmentation, build
from forwardgrad.estimators import (
    AbstractEstimator,
    BalancedTangents,
    ControlVariate,
    NodePerturbation,
    WeightPerturbation,
)
from forwardgrad.estimators._perturbed_activities import AbstractPerturbedActivities
from forwardgrad.networks import gpt_size_of
from forwardgrad.objectives import AbstractObjective
from forwardgrad.training._algorithms import ALGORITHMS, defaults, parts

Count = Annotated[int, Meta(ge=1, le=MOST)]
Number = Annotated[float, Meta(ge=0, le=1e300)]
Positive = Annotated[float, Meta(gt=0, le=1e300)]

Task = Literal["supervised", "contrastive"]
Augment = Literal["none", "crop-flip", "simclr"]
Optimizer = Literal["sgd", "adam", "adamw", "rmsprop", "lion", "lars"]
Positions = Literal["rotary", "learned"]
Balance = Literal["none", "relative", "absolute"]
Precision = Literal["float32", "tf32", "bfloat16"]
Schedule = Literal["constant", "cosine", "exponential", "linear"]

Perturbation = AbstractPerturbedActivities | WeightPerturbation

AUGMENTED: dict[str, Augment] = {"supervised": "none", "contrastive": "simclr"}
"""How training images are changed by default, by the task."""

WITH_MOMENTUM = ("sgd", "rmsprop", "lars")
"""Optimisers that have a momentum of their own to set."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Values that are checked against their types.

    **Raises:**

    `InputError` where one is of another type or out of range.
    """

    def __post_init__(self):
        for name, kind in get_type_hints(type(self), include_extras=True).items():
            if not dataclasses.is_dataclass(value := getattr(self, name)):
                object.__setattr__(self, name, checked(name, kind, value))


@dataclasses.dataclass(frozen=True, kw_only=True)
class AugmentationSettings(Settings):
    """Random changes of the training images."""

    augment: Augment = "none"
    """Augmentation: none, crop-flip, or simclr, the default of contrastive learning."""
    least_area: float = 0.2
    """Least share of an image that a random resized crop keeps (simclr)."""
    jitter: float = 0.5
    """Strength of the colour jitter (simclr), from 0 to 1."""
    blur: float | None = None
    """Probability of a blur (simclr). Default: 0.5 for images of 64 pixels and more, else 0."""

    def build(self) -> AbstractAugmentation:
        """The augmentation.

        **Raises:**

        `InputError` if a setting is out of range, or not this augmentation's.
        """
        settings = {"least_area": self.least_area, "jitter": self.jitter, "blur": self.blur}
        return build(self.augment, **settings)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageSettings(Settings):
    """How a data set of images is read."""

    label_column: str | None = None
    """Column of the labels. Default: label, else the first of classes, or the only of integers."""
    image_size: Count | None = None
    """Height and width that images are cropped (to the square in the middle) and resized to.
    Default: as they are; 224 for imagenet, if they differ in size."""
    stream: bool = False
    """Read parquet files in place, on this machine or the hub, and make no copy in the cache."""
    normalise: bool = True
    """Subtract the training images' mean and divide by their standard deviation, per channel."""
    hold_out: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    """Share of the training images, drawn at random, that are for validation instead."""
    augmentation: AugmentationSettings


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextSettings(Settings):
    """How a text is read."""

    text_column: str | None = None
    """Column of the text in a table. Default: text, else the only one of strings."""
    tokenizer: str = "chars"
    """What a token is: one of the text's characters (chars), a byte (bytes), or what a tokenizer
    says: a file (tokenizer.json), or a model of the Hugging Face hub that has one (OWNER/NAME)."""
    context: Count = 64
    """Tokens of a window, each of which is predicted from those before it."""
    documents: Count | None = None
    """Take only so many documents of each split, the first; of a data set on the hub, no more is
    downloaded. Default: all."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderSettings(Settings):
    """What the name of a network of texts leaves open."""

    positions: Positions = "rotary"
    """How attention knows positions: rotary, or a learned vector for each."""
    tied: bool = False
    """Whether the classifier's weights are the embeddings."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class NetworkSettings(Settings):
    """Sizes that the name of a network of images leaves open."""

    width: Count | None = None
    """Units of the hidden linear layers (mlp, cnn). Default: 1024."""
    depth: Annotated[int, Meta(ge=0, le=MOST)] | None = None
    """Number of hidden layers (mlp). Default: 2."""
    projection: Count = 128
    """Outputs of the heads in contrastive learning."""
    normalise_features: bool = False
    """Normalise what the heads and the classifier see, within groups of units; on by default for a
    LocalMixer."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerSettings(Settings):
    """What becomes of the gradient."""

    optimizer: Optimizer = "sgd"
    """Optimiser."""
    learning_rate: Positive
    """Learning rate at the start (after the warm-up)."""
    scale_learning_rate: bool = False
    """Multiply the learning rate by batch_size / 256."""
    schedule: Schedule = "cosine"
    """Learning rate over the run: constant, cosine or linear to zero, or exponential."""
    decay: Number = 1e-4
    """k of the exponential schedule: the rate at step i is learning_rate * exp(-i k)."""
    warmup: Annotated[int, Meta(ge=0, le=MOST)] = 0
    """Steps over which the learning rate first rises linearly from zero."""
    momentum: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    """Momentum of sgd, rmsprop and lars."""
    weight_decay: Number = 0.0
    """Weight decay; adamw and lion decouple it, the others add it to the gradient (lars but for
    biases)."""

    def __post_init__(self):
        super().__post_init__()
        if self.momentum and self.optimizer not in WITH_MOMENTUM:
            raise InputError(
                f"momentum (={self.momentum}) is not a setting of optimizer {self.optimizer!r}, "
                f"only of {', '.join(WITH_MOMENTUM)}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoSettings(Settings):
    """Nothing to set."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoiseSettings(Settings):
    """What makes the estimates less noisy for which activities or weights are perturbed."""

    balance: Balance = "none"
    """Give each layer tangents as long as it needs them, for the least relative or absolute error
    over all layers, or the same to all (none)."""
    control_variate: bool = False
    """Of perturbed activities, guess the derivatives by feedback that is learned along, and
    estimate only the rest."""

    def around(self, estimator: Perturbation) -> AbstractEstimator:
        """The estimator with all of it."""
        found = estimator
        if self.balance != "none":
            found = BalancedTangents(estimator, rule=self.balance)
        if not self.control_variate:
            return found
        assert not isinstance(found, WeightPerturbation)
        return ControlVariate(found)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(Settings):
    """Settings of a training run; [`forwardgrad.training.configure`][] makes them of options.

    **Raises:**

    `InputError` where a value is out of range, or the objective or the estimator is another than
    the algorithm's.
    """

    task: Task = "supervised"
    """What is learned: classes, or without labels what two views of an image share (contrastive),
    with a linear readout of the classes alongside."""
    dataset: str = "digits"
    """Data set: digits, mnist, cifar10, tiny-imagenet, imagenet, a Hugging Face name, a folder; for
    a gpt: text (of this Python), a file or folder of text, a Hugging Face name."""
    network: str = "mlp"
    """Network: logreg, mlp, cnn, or a LocalMixer: s/1/1, m/1/16, m/8/16, l/8/64, l/32/64, or
    any other size/patches/groups of s, m or l; of texts, gpt/LAYERS/WIDTH[/HEADS]."""
    algorithm: str = "fg-w"
    """Algorithm: bp, fa, dfa, fg-w, fg-a or np; with local losses l-bp, l-fa, l-fg-w, l-fg-a, l-np;
    with greedy ones lg-bp, lg-fa, lg-fg-w, lg-fg-a, lg-np."""
    epochs: Count = 100
    """Passes over the training set. The last, incomplete batch of each is left out."""
    iterations: Count | None = None
    """Stop after this many steps instead."""
    seed: int = 0
    """Seed of everything random: weights, order of the examples, tangents."""
    out: Path | None = None
    """Folder of the run. Default: a new one, runs/[contrastive-]DATASET-NETWORK-ALGORITHM-SEED."""
    data_dir: Path | None = None
    """Folder with DATASET/{train,test}.parquet. Default: $FORWARDGRAD_DATA, or the hub is asked."""
    resume: bool = False
    """Continue the run in --out, or start it if there is none."""
    batch_size: Count = 64
    """Examples per step."""
    precision: Precision = "float32"
    """What networks compute with: float32; tf32, products of rounded factors, for which NVIDIA GPUs
    have units; or bfloat16. Parameters, losses and what normalisations sum up are float32."""
    accumulate: Count = 1
    """Parts that a batch is cut into, one after another, with their gradients averaged: for
    batches that do not fit in memory."""
    eval_every: Count = 1
    """Epochs between evaluations on the test set."""
    eval_steps: Count | None = None
    """Steps between further evaluations; default: at the ends of epochs only."""
    log_every: Count | None = None
    """Steps between further lines in metrics.jsonl; default: eval_steps, and else one line an
    epoch only."""
    checkpoint_every: Positive = 30.0
    """Seconds between checkpoints."""
    keep_checkpoints: Count = 2
    """Checkpoints that are kept: the last, and others in case it gets damaged."""

    data: Settings
    """[`forwardgrad.training.ImageSettings`][] or [`forwardgrad.training.TextSettings`][]."""
    sizes: Settings
    """[`forwardgrad.training.NetworkSettings`][], or of texts
    [`forwardgrad.training.DecoderSettings`][]."""
    optimisation: OptimizerSettings
    objective: AbstractObjective
    estimator: AbstractEstimator
    """That of the algorithm."""
    noise: Settings
    """[`forwardgrad.training.NoiseSettings`][] where the estimator perturbs activities or weights,
    else [`forwardgrad.training.NoSettings`][]."""

    def __post_init__(self):
        super().__post_init__()
        check_seed(self.seed)
        if self.out is not None:
            object.__setattr__(self, "out", local(self.out, "out"))
            if not str(self.out).isprintable():  # a name in another encoding too
                raise InputError(f"out must be a printable name in UTF-8, got {str(self.out)!r}")
        own = parts(self.algorithm, self.task)
        if _kinds(*own) != _kinds(self.objective, self.estimator):
            raise InputError(
                f"objective and estimator must be those of algorithm {self.algorithm!r} and task "
                f"{self.task!r}, like {own}, got {(self.objective, self.estimator)}"
            )
        if type(self.noise) is not type(_noise_of(self.estimator)):
            raise InputError(
                f"noise of algorithm {self.algorithm!r} must be like {_noise_of(self.estimator)}, "
                f"got {self.noise}"
            )
        weights = isinstance(self.estimator, WeightPerturbation)
        if weights and isinstance(self.noise, NoiseSettings) and self.noise.control_variate:
            raise InputError(
                f"control_variate must be False for algorithm {self.algorithm!r}, which perturbs "
                "weights"
            )
        if self.precision != "float32" and isinstance(self.estimator, NodePerturbation):
            raise InputError(
                f"precision must be float32 for algorithm {self.algorithm!r}, whose noise "
                f"{self.precision} would round, got {self.precision!r}"
            )
        self._check_batch()
        self._check_data()
        if self.log_every and self.eval_steps and self.eval_steps % self.log_every:
            raise InputError(
                f"log_every (={self.log_every}) must divide eval_steps, which is {self.eval_steps}"
            )

    @property
    def wrapped_estimator(self) -> AbstractEstimator:
        """The algorithm's estimator, with what makes it less noisy around it."""
        if not isinstance(self.noise, NoiseSettings):
            return self.estimator
        assert isinstance(self.estimator, Perturbation)
        return self.noise.around(self.estimator)

    @property
    def line_every(self) -> int | None:
        """Steps between lines in metrics.jsonl, beside those of epochs."""
        return self.log_every or self.eval_steps

    def _check_data(self) -> None:
        kinds = (
            (TextSettings, DecoderSettings) if self.by_token else (ImageSettings, NetworkSettings)
        )
        if (type(self.data), type(self.sizes)) != kinds:
            raise InputError(
                f"data and sizes of network {self.network!r} must be "
                f"{' and '.join(kind.__name__ for kind in kinds)}, got {self.data} and {self.sizes}"
            )
        if self.task == "supervised":
            return
        if isinstance(self.data, TextSettings):
            raise InputError(
                f"task 'contrastive' compares views of images, and network {self.network!r} reads "
                "text"
            )
        assert isinstance(self.data, ImageSettings)
        if self.data.augmentation.augment == "none":
            raise InputError(
                "augment must not be 'none' with task 'contrastive': both views of an image would "
                "be the same"
            )

    @property
    def by_token(self) -> bool:
        """Whether the network reads text."""
        return reads_text(self.network)

    def _check_batch(self) -> None:
        if self.batch_size % self.accumulate:
            raise InputError(
                f"accumulate (={self.accumulate}) must divide batch_size, which is "
                f"{self.batch_size}"
            )
        if self.task == "supervised":
            return
        if self.batch_size < 2:
            raise InputError(
                f"batch_size must be at least 2 with task 'contrastive', got {self.batch_size}: "
                "an image is told apart from the others of its batch"
            )
        if self.accumulate > 1:
            raise InputError(
                f"accumulate (={self.accumulate}) must be 1 with task 'contrastive': its loss "
                "compares every image of a batch with all others, and is not a mean over parts"
            )


def reads_text(network: str) -> bool:
    """Whether a network of this name reads text."""
    return gpt_size_of(network) is not None


def _kinds(objective: AbstractObjective, estimator: AbstractEstimator) -> tuple[Any, ...]:
    task, greedy = getattr(objective, "task", None), getattr(objective, "greedy", None)
    return type(objective), type(task), greedy, type(estimator)


def _noise_of(estimator: AbstractEstimator) -> Settings:
    """The defaults of what there is for an estimator."""
    return NoiseSettings() if isinstance(estimator, Perturbation) else NoSettings()


_IN_WORDS = {
    "`": "",
    " | ": " or ",
    "null": "None",
    "int >=": "at least",
    "int <": "below",
    "float <": "below",
    "below=": "at most",
    "float >=": "at least",
    "float >": "more than",
}


def checked(name: str, kind: Any, value: Any) -> Any:
    """A value of a type, from one that JSON may have in its place.

    **Raises:**

    `InputError` if it is none.
    """
    if get_origin(kind) is Literal and value not in get_args(kind):
        raise unknown_name(name, str(value), get_args(kind))
    try:
        return msgspec.convert(value, kind, dec_hook=lambda kind, value: kind(value))
    except (msgspec.ValidationError, TypeError) as error:
        wanted = str(error).partition("xpected ")[2].split(", got")[0]
        for its, ours in _IN_WORDS.items():
            wanted = wanted.replace(its, ours)
        raise InputError(f"{name} must be {wanted}, got {value!r}") from error


OF_TEXT = "gpt/2/128"
"""A network of texts."""

NOT_OF_THE_RESULT = ("out", "data_dir", "resume", "checkpoint_every", "keep_checkpoints")
"""Settings that may differ between a run and its continuation."""


def options_of(settings: Any) -> dict[str, Any]:
    """Settings as the command line and `config.json` have them: those of all parts, flat."""
    plain, parts = own_and_parts(settings)
    inner = {name: value for part in parts.values() for name, value in options_of(part).items()}
    return {**plain, **inner, **plain}


def changed(settings: Any, given: Mapping[str, Any]) -> Any:
    """Settings with other options; those that they do not have are passed over."""
    plain, parts = own_and_parts(settings)
    kinds = get_type_hints(type(settings), include_extras=True)
    own = {name: checked(name, kinds[name], given[name]) for name in plain if name in given}
    # Of two that have the same name, the outer one is meant.
    rest = {name: value for name, value in given.items() if name not in plain}
    inner = {name: changed(part, rest) for name, part in parts.items()}
    return dataclasses.replace(settings, **own, **inner)


def own_and_parts(settings: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is an option, and what has some of its own. The algorithm's id says what is greedy."""
    values = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    parts = {k: v for k, v in values.items() if dataclasses.is_dataclass(v)}
    return {k: v for k, v in values.items() if k not in (*parts, "greedy")}, parts


def preset(
    task: Task = "supervised",
    network: str = "mlp",
    algorithm: str = "fg-w",
    optimizer: Optimizer | None = None,
) -> TrainConfig:
    """The defaults of all options, which depend on these."""
    objective, estimator = parts(algorithm, task)
    suited = {"optimizer": "sgd", **defaults(algorithm, network, task)}
    if optimizer is not None:
        suited["optimizer"] = optimizer
    if suited["optimizer"] not in WITH_MOMENTUM:
        suited["momentum"] = 0.0
    images = ImageSettings(augmentation=AugmentationSettings(augment=AUGMENTED[task]))
    of_text = reads_text(network)
    config = TrainConfig(
        task=task,
        network=network,
        algorithm=algorithm,
        data=TextSettings() if of_text else images,
        sizes=DecoderSettings() if of_text else NetworkSettings(),
        optimisation=OptimizerSettings(learning_rate=suited["learning_rate"]),
        objective=objective,
        estimator=estimator,
        noise=_noise_of(estimator),
    )
    return changed(config, suited)


def configure(**given: Any) -> TrainConfig:
    """The settings of a run, from options as the command line has them.

    The algorithm, with the network and the task, decides the others' defaults.

    **Raises:**

    `InputError` if a value is out of range, or an option is unknown or not the algorithm's.

    >>> config = configure(algorithm="lg-fg-a", network="m/8/16", tangents=8)
    >>> config.estimator
    ActivityPerturbation(tangents=8)
    >>> config.optimisation.learning_rate, config.objective.greedy
    (0.03, True)
    """
    config = preset(**_choices(given))
    check_names(given, config)
    return changed(config, given)


def fitting(**given: Any) -> TrainConfig:
    """`configure` for several algorithms: options that only others have are passed over."""
    config = preset(**_choices(given))
    check_names({name: value for name, value in given.items() if name not in known()}, config)
    return changed(config, given)


def _choices(given: Mapping[str, Any]) -> dict[str, Any]:
    """The options among them that the others' defaults depend on."""
    kinds = {**get_type_hints(preset), "optimizer": Optimizer}
    del kinds["return"]
    return {k: checked(k, kind, given[k]) for k, kind in kinds.items() if k in given}


def check_names(names: Iterable[str], config: TrainConfig) -> None:
    """Raise an `InputError` for an option that is unknown, or another algorithm's."""
    for name in names:
        if name not in known():
            raise unknown_name("setting", name, known())
        if name in options_of(config):
            continue
        if name in _of_other_data(config):
            reads = "text" if config.by_token else "images"
            raise InputError(
                f"{name} is not a setting of network {config.network!r}, which reads {reads}"
            )
        raise InputError(
            f"{name} is not a setting of algorithm {config.algorithm!r} for task {config.task!r}"
        )


def _of_other_data(config: TrainConfig) -> set[str]:
    """The options that only networks of the other kind of data have."""
    other = preset(network=preset().network if config.by_token else OF_TEXT)
    return {*options_of(other.data), *options_of(other.sizes)}


@functools.cache
def known() -> frozenset[str]:
    """The options that there are for one algorithm or another."""
    presets = (preset(task, algorithm=name) for task in get_args(Task) for name in ALGORITHMS)
    return frozenset(
        name for config in (*presets, preset(network=OF_TEXT)) for name in options_of(config)
    )


def not_default(config: TrainConfig) -> dict[str, Any]:
    """The options that make `configure` return these settings."""
    given, first = options_of(config), options_of(preset())
    chosen = _choices(given)
    usual = {**options_of(preset(**chosen)), **{name: first[name] for name in chosen}}
    # The one among them that depends on others itself.
    del chosen["optimizer"]
    usual["optimizer"] = options_of(preset(**chosen))["optimizer"]
    return {name: value for name, value in given.items() if value != usual[name]}


def of_the_result(config: TrainConfig) -> dict[str, Any]:
    """The options that decide a run's bits."""
    return {k: v for k, v in options_of(config).items() if k not in NOT_OF_THE_RESULT}


def differences(stored: TrainConfig, config: TrainConfig) -> list[str]:
    """What a continuation would change, as `name (stored, new)`."""
    before, now = of_the_result(stored), of_the_result(config)
    names = [name for name in {**now, **before} if before.get(name) != now.get(name)]
    return [f"{k} ({before.get(k)!r} there, {now.get(k)!r} now)" for k in names]
