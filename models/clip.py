"""CLIP with a head for classification, with the calls of a federated client."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from library.optim.arguments import Rule, check_values, flag, plain, whole_number
from library.training.errors import UserError
from models.parameters import as_arrays, load_arrays, refuse_nonfinite
from utils.packages import missing_package

try:
    from transformers import CLIPConfig, CLIPModel
except ModuleNotFoundError as error:
    raise missing_package(error) from error

HEAD_SEED = 0
EVALUATION_BATCH = 256  # images
DEFAULT_MODEL = "openai/clip-vit-base-patch32"
VISION = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "image_size",
    "patch_size",
    "hidden_act",
    "layer_norm_eps",
)
RULES: dict[str, Rule] = {
    "model_name": Rule(lambda v: isinstance(v, str) and v != "", "a name or a folder"),
    "num_classes": whole_number(1),
    "normalize_features": flag(),
    "freeze_vision_encoder": flag(),
}

Named = list[tuple[str, nn.Parameter]]
MakeOptimizer = Callable[[Named], torch.optim.Optimizer]


class Metrics(TypedDict):
    """Mean cross entropy in nats, share of right answers from 0 to 1, number of images."""

    loss: float
    accuracy: float
    num_samples: int


class FederatedCLIPModel(nn.Module):
    """CLIP's image features (Radford et al. 2021, arXiv 2103.00020) and a linear head over them.

    The head's first values are the same on every machine. CLIP's text tower is there, as in the
    files, but is never run. Interface: spec 4 (Files).

    Args:
        model_name: a name at the Hugging Face hub, or a folder as `save_pretrained` writes it.
        num_classes: of the head.
        normalize_features: scale features to length 1 and by CLIP's own temperature before the
            head; otherwise the head sees them as they are.
        freeze_vision_encoder: leave the vision tower as it is; the projection behind it, the
            temperature and the head still train.

    Raises:
        UserError: the model cannot be loaded; says what to do.
        ValueError: an impossible argument.
    """

    clip: CLIPModel
    classifier: nn.Linear

    def __init__(
        self,
        model_name: str = DEFAULT_MODEL,
        num_classes: int = 10,
        normalize_features: bool = True,
        freeze_vision_encoder: bool = False,
    ) -> None:
        super().__init__()
        check_model_arguments(locals())
        clip = _load(model_name)
        self._set_up(clip, model_name, num_classes, normalize_features, freeze_vision_encoder)

    @classmethod
    def from_config(
        cls,
        config: CLIPConfig,
        num_classes: int = 10,
        normalize_features: bool = True,
        freeze_vision_encoder: bool = False,
    ) -> FederatedCLIPModel:
        """The architecture with random weights, from torch's random numbers.

        `with torch.device("meta")` it takes no memory, and counts parameters.
        """
        check_model_arguments(locals())
        model = cls.__new__(cls)
        nn.Module.__init__(model)
        model._set_up(CLIPModel(config), "", num_classes, normalize_features, freeze_vision_encoder)
        return model

    def _set_up(
        self, clip: CLIPModel, name: str, classes: int, normalize: bool, freeze: bool
    ) -> None:
        self.name_or_path = name  # where PEFT looks for the base model's name
        self.num_classes = classes
        self.normalize_features = normalize
        self.clip = clip
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(HEAD_SEED)
            self.classifier = nn.Linear(clip.visual_projection.out_features, classes)
        if freeze:
            self.clip.vision_model.requires_grad_(False)
        self.eval()
        self.configure_optimizer(torch.optim.AdamW)

    @property
    def image_size(self) -> int:
        """Height and width of the images, in pixels."""
        return int(self.clip.vision_model.embeddings.image_size)

    def architecture(self) -> dict[str, Any]:
        """Sizes and choices of the part of CLIP that is run, which no weight tells."""
        vision: Any = self.clip.config.vision_config
        found = {name: getattr(vision, name) for name in VISION}
        return found | {"projection_dim": self.clip.config.projection_dim}

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, num_classes] of images [N, 3, S, S] with CLIP's normalisation."""
        pooled = self.clip.vision_model(pixel_values=images).pooler_output
        features = self.clip.visual_projection(pooled)
        if self.normalize_features:
            features = F.normalize(features, dim=-1) * self.clip.logit_scale.exp()
        return self.classifier(features)

    def get_parameters(self) -> list[np.ndarray]:
        """All parameters, trained or not, in the model's order."""
        return as_arrays(dict(self.named_parameters()))

    def set_parameters(self, parameters: list[np.ndarray]) -> None:
        """Take the parameters that another's `get_parameters` returned.

        Raises:
            ValueError: they do not fit or are not finite; names the tensor, changes nothing.
        """
        load_arrays(dict(self.named_parameters()), parameters)

    def configure_optimizer(self, make: MakeOptimizer) -> None:
        """Choose the optimizer; without this call it is torch's AdamW.

        `make` gets all that is trainable, by name. It is called at the next `train_step`, and again
        when something else has become trainable; what an earlier optimizer remembered is dropped.
        """
        self._make_optimizer: MakeOptimizer = make
        self._optimizer: torch.optim.Optimizer | None = None
        self._optimized: Named = []

    def train_step(self, data: Tensor, labels: Tensor) -> float:
        """One step of the optimizer on images [N, 3, S, S] and labels [N]; returns the mean cross
        entropy before it, in nats.

        Raises:
            RuntimeError: nothing is trainable.
        """
        optimizer = self._current_optimizer()
        self.train()
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(self(self._moved(data)), self._moved(labels))
        loss.backward()
        optimizer.step()
        return loss.item()

    @torch.no_grad()
    def evaluate(self, data: Tensor, labels: Tensor) -> Metrics:
        """Loss and accuracy on images [N, 3, S, S] and labels [N], in evaluation mode.

        Raises:
            ValueError: there are no images, or not as many labels.
        """
        if not len(data) or len(data) != len(labels):
            raise ValueError(f"cannot evaluate {len(data)} images with {len(labels)} labels")
        was_training = self.training
        self.eval()
        try:
            logits = torch.cat([self(self._moved(part)) for part in data.split(EVALUATION_BATCH)])
        finally:
            self.train(was_training)
        labels = self._moved(labels)
        return {
            "loss": F.cross_entropy(logits, labels).item(),
            "accuracy": (logits.argmax(1) == labels).float().mean().item(),
            "num_samples": len(labels),
        }

    def _moved(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.clip.logit_scale.device)

    def trainable_parameters(self) -> Named:
        """What an optimizer gets."""
        return [(name, tensor) for name, tensor in self.named_parameters() if tensor.requires_grad]

    def _current_optimizer(self) -> torch.optim.Optimizer:
        trainable = self.trainable_parameters()
        if not trainable:
            raise RuntimeError("nothing is trainable; were LoRA's layers disabled?")
        if self._optimizer is None or not _same(trainable, self._optimized):
            self._optimizer, self._optimized = self._make_optimizer(trainable), trainable
        return self._optimizer


def _same(one: Named, other: Named) -> bool:
    """The same tensors by the same names."""
    return [(name, id(tensor)) for name, tensor in one] == [(n, id(t)) for n, t in other]


def check_model_arguments(given: Mapping[str, Any], owner: str = "FederatedCLIPModel") -> None:
    """
    Raises:
        ValueError: an impossible value; names it and what is allowed.
    """
    check_values(RULES, {name: plain(given[name]) for name in RULES if name in given}, owner)


def _load(name: str) -> CLIPModel:
    """Weights in float32, whatever the file has.

    Raises:
        UserError: there is no such model, it is none of CLIP, or weights are missing.
    """
    advice = (
        "model_name is a name at the Hugging Face hub, which needs a network the first time "
        f"(such as {DEFAULT_MODEL}), or a folder with config.json and model.safetensors "
        "(assets/tiny_clip is one)."
    )
    try:
        kind = CLIPConfig.get_config_dict(name)[0].get("model_type")
        if kind != "clip":
            raise UserError(f"The model '{name}' is of type {kind!r}, not of type 'clip'. {advice}")
        loaded: Any = CLIPModel.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        where = "The folder" if Path(name).is_dir() else "The model"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{where} '{name}' cannot be loaded: {reason}\n{advice}") from error
    model, report = loaded
    if report["missing_keys"]:
        some = ", ".join(sorted(report["missing_keys"])[:3])
        raise UserError(
            f"The weights of '{name}' lack {len(report['missing_keys'])} of CLIP's tensors: {some}."
        )
    try:
        refuse_nonfinite(dict(model.named_parameters()))
    except ValueError as error:
        raise UserError(f"The weights of '{name}' are broken: {error}.") from error
    return model
