"""Parts of the demo's FLUX checkpoints: tokenizers for given words, scheduler, and the folder's files."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import diffusers
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import CLIPTextModel, CLIPTokenizer, PreTrainedTokenizerFast, T5EncoderModel

CLIP_LENGTH = 77
CLIP_START, CLIP_END = "<|startoftext|>", "<|endoftext|>"
T5_PAD, T5_END, T5_UNKNOWN = "<pad>", "</s>", "<unk>"


def joined(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    """Merge every occurrence of `pair` in `symbols` into one symbol."""
    result: list[str] = []
    index = 0
    while index < len(symbols):
        width = 2 if tuple(symbols[index : index + 2]) == pair else 1
        result.append("".join(symbols[index : index + width]))
        index += width
    return result


def learn_merges(vocabulary: Sequence[str]) -> list[tuple[str, str]]:
    """Return byte-pair merges, most frequent first, until every word of `vocabulary` is one symbol.

    The tokenizers library has a trainer, but it breaks ties differently on each run.
    """
    spelled = [[*word[:-1], word[-1] + "</w>"] for word in vocabulary]
    merges: list[tuple[str, str]] = []
    while counts := Counter(pair for symbols in spelled for pair in pairwise(symbols)):
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        spelled = [joined(symbols, best) for symbols in spelled]
    return merges


def clip_tokenizer(words: Sequence[str]) -> CLIPTokenizer:
    """Return a byte-level BPE tokenizer like CLIP's, with merges learnt from `words`.

    Every byte is a token, alone and at the end of a word, so it encodes any text.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = learn_merges(words)
    # In the order of CLIP's vocabulary: bytes, bytes that end a word, merges, the two special tokens.
    tokens = [*alphabet, *(character + "</w>" for character in alphabet), *map("".join, merges), CLIP_START, CLIP_END]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=CLIP_LENGTH)


def t5_tokenizer(words: Sequence[str], *, max_length: int) -> PreTrainedTokenizerFast:
    """Return a unigram tokenizer like T5's, with `words` and byte fallback for everything else.

    The class is not T5Tokenizer because transformers 5 rebuilds that one without byte fallback when it loads a folder.
    """
    special = [(T5_PAD, 0.0), (T5_END, 0.0), (T5_UNKNOWN, 0.0)]
    pieces = [(f"\u2581{word}", -6.0) for word in words]
    characters = [(chr(code), -9.0) for code in range(ord("!"), ord("~") + 1)]
    fallback = [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    vocabulary = [*special, ("\u2581", -7.0), *pieces, *characters, *fallback]

    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=2, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(r"\s+"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
    )
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always")])
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {T5_END}", special_tokens=[(T5_END, 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=max_length,
        pad_token=T5_PAD,
        eos_token=T5_END,
        unk_token=T5_UNKNOWN,
    )


def flux_scheduler(*, schnell: bool) -> FlowMatchEulerDiscreteScheduler:
    """Return the scheduler of FLUX.1-dev, or of FLUX.1-schnell."""
    return FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=1000,
        shift=1.0 if schnell else 3.0,
        use_dynamic_shifting=not schnell,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )


@dataclass(frozen=True)
class Parts:
    """The parts of a FLUX checkpoint."""

    scheduler: FlowMatchEulerDiscreteScheduler
    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    tokenizer_2: PreTrainedTokenizerFast
    text_encoder_2: T5EncoderModel
    transformer: FluxTransformer2DModel
    vae: AutoencoderKL


def write_index(folder: Path) -> None:
    """Write model_index.json, which names the class of each part.

    FluxPipeline would name classes that only transformers 5 has.
    """
    parts = {
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "PreTrainedTokenizerFast"],
        "transformer": ["diffusers", "FluxTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    index = {"_class_name": "FluxPipeline", "_diffusers_version": diffusers.__version__, **parts}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def change_json(path: Path, **values: str) -> None:
    """Set values in a JSON file."""
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(config | values, indent=2) + "\n", encoding="utf-8")


def write_tokenizers(folder: Path, tokenizer: CLIPTokenizer, tokenizer_2: PreTrainedTokenizerFast) -> None:
    """Write both tokenizers so that transformers 4 and 5 load them."""
    tokenizer.save_pretrained(folder / "tokenizer")
    tokenizer.backend_tokenizer.model.save(str(folder / "tokenizer"))  # vocab.json and merges.txt, for transformers 4
    tokenizer_2.save_pretrained(folder / "tokenizer_2")
    change_json(folder / "tokenizer_2" / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")


def write_clip_encoder(folder: Path, model: CLIPTextModel) -> None:
    """Write CLIP's text encoder with the weight names of the published checkpoints.

    transformers 5 loads those and writes shorter ones, which transformers 4 would skip.
    """
    model.save_pretrained(folder)
    path = folder / "model.safetensors"
    weights = {f"text_model.{name.removeprefix('text_model.')}": weight for name, weight in load_file(path).items()}
    path.unlink()  # The loaded weights may still be mapped from this file: it must not be overwritten in place.
    save_file(weights, path, metadata={"format": "pt"})


def write_checkpoint(folder: Path, parts: Parts) -> None:
    """Write all parts into `folder`."""
    write_tokenizers(folder, parts.tokenizer, parts.tokenizer_2)
    write_clip_encoder(folder / "text_encoder", parts.text_encoder)
    parts.text_encoder_2.save_pretrained(folder / "text_encoder_2")
    # The default dtype of transformers, which has to be float32 like that of diffusers.
    for name in ("text_encoder", "text_encoder_2"):
        change_json(folder / name / "config.json", dtype="float32")
    parts.scheduler.save_pretrained(folder / "scheduler")
    parts.vae.save_pretrained(folder / "vae")
    parts.transformer.save_pretrained(folder / "transformer")
    write_index(folder)
    # Weights are written readable for the owner only; a server in a container often runs as another user.
    mode = (folder / "model_index.json").stat().st_mode
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)
