"""Typed, immutable configuration of the method.

The classes accept neither unknown keys nor values of a wrong type. `parse` builds one of them from a plain mapping,
such as the content of a YAML file, and raises a `ConfigError` with a one-line message that names the key, what was
expected and what was given.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from simmatch.extent import KernelExtent, NonNegativeExtent, PositiveExtent
from simmatch.schedule import check_schedule
from simmatch.validation import one_line

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]

Reduce = Literal["fast", "exact"]
"""How sums over ranks are made: as floats, or as fixed-point numbers of fixed blocks (`simmatch.sharding.exact`)."""

EXACT_NEEDS = "which needs gather_state: in other modes shapes, and so last bits, depend on the number of ranks"
"""End of a message."""


class ConfigError(ValueError):
    """A configuration is invalid. The message names the key, what was expected and what was given.

    >>> parse(DynamicsConfig, {"tolerance": -1.0})
    Traceback (most recent call last):
    simmatch.config.ConfigError: tolerance: expected greater than or equal to 0, got -1.0
    """


class Frozen(BaseModel):
    """Base class of all configuration: immutable, strict about types, without unknown keys.

    >>> class Retries(Frozen):
    ...     count: PositiveInt = 3
    >>> parse(Retries, {"counts": 5})
    Traceback (most recent call last):
    simmatch.config.ConfigError: counts: unknown key; expected one of count; got 'counts'; did you mean 'count'?
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, validate_default=True)


class DynamicsConfig(Frozen):
    """How the fast dynamics y* = argmin over y ≥ 0 of ½ yᵀM y − yᵀd are solved.

    See `simmatch.solvers.dynamics` for the solvers, the residual and the meaning of an iteration.

    >>> DynamicsConfig(tolerance=1e-3).max_iterations
    200
    """

    solver: Literal["auto", "coordinate_descent", "accelerated", "projected_gradient"] = "auto"
    """`coordinate_descent`: greedy moves and exact solutions on the active face, column by column; by far the fastest,
    but one device must hold all channels (on a GPU: moves only, in float32). `accelerated`: projected gradient with
    Nesterov momentum, adaptive restart and the certified step 1/λ̂; for any device and any number of shards.
    `projected_gradient`: the reference with a fixed step. `auto`: `coordinate_descent` if nothing is exchanged within
    the dynamics (`simmatch.solve`, `exchange: gather_state`) and the device is a CPU, or a GPU for which there is a
    kernel (see `simmatch.kernels`); otherwise `accelerated`."""

    tolerance: NonNegativeFloat = 1e-2
    """Relative residual at which a column stops. With 0 the gradient methods run exactly `max_iterations`, and
    `coordinate_descent` runs to the precision of the dtype."""

    max_iterations: PositiveInt = 200
    """Maximum number of iterations. An iteration of `coordinate_descent` is K moves of one channel each."""

    encode_iterations: PositiveInt = 30
    """Fixed number of iterations in evaluation, for the input of the next layer, readouts and an exported model."""

    check_every: PositiveInt = 4
    """Iterations between two tests of the residual and of the restart condition."""

    step: PositiveFloat | None = None
    """Step of `projected_gradient`. None: 1.9 / λ̂ with the certified bound λ̂. A step of 2/λmax(M) or more may
    diverge; 1.0 reproduces the authors' code."""

    ridge: NonNegativeFloat = 1e-6
    """The dynamics use M + ridge · mean(diag M) · I, which is not stored: with a singular M there may be no minimum."""

    exchange: Literal["every_iteration", "block", "gather_state"] = "every_iteration"
    """What shards exchange while learning. `every_iteration`: activities, once per iteration of the dynamics.
    `block`: activities, once per `inner_iterations` iterations on each shard's own block of M. `gather_state`: weights
    and statistics, once per update; during the update every shard holds all weights and solves a share of the
    columns."""

    inner_iterations: PositiveInt = 8
    """Iterations on each shard's own block per exchange, for `exchange: block`."""

    exchange_dtype: Literal["float32", "bfloat16"] | None = None
    """Format of the activities sent by `every_iteration` and `block`. If it is shorter than the format of the weights,
    rounded increments of the activities are sent, the same for all shards. None: the format of the weights."""

    tile_columns: PositiveInt | None = None
    """Columns (images × positions) per tile of the gradient methods; the working set of a tile should fit into the
    cache. None: about 2¹⁸ activities and 256 to 8192 columns, or on a GPU about 2²⁴ activities. With few channels, many
    columns are needed to make the overhead of an operation negligible."""

    tiles_in_flight: PositiveInt = 2
    """Number of tiles that take turns, so that one computes while the exchange of another is in progress."""

    def encoding(self) -> DynamicsConfig:
        """The same dynamics with a fixed number of iterations, as used in evaluation and in an exported model.

        A fixed number of iterations requires a gradient method, so this replaces coordinate descent.
        """
        solver = "projected_gradient" if self.solver == "projected_gradient" else "accelerated"
        changes = {"tolerance": 0.0, "max_iterations": self.encode_iterations}
        return self.model_copy(
            update=changes | {"solver": solver, "exchange": "every_iteration", "exchange_dtype": None}
        )

    def columns_per_tile(self, channels: int, device: str = "cpu") -> int:
        """Width of a tile: a function of the configuration, K and the device type only."""
        most, values = (8192, 2**18) if device == "cpu" else (2**20, 2**24)
        return self.tile_columns or min(most, max(256, values // channels // 256 * 256))

    def solver_on(self, device: str, *, alone: bool) -> str:
        """The solver that `auto` selects for a device type; `alone`: nothing is exchanged within the dynamics."""
        if self.solver != "auto":
            return self.solver
        by_column = alone and device == "cpu" and self.tolerance > 0
        return "coordinate_descent" if by_column else "accelerated"


class PlasticityConfig(Frozen):
    """How the slow variables W (feedforward), M (lateral) and V (label) learn.

    ΔW = η (⟨y xᵀ⟩ − W), ΔM = (η/τ)(⟨y yᵀ⟩ − M), ΔV = (⟨y zᵀ⟩ − V⟨z zᵀ⟩) diag(min(η/p̂, 1/p)), with means over columns,
    for V over labelled columns; see `simmatch.plasticity`.

    >>> PlasticityConfig(lr=0.4).tau
    1.0
    """

    rule: Literal["similarity_matching"] = "similarity_matching"
    """Name of the rule in `simmatch.plasticity.RULES`."""

    lr: Annotated[float, Field(gt=0, le=1)] = 0.1
    """η at the first update."""

    lr_decay_steps: PositiveInt | None = None
    """η decays as lr / (1 + step / lr_decay_steps). None: η is constant."""

    lr_lowest: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Smallest η to which it decays, for data that keeps changing."""

    tau: PositiveFloat = 1.0
    """τ, by which the learning rate of M is divided. 0 ≤ η/τ ≤ 1 keeps M positive semidefinite and entrywise
    nonnegative. With τ = 1, W and M average the same batches with the same weights, which keeps W x in the range of M.
    With any other value W x leaves that range if the input is nearly of low rank (images in [0, 1] have one dominant
    direction), and y diverges."""

    dead_after: PositiveInt = 50
    """A channel is dead after it was silent on every column of this many consecutive updates, or if M_ii is 0."""

    revive: bool = True
    """Draw a new feedforward row for a dead channel (a local rule). Dead channels are counted in any case."""

    @model_validator(mode="after")
    def _rates_keep_lateral_valid(self) -> PlasticityConfig:
        if self.lr > self.tau:
            raise ValueError(f"expected lr / tau at most 1, got lr={self.lr:g} with tau={self.tau:g}")
        return self


class TrainConfig(Frozen):
    """How long one layer learns.

    >>> TrainConfig(epochs=2, batch_size=50).positions is None
    True
    """

    epochs: PositiveInt = 1
    """Passes over the images."""

    images: PositiveInt | None = None
    """Images per epoch, drawn anew for each. None: all."""

    batch_size: PositiveInt = 100
    """Images per update."""

    positions: PositiveInt | None = None
    """Number of positions of each image to solve and learn from, drawn anew for each update. None: all."""

    start_after: NonNegativeInt = 0
    """With `schedule: together`: updates of the pass before this layer begins. Until then it only waits; its
    calibration and whitening are measured when it begins, and stay."""


class LayerOptions(Frozen):
    """What a layer computes: common to `LayerConfig` and to the arguments of `SimilarityMatchingConv2d`.

    >>> LayerOptions(out_channels=64, kernel_size=5, whiten=True).stride
    1
    """

    out_channels: PositiveInt
    """K, the number of neurons (output channels)."""

    kernel_size: KernelExtent
    """k of the k × k patches, or [height, width] of the patches: [1, k] for signals, which are maps of height 1.
    `full`: the kernel covers the whole input map, which makes the layer dense."""

    stride: PositiveExtent = 1
    """Pixels between neighbouring patches, of both axes or [down, across]."""

    padding: NonNegativeExtent = 0
    """Pixels of zeros added on each side of an image, of both axes or [above and below, left and right]."""

    normalize: Literal["none", "contrast"] = "none"
    """`contrast`: subtract the mean of each patch and divide by its standard deviation, at least `contrast_floor`."""

    contrast_floor: PositiveFloat = 0.1
    """Smallest standard deviation to divide by, in units of the input."""

    whiten: bool = False
    """ZCA-whiten the patches, with statistics measured once before the layer learns."""

    whiten_ridge: NonNegativeFloat = 0.1
    """Added to the eigenvalues of the patch covariance before inversion, relative to their mean."""

    label_gain: NonNegativeFloat = 0.0
    """Variance of a label direction relative to the mean variance of an input direction: α = label_gain · tr C_x / P.
    On whitened input this is the ratio of the eigenvalues of the two views in the canonical correlation objective."""

    dynamics: DynamicsConfig = DynamicsConfig()
    """How activities are solved for."""

    plasticity: PlasticityConfig = PlasticityConfig()
    """How weights learn."""


class LayerArguments(LayerOptions):
    """The arguments of `SimilarityMatchingConv2d` that determine what it computes.

    >>> parse(LayerArguments, {"in_channels": 1, "out_channels": 0, "kernel_size": 5})
    Traceback (most recent call last):
    simmatch.config.ConfigError: out_channels: expected greater than 0, got 0
    """

    in_channels: PositiveInt
    """C, the number of input channels."""

    kernel_size: PositiveExtent
    """k of the k × k patches, or [height, width] of the patches."""

    num_classes: NonNegativeInt = 0
    """Number of classes, that is of columns of the label weights V; 0 for a layer without labels."""

    seed: int = 0
    """Seed of the initial weights and of every row that is drawn anew."""

    reduce: Reduce = "fast"
    """`exact`: the weights are the same, bit by bit, for any number of ranks."""

    @field_validator("reduce")
    @classmethod
    def _exact_needs_columns(cls, reduce: Reduce, others: ValidationInfo) -> Reduce:
        dynamics = others.data.get("dynamics")
        if reduce == "exact" and dynamics is not None and dynamics.exchange != "gather_state":
            raise ValueError(f"expected fast with dynamics.exchange: {dynamics.exchange}, got exact, {EXACT_NEEDS}")
        return reduce

    @field_validator("num_classes")
    @classmethod
    def _gain_needs_classes(cls, num_classes: int, others: ValidationInfo) -> int:
        gain = others.data.get("label_gain", 0.0)
        if gain > 0 and num_classes == 0:
            raise ValueError(f"expected at least 1 with label_gain={gain:g}, got 0")
        return num_classes


class LayerConfig(LayerOptions):
    """One layer of a stack: what it computes, how it is trained, and what it passes on.

    >>> layer = LayerConfig(out_channels=64, kernel_size=5, normalize="contrast", pool=7)
    >>> layer.supervised, layer.train.batch_size
    (False, 100)
    """

    whiten_images: PositiveInt = 10_000
    """Number of images from which the patch statistics are measured."""

    whiten_patches: PositiveInt = 200_000
    """Number of patches sampled from those images, at random positions."""

    supervised: bool = False
    """Learn the label weights V, and let labels drive the activities with `label_gain`."""

    pool: PositiveExtent | None = None
    """Height and width, or [height, width], to which activities are average-pooled before the next layer or a readout:
    [1, n] for signals. None: no pooling."""

    power: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Power to which pooled activities are raised before the next layer or a readout; ½ reduces the influence of a few
    large values."""

    train: TrainConfig = TrainConfig()
    """How long the layer learns."""

    @model_validator(mode="after")
    def _gain_needs_labels(self) -> LayerConfig:
        if self.label_gain > 0 and not self.supervised:
            raise ValueError(f"expected supervised: true with label_gain={self.label_gain:g}, got supervised: false")
        return self


class ModelConfig(Frozen):
    """A stack of layers; the input of layer l is the label-free, pooled activity of layer l − 1.

    >>> layer = LayerConfig(out_channels=64, kernel_size=5, pool=7)
    >>> ModelConfig(layers=(layer, LayerConfig(out_channels=256, kernel_size="full"))).feature_layers()
    [1]
    """

    layers: Annotated[tuple[LayerConfig, ...], Field(min_length=1, strict=False)]
    """From the first to the last; at least one."""

    schedule: Literal["greedy", "together"] = "greedy"
    """`greedy`: one layer learns after the other, each from its own passes over the images, encoded by the layers below
    when these have learnt. `together`: all layers learn in one pass; update u of a layer sees batch u as encoded by the
    layers below after their update u. Then `epochs`, `images` and `batch_size` are equal for all layers."""

    freeze_below: bool = False
    """With `schedule: together`: where a layer begins, the layers below it stop learning, so `start_after` must rise
    from layer to layer. False: they go on, and upper layers lose accuracy, unless the rates below are low by then."""

    features: Literal["last", "all", "unsupervised"] = "last"
    """Input of a readout: the pooled activities of the last layer, of all layers side by side, or of the layers that
    learn without labels. (A readout overfits features that were learnt from the labels of its training images.)"""

    feature_pool: PositiveExtent | None = None
    """Height and width, or [height, width], to which larger axes of maps are averaged for a readout. None: maps are
    used as they are passed on."""

    @model_validator(mode="after")
    def _features_exist(self) -> ModelConfig:
        if not self.feature_layers():
            raise ValueError("expected a layer without labels with features: unsupervised, got supervised ones only")
        return self

    @model_validator(mode="after")
    def _schedule_fits(self) -> ModelConfig:
        check_schedule(self)
        return self

    def check_reduce(self, reduce: Reduce) -> None:
        """Check that every layer can learn with such sums.

        Raises
        ------
        ConfigError
            `exact` for a layer that exchanges activities.

        >>> ModelConfig(layers=(LayerConfig(out_channels=8, kernel_size=3),)).check_reduce("exact")
        Traceback (most recent call last):
        simmatch.config.ConfigError: reduce: expected fast with model.layers.0.dynamics.exchange: every_iteration, ...
        """
        for index, layer in enumerate(self.layers):
            if reduce == "exact" and layer.dynamics.exchange != "gather_state":
                key, mode = f"model.layers.{index}.dynamics.exchange", layer.dynamics.exchange
                raise ConfigError(f"reduce: expected fast with {key}: {mode}, got exact, {EXACT_NEEDS}")

    def feature_layers(self) -> list[int]:
        """Indices of the layers whose pooled activities are the input of a readout."""
        indices = range(len(self.layers))
        if self.features == "unsupervised":
            return [index for index in indices if not self.layers[index].supervised]
        return list(indices) if self.features == "all" else [len(self.layers) - 1]


ConfigT = TypeVar("ConfigT", bound=BaseModel)


def parse(cls: type[ConfigT], values: Mapping[str, Any]) -> ConfigT:
    """Build a configuration of class `cls` from a plain mapping.

    Raises
    ------
    ConfigError
        Some values are invalid; one line lists them: `key: expected …, got …`.

    >>> parse(TrainConfig, {"epochs": 5}).epochs
    5
    """
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        raise ConfigError(one_line(cls, error)) from None
