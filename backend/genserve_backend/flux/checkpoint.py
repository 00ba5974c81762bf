"""Properties of a FLUX checkpoint in diffusers format, from its config files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from genserve_backend.checkpoints import CheckpointError, read_json, require_folder, require_safetensors

WEIGHTS = ("transformer", "vae", "text_encoder", "text_encoder_2")
MAG_RATIOS_FILE = "mag_ratios.json"
"""File of a checkpoint folder with the ratios of MagCache, written by `flux.calibrate`."""
MAX_SEQUENCE_LENGTH = 512
"""Limit of FluxPipeline on T5 tokens."""
MAX_RATIO = 1e6
"""Limit on a ratio of MagCache; real ones are near 1."""


@dataclass(frozen=True)
class FluxCheckpoint:
    """Properties that define the limits and the defaults of requests."""

    path: Path
    name: str
    native_size: int
    """Default height and width in pixels: the VAE's ``sample_size`` (1024 for FLUX.1)."""
    guidance_embeds: bool
    """True if guidance has an effect: for dev, not for schnell."""
    max_sequence_length: int
    """T5 tokens of a prompt: the tokenizer's limit, at most 512."""
    mag_ratios: tuple[float, ...] | None = None
    """The checkpoint's own ratios for MagCache; None without its file."""

    @property
    def has_mag_ratios(self) -> bool:
        """True if MagCache can skip steps: with ratios of its own, or for a relative of dev, with dev's."""
        return self.mag_ratios is not None or self.guidance_embeds

    @property
    def default_steps(self) -> int:
        """Denoising steps: 28 for dev and 4 for schnell, as their model cards recommend."""
        return 28 if self.guidance_embeds else 4

    @property
    def default_guidance(self) -> float:
        """Guidance scale: 3.5, as dev's model card recommends; schnell has none."""
        return 3.5 if self.guidance_embeds else 0.0

    @classmethod
    def load(cls, path: Path) -> FluxCheckpoint:
        """Load the properties of the checkpoint in folder `path`.

        Raises:
            CheckpointError: The folder is missing, incomplete, or not FLUX.
        """
        require_folder(path, setting="FLUX_MODEL_PATH")
        pipeline = read_json(path / "model_index.json").get("_class_name")
        if pipeline != "FluxPipeline":
            raise CheckpointError(f"{path} holds a {pipeline}, not a FluxPipeline")
        for part in WEIGHTS:
            require_safetensors(path / part)
        tokens = read_json(path / "tokenizer_2" / "tokenizer_config.json").get("model_max_length")
        return cls(
            path=path,
            name=path.name,
            native_size=_positive(read_json(path / "vae" / "config.json").get("sample_size"), 1024),
            guidance_embeds=bool(read_json(path / "transformer" / "config.json").get("guidance_embeds")),
            max_sequence_length=min(_positive(tokens, MAX_SEQUENCE_LENGTH), MAX_SEQUENCE_LENGTH),
            mag_ratios=_mag_ratios(path / MAG_RATIOS_FILE),
        )


def _mag_ratios(path: Path) -> tuple[float, ...] | None:
    if not path.is_file():
        return None
    ratios = read_json(path).get("ratios")
    if not isinstance(ratios, list) or not ratios or not all(map(_is_ratio, ratios)):
        raise CheckpointError(f"{path} has no list of positive numbers named ratios")
    return tuple(map(float, ratios))


def _is_ratio(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < MAX_RATIO


def _positive(value: object, default: int) -> int:
    # Tokenizers without a limit have the float 1e30.
    return int(value) if isinstance(value, (int, float)) and 0 < value < 2**31 else default
