"""From prompts to embeddings: CLIP's tokenizer and the text encoders of Stable Diffusion."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import hub
from .loading import read_json, write_atomically, write_json
from .models.clip import CLIPTextModel

if TYPE_CHECKING:
    import tokenizers

START, END = "<|startoftext|>", "<|endoftext|>"
# CLIP's word pattern (Radford et al. 2021): special tokens, English contractions, runs of letters, single digits, rest.
WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
FILES = ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


class Tokenizer:
    """CLIP's lower-cased byte-pair encoding.

    Args:
        vocab: token -> id.
        merges: pairs of tokens in the order of their ranks.
        model_max_length: tokens a prompt, start and end included.
        pad_token: fills short prompts; SD 2.x's and SDXL's second tokenizer use ``"!"``.
    """

    def __init__(
        self,
        vocab: Mapping[str, int],
        merges: Sequence[tuple[str, str]],
        *,
        model_max_length: int = 77,
        pad_token: str = END,
    ):
        for token in (START, END, pad_token):
            if token not in vocab:
                raise ValueError(f"The tokenizer's vocabulary has no token {token!r}; it is not one of CLIP's kind.")
        self.vocab = dict(vocab)
        self.merges = list(merges)
        self.model_max_length = model_max_length
        self.pad_token = pad_token
        self.bos_token_id, self.eos_token_id = vocab[START], vocab[END]
        self.pad_token_id = vocab[pad_token]
        self._backend = _backend(self.vocab, self.merges, pad_token)

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str], *, subfolder: str | None = None, **where: Any) -> Tokenizer:
        """Read a published tokenizer (``vocab.json`` with ``merges.txt``, or ``tokenizer.json``).

        Args:
            name, subfolder: hub id, shipped name or folder, and the folder inside it.
            where: ``revision``, ``token``, ``cache_dir``, ``local_files_only``, ``force_download``.

        Raises:
            FileNotFoundError: there is no tokenizer.
        """
        prefix = f"{subfolder.strip('/')}/" if subfolder else ""

        def select(files: list[str]) -> list[str]:
            found = [prefix + name for name in FILES if prefix + name in files]
            both = {prefix + "vocab.json", prefix + "merges.txt"} <= set(found)
            return found if both else hub.required(files, prefix + "tokenizer.json") + found

        return cls.from_folder(hub.part(hub.fetch(name, select, **where), prefix))

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """Read a local folder; see `from_pretrained`."""
        if (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
            vocab = read_json(folder / "vocab.json")
            lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
            pairs = [line.split() for line in lines if line and not line.startswith("#version")]
        else:
            model = read_json(folder / "tokenizer.json")["model"]
            vocab = model["vocab"]
            pairs = [merge.split() if isinstance(merge, str) else merge for merge in model["merges"]]
        settings: dict[str, Any] = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            if (folder / name).exists():
                settings |= read_json(folder / name)
        pad = settings.get("pad_token") or END
        # Absurd maximal lengths (1e30) are how "no limit" is published; CLIP's positions end at 77.
        length = min(int(settings.get("model_max_length", 77)), 77)
        return cls(
            vocab,
            [(first, second) for first, second in pairs],
            model_max_length=length,
            pad_token=pad["content"] if isinstance(pad, dict) else pad,
        )

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Write ``vocab.json``, ``merges.txt`` and ``tokenizer_config.json``, each atomically."""
        folder = Path(save_directory)
        text = "#version: 0.2\n" + "\n".join(" ".join(pair) for pair in self.merges) + "\n"
        ordered = json.dumps(self.vocab, ensure_ascii=False)
        write_atomically(folder / "vocab.json", lambda path: path.write_text(ordered, encoding="utf-8"))
        write_atomically(folder / "merges.txt", lambda path: path.write_text(text, encoding="utf-8"))
        write_json(
            folder / "tokenizer_config.json",
            {
                "tokenizer_class": "CLIPTokenizer",
                "model_max_length": self.model_max_length,
                "bos_token": START,
                "eos_token": END,
                "unk_token": END,
                "pad_token": self.pad_token,
                "do_lower_case": True,
            },
        )

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """Token ids (len(prompts), model_max_length), int64: start, the words, end, padding.

        A prompt that is too long is cut, and a warning says what was cut.
        """
        room = self.model_max_length - 2
        rows = []
        for prompt, encoding in zip(prompts, self._backend.encode_batch(list(prompts)), strict=True):
            ids = encoding.ids
            if len(ids) > room:
                cut = prompt[encoding.offsets[room][0] :]
                warnings.warn(
                    f"CLIP reads at most {room} tokens, and the prompt has {len(ids)}; this part of it has no "
                    f"effect: {cut!r}.",
                    stacklevel=2,
                )
            row = [self.bos_token_id, *ids[:room], self.eos_token_id]
            rows.append(row + [self.pad_token_id] * (self.model_max_length - len(row)))
        return torch.tensor(rows, dtype=torch.int64)


def _backend(vocab: dict[str, int], merges: list[tuple[str, str]], pad_token: str) -> tokenizers.Tokenizer:
    from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

    backend = Tokenizer(models.BPE(vocab, merges, unk_token=END, end_of_word_suffix="</w>", fuse_unk=False))
    backend.normalizer = normalizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    split = pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.add_special_tokens([AddedToken(token, special=True) for token in dict.fromkeys((START, END, pad_token))])
    return backend


@dataclass(frozen=True)
class TextEncoding:
    """Encoded prompts: ``embeds`` (N, L, D) for cross-attention, ``pooled`` (N, P) for SDXL's conditioning."""

    embeds: Tensor
    pooled: Tensor

    def repeat(self, times: int) -> TextEncoding:
        """Every prompt ``times`` times in a row: (N * times, …)."""
        return TextEncoding(self.embeds.repeat_interleave(times, 0), self.pooled.repeat_interleave(times, 0))


def encode_prompts(
    prompts: Sequence[Sequence[str]],
    tokenizers: Sequence[Tokenizer],
    encoders: Sequence[CLIPTextModel],
    *,
    penultimate: bool,
    clip_skip: int | None = None,
) -> TextEncoding:
    """Encode prompts with one text encoder (SD 1.5, 2.x) or two (SDXL: their states side by side).

    Args:
        prompts: for each encoder its N prompts.
        tokenizers, encoders: one for each.
        penultimate: take the last but one layer without the final norm (SDXL) instead of the normalised last one.
        clip_skip: go back so many further layers; SD 1.5 then still applies the final norm.

    Returns:
        ``embeds`` (N, 77, sum of widths) in the dtype of the last encoder's results, which give ``pooled`` too.

    Raises:
        ValueError: ``clip_skip`` is negative or leaves no layer.
    """
    states, pooled = [], None
    for texts, tokenizer, encoder in zip(prompts, tokenizers, encoders, strict=True):
        output = encoder(tokenizer(texts).to(encoder.device))
        back = (clip_skip or 0) + (2 if penultimate else 1)
        if clip_skip is not None and not 0 <= clip_skip <= len(output.hidden_states) - (back - clip_skip):
            raise ValueError(
                f"clip_skip is {clip_skip}, but this text encoder has {len(output.hidden_states) - 1} layers; use a "
                "smaller number, 0 or None for none."
            )
        if penultimate:
            states.append(output.hidden_states[-back])
        elif clip_skip is None:
            states.append(output.last_hidden_state)
        else:
            states.append(encoder.text_model.final_layer_norm(output.hidden_states[-back]))
        pooled = output.pooled
    if pooled is None:
        raise ValueError("No text encoder is loaded: pass prompt_embeds= instead of prompt=.")
    return TextEncoding(torch.cat(states, dim=-1).to(states[-1].dtype), pooled)
