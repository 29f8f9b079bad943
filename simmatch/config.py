"""Typed, frozen configuration of the method, checked once at the edge.

Every class here refuses unknown keys and wrong types. `parse` turns a plain mapping (a YAML file, say) into
one of them and raises a `ConfigError` whose single line names the key, what was expected and what was given.
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

from simmatch.validation import one_line

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key, the expectation and the value given."""


class Frozen(BaseModel):
    """Base of all configuration: immutable, strict about types, closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, validate_default=True)


class DynamicsConfig(Frozen):
    """How the fast dynamics y* = argmin over y ≥ 0 of ½ yᵀM y − yᵀd is solved.

    See `simmatch.solvers.dynamics` for the solvers, the residual and the meaning of an iteration.
    """

    solver: Literal["auto", "coordinate_descent", "accelerated", "projected_gradient"] = "auto"
    """`coordinate_descent`: greedy moves and solutions on the face, column by column; by far the fastest, where one
    device holds all channels (on a GPU: moves alone, in float32). `accelerated`: projected gradient with Nesterov
    momentum, adaptive restart and certified step 1/λ̂; any device, any number of shards. `projected_gradient`: the
    fixed-step reference. `auto`: `coordinate_descent` where nothing is exchanged within the dynamics (`simmatch.solve`,
    `exchange: gather_state`) and the device is a CPU, or a GPU for which there is a kernel (see `simmatch.kernels`),
    else `accelerated`."""

    tolerance: NonNegativeFloat = 1e-2
    """A column stops once its relative residual is at most this. With 0 the gradient methods run exactly
    `max_iterations`, and `coordinate_descent` as far as the dtype allows."""

    max_iterations: PositiveInt = 200
    """Iterations after which the solver stops in any case. One of `coordinate_descent` is K moves of a channel."""

    encode_iterations: PositiveInt = 30
    """Fixed number of iterations in evaluation: what the next layer, the readouts and an exported model see."""

    check_every: PositiveInt = 4
    """Iterations between two looks at the residual and the restart test."""

    step: PositiveFloat | None = None
    """Step of `projected_gradient`. None: 1.9 / λ̂ with the certified bound λ̂. Anything at or above 2/λmax(M)
    may diverge; 1.0 reproduces the authors' code."""

    ridge: NonNegativeFloat = 1e-6
    """The system solved is M + ridge · mean(diag M) · I, never stored: a singular M has no minimum otherwise."""

    exchange: Literal["every_iteration", "block", "gather_state"] = "every_iteration"
    """What shards exchange while learning. `every_iteration`: activities, once per iteration of the dynamics.
    `block`: activities, once after several inner iterations on the own block. `gather_state`: weights and statistics,
    once per update; every shard holds all weights for its time and solves a share of the columns."""

    inner_iterations: PositiveInt = 8
    """Iterations on the own block for every exchange of `exchange: block`."""

    exchange_dtype: Literal["float32", "bfloat16"] | None = None
    """Format in which `every_iteration` and `block` send activities: where it is shorter than that of the weights,
    their increments, rounded alike for all shards. None: that of the weights."""

    tile_columns: PositiveInt | None = None
    """Columns (images × positions) per tile of the gradient methods; a tile's working set should fit the cache. None:
    about 2¹⁸ activities, 256 to 8192 columns: few channels need many columns to be worth an operation's overhead. On a
    GPU about 2²⁴ activities, which are worth the launch of a kernel."""

    tiles_in_flight: PositiveInt = 2
    """Tiles whose dynamics advance in turn, so that one computes while another's exchange is under way."""

    def encoding(self) -> DynamicsConfig:
        """The same dynamics with a fixed number of iterations, as used in evaluation and in an exported model.

        A fixed number means a gradient method: coordinate descent has no use for one.
        """
        solver = "projected_gradient" if self.solver == "projected_gradient" else "accelerated"
        changes = {"tolerance": 0.0, "max_iterations": self.encode_iterations}
        return self.model_copy(
            update=changes | {"solver": solver, "exchange": "every_iteration", "exchange_dtype": None}
        )

    def columns_per_tile(self, channels: int, device: str = "cpu") -> int:
        """Width of a tile, by the configuration, K and the kind of device alone."""
        most, values = (8192, 2**18) if device == "cpu" else (2**20, 2**24)
        return self.tile_columns or min(most, max(256, values // channels // 256 * 256))

    def solver_on(self, device: str, *, alone: bool) -> str:
        """The solver that `auto` stands for on a device type; `alone`: nothing is exchanged within the dynamics."""
        if self.solver != "auto":
            return self.solver
        by_column = alone and device == "cpu" and self.tolerance > 0
        return "coordinate_descent" if by_column else "accelerated"


class PlasticityConfig(Frozen):
    """How the slow variables W (feedforward), M (lateral) and V (label) learn.

    ΔW = η (⟨y xᵀ⟩ − W), ΔM = (η/τ)(⟨y yᵀ⟩ − M), ΔV = (⟨y zᵀ⟩ − V⟨z zᵀ⟩) diag(min(η/p̂, 1/p)), means over columns,
    for V over the labelled ones.
    """

    rule: Literal["similarity_matching"] = "similarity_matching"
    """Name of the rule in `simmatch.plasticity.RULES`."""

    lr: Annotated[float, Field(gt=0, le=1)] = 0.1
    """η at the first update."""

    lr_decay_steps: PositiveInt | None = None
    """η falls as lr / (1 + step / lr_decay_steps). None keeps it constant."""

    tau: PositiveFloat = 1.0
    """Divides M's rate. 0 ≤ η/τ ≤ 1 keeps M positive semidefinite and entrywise nonnegative. At 1 W and M average the
    same batches with the same weights, which keeps W x in the range of M. At any other value W x leaves it where the
    input is nearly of low rank (plain images in [0, 1]: one bright direction), and y explodes."""

    dead_after: PositiveInt = 50
    """A channel is dead once it was silent on every column of so many updates in a row, or once M_ii is 0."""

    revive: bool = True
    """Re-draw the feedforward row of a dead channel (a local rule); dead channels are counted either way."""

    @model_validator(mode="after")
    def _rates_keep_lateral_valid(self) -> PlasticityConfig:
        if self.lr > self.tau:
            raise ValueError(f"expected lr / tau at most 1, got lr={self.lr:g} with tau={self.tau:g}")
        return self


class TrainConfig(Frozen):
    """How long one layer learns."""

    epochs: PositiveInt = 1
    """Passes over the images."""

    images: PositiveInt | None = None
    """Images per pass, drawn anew each epoch. None: all."""

    batch_size: PositiveInt = 100
    """Images per update."""

    positions: PositiveInt | None = None
    """Positions of each image that are solved and learnt from, drawn anew for every update. None: all."""


class LayerOptions(Frozen):
    """What a layer computes: common to a layer of a run (`LayerConfig`) and to the constructor's arguments."""

    out_channels: PositiveInt
    """K, the number of neurons (output channels)."""

    kernel_size: PositiveInt | Literal["full"]
    """k of the k × k patches; `full` covers the whole input map, which makes the layer dense."""

    stride: PositiveInt = 1
    padding: NonNegativeInt = 0

    normalize: Literal["none", "contrast"] = "none"
    """`contrast`: subtract each patch's mean and divide by its standard deviation (clamped)."""

    contrast_floor: PositiveFloat = 0.1
    """Least standard deviation a patch is divided by, in units of the input."""

    whiten: bool = False
    """ZCA-whiten the patches with statistics taken once, before the layer learns."""

    whiten_ridge: NonNegativeFloat = 0.1
    """Added to the eigenvalues of the patch covariance before inversion, relative to their mean."""

    label_gain: NonNegativeFloat = 0.0
    """Variance of a label direction over the mean variance of an input direction: α = label_gain · tr C_x / P.
    On whitened input, the ratio of the two views' eigenvalues in the canonical correlation objective."""

    dynamics: DynamicsConfig = DynamicsConfig()
    plasticity: PlasticityConfig = PlasticityConfig()


class LayerArguments(LayerOptions):
    """The arguments of `SimilarityMatchingConv2d` that determine its numbers."""

    in_channels: PositiveInt
    """C."""

    kernel_size: PositiveInt
    """k."""

    num_classes: NonNegativeInt = 0
    """Classes of the label weights V; 0 for none."""

    seed: int = 0
    """Of the initial weights and of every re-drawn row."""

    @field_validator("num_classes")
    @classmethod
    def _gain_needs_classes(cls, num_classes: int, others: ValidationInfo) -> int:
        gain = others.data.get("label_gain", 0.0)
        if gain > 0 and num_classes == 0:
            raise ValueError(f"expected at least 1 with label_gain={gain:g}, got 0")
        return num_classes


class LayerConfig(LayerOptions):
    """One convolutional similarity-matching layer of a run: what it computes, and how it is trained and read."""

    whiten_images: PositiveInt = 10_000
    """Images from which the patch statistics are taken."""

    whiten_patches: PositiveInt = 200_000
    """Patches sampled from those images, at random positions."""

    supervised: bool = False
    """Learn the label weights V and let labels act on the dynamics with `label_gain`."""

    pool: PositiveInt | None = None
    """Average-pool the activities to a map of this height and width before the next layer or a readout."""

    power: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Pooled activities are raised to this power before the next layer or a readout; ½ keeps a few large ones from
    deciding."""

    train: TrainConfig = TrainConfig()

    @model_validator(mode="after")
    def _gain_needs_labels(self) -> LayerConfig:
        if self.label_gain > 0 and not self.supervised:
            raise ValueError(f"expected supervised: true with label_gain={self.label_gain:g}, got supervised: false")
        return self


class ModelConfig(Frozen):
    """A stack of layers; layer l reads the label-free, pooled activity of layer l − 1."""

    layers: Annotated[tuple[LayerConfig, ...], Field(min_length=1, strict=False)]

    features: Literal["last", "all", "unsupervised"] = "last"
    """What a readout sees: the pooled activities of the last layer, or side by side of all layers, or of those that
    learn without labels (a readout overfits features that have already seen the labels of its training images)."""

    feature_pool: PositiveInt | None = None
    """A readout sees larger maps averaged down to so many rows and columns; None: as they are passed on."""

    @model_validator(mode="after")
    def _features_exist(self) -> ModelConfig:
        if not self.feature_layers():
            raise ValueError("expected a layer without labels with features: unsupervised, got supervised ones only")
        return self

    def feature_layers(self) -> list[int]:
        """Indices of the layers whose pooled activities a readout sees."""
        everything = range(len(self.layers))
        if self.features == "unsupervised":
            return [index for index in everything if not self.layers[index].supervised]
        return list(everything) if self.features == "all" else [len(self.layers) - 1]


class DataConfig(Frozen):
    """Which images, and where they lie."""

    name: str
    """Name of the data set in `simmatch.data.sources.DATASETS`."""

    root: str | None = None
    """Folder of the files. None: `$SIMMATCH_DATA`, then the Debian package's folder, then a download."""

    train_images: PositiveInt | None = None
    """Use only the first so many training images. None: all."""

    test_images: PositiveInt | None = None
    """Use only the first so many test images. None: all."""

    damaged: Literal["stop", "skip"] = "stop"
    """What to do with an image whose values are not finite or outside [0, 1], or whose label is no class: end with a
    message that names the first, or leave such images out, before `train_images` are counted. A file that is
    truncated or not of its format always ends the run: nothing in it can be trusted."""

    max_skipped: PositiveInt = 100
    """Most images that may be left out; more is taken for a fault of the data set."""


ConfigT = TypeVar("ConfigT", bound=BaseModel)


def parse(cls: type[ConfigT], values: Mapping[str, Any]) -> ConfigT:
    """Validate a plain mapping as `cls`.

    Raises
    ------
    ConfigError
        One line per fault: `key: expected …, got …`.
    """
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        raise ConfigError(one_line(cls, error)) from None
