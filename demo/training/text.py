"""The text encoders: a CLIP and a T5, trained on captions alone.

Both learn by answering questions about captions: background, shapes, colours, sizes and places. CLIP answers from its
pooled embedding; T5 from its tokens, with a learnt attention per question, similar to the transformer's attention to
them.
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
from training.stage import Session, Stage

WIDTH = 128
MAX_SEQUENCE_LENGTH = 32
"""T5 tokens of a prompt; the longest caption has 28."""
_LENGTHS = (MAX_SEQUENCE_LENGTH,) * 6 + (48, 96)
"""Padded lengths in training: FLUX's encoders attend to the padding, and other programs pad to other lengths."""
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
"""Questions with their number of answers; the last answer about a thing means that there is none."""


@dataclass(frozen=True)
class TextPlan:
    """Steps and data of the text encoders' training."""

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
        """Return the pooled embeddings ``[count, WIDTH]`` and the tokens' embeddings ``[count, length, WIDTH]``."""
        ids, ids_2 = self.token_ids(captions, length=length)
        return self.encoder(ids).pooler_output, self.encoder_2(ids_2).last_hidden_state

    def token_ids(self, captions: list[str], *, length: int) -> tuple[Tensor, Tensor]:
        """Return padded token ids for both encoders.

        CLIP is causal and its embedding is taken at the end of the text, so padding has no effect.
        """
        device = self.encoder.device
        ids = self.tokenizer(captions, padding=True, truncation=True, max_length=CLIP_LENGTH, return_tensors="pt")
        ids_2 = self.tokenizer_2(
            captions, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )
        return ids.input_ids.to(device), ids_2.input_ids.to(device)


class CaptionClassifier(nn.Module):
    """Both encoders, and the heads that answer the questions; only the encoders are kept."""

    def __init__(self, parts: TextParts) -> None:
        super().__init__()
        self.clip, self.t5 = parts.encoder, parts.encoder_2
        self.from_pooled = nn.ModuleDict({_key(name): nn.Linear(WIDTH, count) for name, count in QUESTIONS.items()})
        self.from_tokens = nn.ModuleDict({_key(name): nn.Linear(WIDTH, count) for name, count in QUESTIONS.items()})
        self.queries = nn.Parameter(torch.randn(len(QUESTIONS), WIDTH) / math.sqrt(WIDTH))

    def forward(self, ids: Tensor, ids_2: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Return the answers' logits from CLIP and from T5, in the order of `QUESTIONS`."""
        pooled = self.clip(ids).pooler_output
        tokens = self.t5(ids_2).last_hidden_state
        attended = (self.queries @ tokens.transpose(1, 2)).softmax(dim=-1) @ tokens
        return (
            [head(pooled) for head in self.from_pooled.values()],
            [head(attended[:, index]) for index, head in enumerate(self.from_tokens.values())],
        )


def new_text_parts() -> TextParts:
    """Return tokenizers for the captions' words, and encoders with random weights."""
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


def train_text(session: Session, plan: TextPlan) -> TextParts:
    """Train both encoders, or resume; return the averages of their last weights."""
    parts = new_text_parts()
    classifier = CaptionClassifier(parts)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=plan.rate, betas=(0.9, 0.98), weight_decay=1e-2)
    stage = Stage("text", session, classifier, [optimizer], steps=plan.steps)
    for _ in stage:
        scenes, captions = draw_captions(stage.rng, plan.batch)
        ids, ids_2 = parts.token_ids(captions, length=stage.rng.choice(_LENGTHS))
        truth = torch.tensor([answers(*scene) for scene in scenes], device=session.device)
        with torch.autocast(session.device.type, dtype=torch.bfloat16):
            pooled, tokens = classifier(ids, ids_2)
        losses = [
            sum(
                (functional.cross_entropy(logits.float(), truth[:, index]) for index, logits in enumerate(answer)),
                torch.zeros((), device=session.device),
            )
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
    assert isinstance(kept, CaptionClassifier)
    return TextParts(parts.tokenizer, kept.clip.eval(), parts.tokenizer_2, kept.t5.eval())


def draw_captions(rng: random.Random, count: int) -> tuple[list[tuple[Scene, Style]], list[str]]:
    """Draw scenes with their styles, and a caption for each."""
    styles: list[Style] = ["neon" if rng.random() < _NEON else "plain" for _ in range(count)]
    scenes = [(draw_scene(rng, held_out=False, style=style), style) for style in styles]
    return scenes, [describe(scene, rng, style=style) for scene, style in scenes]


def answers(scene: Scene, style: Style) -> list[int]:
    """Return the right answers to the questions."""
    colours = list(COLOURS)
    places = [*PLACES, None]
    right: dict[str, int] = {
        "background": colours.index(scene.background),
        "style": int(style == "neon"),
        "relation": ("beside", "above", None).index(scene.relation),
        "place": places.index(scene.place if scene.relation is None else None),
    }
    for which, thing in zip(("first", "second"), (*scene.things, None), strict=False):
        right[f"{which} shape"] = SHAPES.index(thing.shape) if thing else len(SHAPES)
        right[f"{which} colour"] = colours.index(thing.colour) if thing else len(colours)
        right[f"{which} size"] = SIZES.index(thing.size) if thing else len(SIZES)
    return [right[name] for name in QUESTIONS]


def _key(name: str) -> str:
    return name.replace(" ", "_")
