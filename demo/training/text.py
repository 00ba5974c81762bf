"""The text encoders: a CLIP and a T5 that learn from captions alone what they say.

FLUX's transformer starts from what its text encoders know. These two learn it by answering questions about captions:
which background, which shapes, colours and sizes, where. CLIP answers from its pooled embedding; T5 from its tokens,
with a learnt attention for each question, which is how the transformer will read them.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from flux_parts import CLIP_LENGTH, clip_tokenizer, t5_tokenizer
from shapes.captions import describe, vocabulary
from shapes.scenes import COLOURS, PLACES, SHAPES, SIZES, Scene, Style, draw_scene
from training.stage import Sitting, Stage

WIDTH = 128
MAX_SEQUENCE_LENGTH = 32
"""T5 tokens of a prompt; the longest caption has 28."""
_LENGTHS = (MAX_SEQUENCE_LENGTH,) * 6 + (48, 96)
"""Padded lengths to learn from: FLUX's encoders see the padding, and other programs pad to other lengths."""
_NEON = 0.1

QUESTIONS: dict[str, int] = {
    "background": len(COLOURS),
    "style": 2,
    "relation": 3,
    "place": len(PLACES) + 1,
    **{f"{which} shape": len(SHAPES) + 1 for which in ("first", "second")},
    **{f"{which} colour": len(COLOURS) + 1 for which in ("first", "second")},
    **{f"{which} size": len(SIZES) + 1 for which in ("first", "second")},
}
"""What the encoders have to tell, with the number of answers; the last answer of a thing means that there is none."""


@dataclass(frozen=True)
class TextPlan:
    """How long and on what the text encoders train."""

    steps: int = 800
    batch: int = 128
    rate: float = 1e-3


@dataclass(frozen=True)
class TextParts:
    """Both tokenizers and encoders."""

    tokenizer: CLIPTokenizer
    encoder: CLIPTextModel
    tokenizer_2: PreTrainedTokenizerFast
    encoder_2: T5EncoderModel

    def encode(self, captions: list[str], *, length: int = MAX_SEQUENCE_LENGTH) -> tuple[Tensor, Tensor]:
        """The pooled embeddings (count, WIDTH) and the tokens' embeddings (count, length, WIDTH)."""
        ids, ids_2 = self.token_ids(captions, length=length)
        return self.encoder(ids).pooler_output, self.encoder_2(ids_2).last_hidden_state

    def token_ids(self, captions: list[str], *, length: int) -> tuple[Tensor, Tensor]:
        """Padded token ids for both encoders.

        CLIP reads from left to right and its embedding is taken at the end of the text: padding changes nothing.
        """
        device = self.encoder.device
        ids = self.tokenizer(captions, padding=True, truncation=True, max_length=CLIP_LENGTH, return_tensors="pt")
        ids_2 = self.tokenizer_2(
            captions, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )
        return ids.input_ids.to(device), ids_2.input_ids.to(device)


class Reader(nn.Module):
    """Both encoders and the heads that answer the questions; only the encoders are kept."""

    def __init__(self, parts: TextParts) -> None:
        super().__init__()
        self.clip, self.t5 = parts.encoder, parts.encoder_2
        self.from_pooled = nn.ModuleDict({_key(name): nn.Linear(WIDTH, count) for name, count in QUESTIONS.items()})
        self.from_tokens = nn.ModuleDict({_key(name): nn.Linear(WIDTH, count) for name, count in QUESTIONS.items()})
        self.queries = nn.Parameter(torch.randn(len(QUESTIONS), WIDTH) / math.sqrt(WIDTH))

    def forward(self, ids: Tensor, ids_2: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The answers' logits from CLIP and from T5, in the order of `QUESTIONS`."""
        pooled = self.clip(ids).pooler_output
        tokens = self.t5(ids_2).last_hidden_state
        read = (self.queries @ tokens.transpose(1, 2)).softmax(dim=-1) @ tokens
        return (
            [head(pooled) for head in self.from_pooled.values()],
            [head(read[:, index]) for index, head in enumerate(self.from_tokens.values())],
        )


def new_text_parts() -> TextParts:
    """Tokenizers learnt from the captions' words, and encoders with random weights."""
    words = vocabulary()
    tokenizer, tokenizer_2 = clip_tokenizer(words), t5_tokenizer(words, max_length=MAX_SEQUENCE_LENGTH)
    clip = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=CLIP_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    t5 = T5Config(
        vocab_size=len(tokenizer_2),
        d_model=WIDTH,
        d_kv=WIDTH // 4,
        d_ff=2 * WIDTH,
        num_layers=3,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        pad_token_id=tokenizer_2.pad_token_id,
        eos_token_id=tokenizer_2.eos_token_id,
        decoder_start_token_id=tokenizer_2.pad_token_id,
    )
    return TextParts(tokenizer, CLIPTextModel(clip), tokenizer_2, T5EncoderModel(t5))


def train_text(sitting: Sitting, plan: TextPlan) -> TextParts:
    """Train both encoders, or go on; returns the averages of their last weights."""
    parts = new_text_parts()
    reader = Reader(parts)
    optimizer = torch.optim.AdamW(reader.parameters(), lr=plan.rate, betas=(0.9, 0.98), weight_decay=1e-2)
    stage = Stage("text", sitting, reader, [optimizer], steps=plan.steps)
    for _ in stage:
        scenes, captions = draw_captions(stage.rng, plan.batch)
        ids, ids_2 = parts.token_ids(captions, length=stage.rng.choice(_LENGTHS))
        truth = torch.tensor([answers(*scene) for scene in scenes], device=sitting.device)
        with torch.autocast(sitting.device.type, dtype=torch.bfloat16):
            pooled, tokens = reader(ids, ids_2)
        losses = [
            sum(functional.cross_entropy(logits.float(), truth[:, index]) for index, logits in enumerate(answer))
            for answer in (pooled, tokens)
        ]
        right = torch.stack(
            [
                torch.stack([logits.argmax(-1) == truth[:, index] for index, logits in enumerate(answer)])
                .float()
                .mean()
                for answer in (pooled, tokens)
            ]
        )
        stage.optimize(losses[0] + losses[1], clip_right=right[0], t5_right=right[1])
    kept = stage.averaged.module
    return TextParts(parts.tokenizer, kept.clip.eval(), parts.tokenizer_2, kept.t5.eval())


def draw_captions(rng: random.Random, count: int) -> tuple[list[tuple[Scene, Style]], list[str]]:
    """Scenes with their styles, and a caption for each."""
    styles: list[Style] = ["neon" if rng.random() < _NEON else "plain" for _ in range(count)]
    scenes = [(draw_scene(rng, held_out=False, style=style), style) for style in styles]
    return scenes, [describe(scene, rng, style=style) for scene, style in scenes]


def answers(scene: Scene, style: Style) -> list[int]:
    """The right answer to each of the questions."""
    colours = list(COLOURS)
    places = [*PLACES, None]
    told: dict[str, int] = {
        "background": colours.index(scene.background),
        "style": int(style == "neon"),
        "relation": ("beside", "above", None).index(scene.relation),
        "place": places.index(scene.place if scene.relation is None else None),
    }
    for which, thing in zip(("first", "second"), (*scene.things, None), strict=False):
        told[f"{which} shape"] = SHAPES.index(thing.shape) if thing else len(SHAPES)
        told[f"{which} colour"] = colours.index(thing.colour) if thing else len(colours)
        told[f"{which} size"] = SIZES.index(thing.size) if thing else len(SIZES)
    return [told[name] for name in QUESTIONS]


def _key(name: str) -> str:
    return name.replace(" ", "_")
