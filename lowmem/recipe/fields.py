"""Recipe: everything that decides which classifier you get, and nothing that decides what it costs.

Every field is checked when a recipe is loaded (loading.py), and any can be overridden with `--set section.key=value`.
"""

from typing import Annotated, Any, Literal

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, model_validator

Probability = Annotated[float, Field(ge=0, le=1)]
Pixels = Annotated[int, Field(ge=16, le=4096)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Range = tuple[float, float]

AmpDtype = Literal["auto", "bf16", "fp16", "fp32"]


class Section(BaseModel):
    """A part of a recipe: immutable, and closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelRecipe(Section):
    name: Annotated[str, Field(min_length=1)]
    """A timm model, with or without its weights' tag: `resnet50`, `seresnet152d.ra2_in1k`."""
    weights: str = "pretrained"
    """Where the initial weights come from: `pretrained` (timm's hub), `none`, `file:PATH`, `package:NAME/PATH`."""
    weights_optional: bool = False
    """Whether to start from random weights, and say so, where the package or file of `weights` is missing."""
    head_init: Literal["timm", "zero"] = "timm"
    """Start of a new head: timm's own, or zeros, which leave the features undisturbed at the first steps."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout before the classifier head."""
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Stochastic depth."""
    options: dict[str, Any] = {}
    """Further arguments of timm's model, as `{ cardinality = 32, base_width = 4 }` or `{ img_size = 256 }`."""
    freeze_batchnorm: bool = False
    """Normalise with the running statistics of the initial weights and leave them unchanged."""


class DataRecipe(Section):
    train_px: Pixels = 224
    val_px: Pixels = 224
    test_px: Pixels = 224
    crop_frac: Annotated[float, Field(ge=0.5, le=1)] = 1.0
    """Evaluation keeps this central part of an image whose short side was resized to `px / crop_frac`."""
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Share of each class held out where the data folder has no val/ of its own."""
    max_side: Annotated[int, Field(ge=0, le=16384)] = 0
    """Train and evaluate on images shrunk once so that their longer side is at most this (data/shrunk.py); 0: on images as they are."""

    @model_validator(mode="after")
    def _images_are_not_shrunk_too_far(self) -> "DataRecipe":
        if 0 < self.max_side < self.train_px:
            raise ValueError(f"max_side {self.max_side} is less than train_px {self.train_px}; 0 leaves images as they are")
        return self


class AugmentRecipe(Section):
    """The experiment's augmentation; its order is blur, crop, sharpen, jitter, grey, flip. Zero switches a part off."""

    blur_prob: Probability = 0.0
    blur_sigma: Range = (0.1, 2.0)
    """Standard deviation of the Gaussian blur in pixels of the original image, drawn uniformly."""
    crop_scale: Range = (0.08, 1.0)
    """Area of the random crop as a share of the image, drawn uniformly; (1, 1) with crop_ratio (1, 1) is a centre crop."""
    crop_ratio: Range = (3 / 4, 4 / 3)
    """Aspect ratio of the random crop, drawn log-uniformly."""
    sharpen_prob: Probability = 0.0
    sharpen_factor: Annotated[float, Field(ge=0, le=10)] = 2.0
    brightness: Annotated[float, Field(ge=0, le=1)] = 0.0
    contrast: Annotated[float, Field(ge=0, le=1)] = 0.0
    saturation: Annotated[float, Field(ge=0, le=1)] = 0.0
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    grey_prob: Probability = 0.0
    flip_prob: Probability = 0.5

    @model_validator(mode="after")
    def _ranges_are_ordered(self) -> "AugmentRecipe":
        for name, low_limit, high_limit in (("blur_sigma", 0, 50), ("crop_scale", 1e-3, 1), ("crop_ratio", 0.1, 10)):
            low, high = getattr(self, name)
            if not low_limit <= low <= high <= high_limit:
                raise ValueError(f"{name} must be two ascending numbers from {low_limit} to {high_limit}")
        return self


class MixupRecipe(Section):
    prob: Probability = 0.0
    """Share of batches that are mixed."""
    alpha: Annotated[float, Field(gt=0, le=100)] = 1.0
    """The mixing weight is drawn from Beta(alpha, alpha) (Zhang et al., 2018)."""


class LossRecipe(Section):
    class_weights: Literal["none", "reciprocal", "balanced"] = "none"
    """`reciprocal`: 1 / count of the class; `balanced`: images / (classes x count). See `divide_by`."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    divide_by: Literal["weights", "images"] = "weights"
    """What the weighted sum over a batch is divided by. `weights` is PyTorch's mean over hard labels, which makes `reciprocal` and
    `balanced` the same loss; `images` is its mean over soft ones (mixup), where they differ by a factor."""


class OptimizerRecipe(Section):
    name: Literal["adamw"] = "adamw"
    lr: Annotated[float, Field(gt=0, le=10)] = 1e-3
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 1e-3
    betas: Annotated[tuple[Probability, Probability], Field()] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0, le=1e-2)] = 1e-8
    clip_norm: Annotated[float, Field(gt=0)] | None = None
    """Largest global norm of the gradient; absent means no clipping."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = None
    """Each layer below the head learns at this share of the rate of the layer above it, by timm's layers (Bao et al., 2022);
    absent means one rate for all."""
    exclude_norm_and_bias: bool = False
    """No weight decay for norms, biases and what the model itself exempts (timm's `filter_bias_and_bn`)."""


class EmaRecipe(Section):
    """The classifier as a moving average of weights and statistics over the steps (timm's ModelEmaV3)."""

    decay: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Share of the average that a step keeps; absent means the classifier is the weights themselves. With it, validation, the
    choice of the best epoch and the saved classifier use the average."""
    warmup: bool = False
    """The decay rises to `decay` as 1 - (1 + step)^(-2/3), so that the average does not hang on to the first weights."""

    @model_validator(mode="after")
    def _warms_up_to_something(self) -> "EmaRecipe":
        if self.warmup and self.decay is None:
            raise ValueError("warmup needs a decay to rise to, as in decay = 0.9998")
        return self


class LrReset(Section):
    epoch: Annotated[int, Field(ge=1)]
    """First epoch (counted from 1) trained at the new rate."""
    lr: Annotated[float, Field(gt=0, le=10)]


class ScheduleRecipe(Section):
    epochs: Annotated[int, Field(ge=1, le=100_000)] = 100
    kind: Literal["plateau", "cosine"] = "plateau"
    """What the learning rate does after the warm-up: `plateau` multiplies it by `decay_factor` where validation stands still;
    `cosine` falls step by step to `min_lr` at the end of `epochs` (Loshchilov and Hutter, 2017; timm's formula)."""
    warmup_epochs: Annotated[int, Field(ge=0)] = 0
    """Epochs over which the learning rate rises linearly to optimizer.lr."""
    decay_factor: Annotated[float, Field(gt=0, le=1)] = 0.5
    """The learning rate is multiplied by this when neither validation accuracy nor loss improved for `patience` epochs."""
    patience: Annotated[int, Field(ge=1)] = 2
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    resets: tuple[LrReset, ...] = ()
    early_stopping: Annotated[int, Field(ge=0)] = 0
    """Stop after this many epochs without a better validation accuracy or loss; 0 never stops early."""

    @model_validator(mode="after")
    def _parts_fit(self) -> "ScheduleRecipe":
        if self.kind == "cosine" and self.resets:
            raise ValueError("resets are for kind = plateau; a cosine runs from optimizer.lr to min_lr")
        return self


class BatchRecipe(Section):
    size: Annotated[int, Field(ge=1, le=65536)] = 32
    """Images per optimiser step."""
    norm_batch: Annotated[int, Field(ge=1)] | None = None
    """Images that share batch-norm statistics; a divisor of `size`. Absent: the whole batch."""

    @property
    def atom(self) -> int:
        """Images per atom: the norm batch."""
        return self.norm_batch or self.size

    @property
    def num_atoms(self) -> int:
        return self.size // self.atom

    @model_validator(mode="after")
    def _atoms_fill_the_batch(self) -> "BatchRecipe":
        if self.norm_batch is not None and self.size % self.norm_batch:
            raise ValueError(f"norm_batch {self.norm_batch} does not divide size {self.size}")
        return self


class Recipe(Section):
    """Which classifier: the whole of it."""

    model: ModelRecipe
    data: DataRecipe = DataRecipe()
    augment: AugmentRecipe = AugmentRecipe()
    mixup: MixupRecipe = MixupRecipe()
    loss: LossRecipe = LossRecipe()
    optimizer: OptimizerRecipe = OptimizerRecipe()
    ema: EmaRecipe = EmaRecipe()
    schedule: ScheduleRecipe = ScheduleRecipe()
    batch: BatchRecipe = BatchRecipe()
    amp: AmpDtype = "auto"
    """Arithmetic of the forward pass. `auto` is settled by the device once, before the first step: bf16 where the card
    computes in it, fp16 on older cards, fp32 on a CPU."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0

    def to_toml(self) -> str:
        """The recipe as a file that `--recipe` reads."""
        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))
