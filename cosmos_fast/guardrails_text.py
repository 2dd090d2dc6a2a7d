"""Two judges of a prompt: word lists, and a small language model trained to say whether a text is safe.

Both raise when they cannot judge. Neither ever takes a fault for "safe".
"""

from __future__ import annotations

import difflib
import functools
import re
import shutil
import string
import tempfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import torch

from .formats import CheckpointError, ClipError, EnvironmentProblem
from .vision_tower import need_transformers

WITHOUT: Final = "Or go without: --no-guardrails, in Python guardrails=False."
INSTALL: Final = f"Run: pip install 'cosmos-fast[guardrails]'. {WITHOUT}"
PACKAGES: Final = ("better-profanity", "nltk", "transformers")

MIN_FUZZY_CHARS: Final = 6
"""Listed entries of at least so many characters are also searched for with small misspellings."""

FUZZY_CHARS: Final = 0.4
"""Misspelling of n characters: difflib's ratio of at least (n - FUZZY_CHARS) / n."""

MAX_NEW_TOKENS: Final = 128

_MARK: Final = "\u2588"  # not ASCII, so a prompt that is all ASCII by then cannot hold it
_SAFETY = re.compile(r"Safety:\s*(Safe|Unsafe|Controversial)\b")
_CATEGORIES = re.compile(r"Categories:\s*(.+)")


@dataclass(frozen=True)
class Verdict:
    """What a check says. `reason` tells why it blocked; `detail` is for the record."""

    is_safe: bool
    check: str
    reason: str = ""
    detail: str = ""


def need_packages() -> dict[str, str]:
    """Versions of the packages the text checks need. Raises EnvironmentProblem naming those that are missing."""
    versions, missing = {}, []
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            missing.append(package)
    if missing:
        raise EnvironmentProblem(
            f"guardrails: need the packages {', '.join(missing)}, which are not installed. {INSTALL}"
        )
    return versions


# --- word lists ---


@functools.cache
def _plain_copy(folder: Path) -> tempfile.TemporaryDirectory[str]:
    """A copy of a folder without links, kept until the process ends. NLTK refuses to follow links, which is all
    that the hub's cache holds."""
    copy = tempfile.TemporaryDirectory(prefix="cosmos-fast-nltk-")
    shutil.copytree(folder, copy.name, dirs_exist_ok=True)
    return copy


class Blocklist:
    """Word lists of a folder: `custom` and `whitelist` words, `exact_match` phrases, `nltk_data` for word forms.

    Raises CheckpointError for a folder without them and EnvironmentProblem without the packages.
    """

    name = "blocklist"

    def __init__(self, folder: Path) -> None:
        need_packages()
        import nltk
        from better_profanity import Profanity

        words = {part: self._words(folder / part) for part in ("custom", "whitelist", "exact_match")}
        if not words["custom"]:
            raise CheckpointError(f"guardrails: {folder / 'custom'} must hold words, got none.")
        if not (folder / "nltk_data").is_dir():
            raise CheckpointError(f"guardrails: {folder} must hold nltk_data, got none. Download it again.")
        data = str(Path(_plain_copy(folder / "nltk_data").name))
        if data not in nltk.data.path:
            nltk.data.path.insert(0, data)
        self._allowed = frozenset(word.lower() for word in words["whitelist"])
        self._phrases = [" ".join(phrase.lower().split()) for phrase in words["exact_match"]]
        self._profanity = Profanity(words["custom"])
        self._profanity.load_censor_words(words["custom"], whitelist_words=list(words["whitelist"]))
        self._tokenize, self._lemmatize = nltk.word_tokenize, nltk.WordNetLemmatizer().lemmatize
        try:
            self._forms("two words")  # NLTK opens its data when first asked
        except LookupError as error:
            what = next(
                (line.strip() for line in str(error).splitlines() if "Resource" in line), "a resource"
            )
            raise CheckpointError(f"guardrails: {folder / 'nltk_data'} is incomplete: {what}") from None

    @staticmethod
    def _words(folder: Path) -> list[str]:
        """Lines of every file of a folder. An empty line would match every prompt and is no entry."""
        if not folder.is_dir():
            raise CheckpointError(f"guardrails: {folder} must be a folder of word lists, got none.")
        lines = [
            line.strip()
            for file in sorted(folder.iterdir())
            if file.is_file()
            for line in file.read_text(encoding="utf-8").splitlines()
        ]
        return [line for line in lines if line]

    def judge(self, prompt: str) -> Verdict:
        """Lists first on the words as they stand, then on their dictionary forms, then phrase by phrase."""
        if not prompt:
            return Verdict(False, self.name, "the prompt is empty")
        text = re.sub(r"[^\x00-\x7F]+", " ", prompt)
        for words in (text, self._forms(text)):
            if found := self._censored(words):
                return Verdict(False, self.name, f"a word of the list: {found!r}")
        if phrase := self._phrase(text):
            return Verdict(False, self.name, f"a phrase of the list: {phrase!r}")
        return Verdict(True, self.name)

    def _forms(self, text: str) -> str:
        return " ".join(self._lemmatize(token) for token in self._tokenize(text))

    def _censored(self, text: str) -> str | None:
        """The first word that is censored and not allowed."""
        censored = self._profanity.censor(text, censor_char=_MARK)
        if _MARK not in censored:
            return None
        before, after = text.split(), censored.split()
        if len(before) != len(after):  # a phrase became one mark: the words no longer face each other
            return text
        marked = [old for old, new in zip(before, after) if _MARK in new]
        return next((w for w in marked if w.strip(string.punctuation).lower() not in self._allowed), None)

    def _phrase(self, text: str) -> str | None:
        """The first listed phrase in the text, whole words, small misspellings of the longer ones included."""
        text = " ".join(text.lower().split())
        words = text.split()
        for phrase in self._phrases:
            if re.search(rf"\b{re.escape(phrase)}\b", text):
                return phrase
            if len(phrase) >= MIN_FUZZY_CHARS:
                count, least = len(phrase.split()), (len(phrase) - FUZZY_CHARS) / len(phrase)
                for i in range(len(words) - count + 1):
                    window = " ".join(words[i : i + count])
                    if difflib.SequenceMatcher(None, window, phrase).ratio() >= least:
                        return phrase
        return None


# --- language model ---


def parse(answer: str) -> Verdict:
    """The judgement in a model's answer; only Unsafe blocks. ClipError when there is none."""
    found = _SAFETY.search(answer)
    if found is None:
        raise ClipError(
            f"guardrails: the prompt judge must answer Safe, Unsafe or Controversial, got {answer[:80]!r}."
        )
    label, categories = found.group(1), _CATEGORIES.search(answer)
    kinds = categories.group(1).strip() if categories else ""
    reason = f"judged {label}" + (f" ({kinds})" if kinds and kinds != "None" else "")
    return Verdict(label != "Unsafe", PromptJudge.name, reason if label == "Unsafe" else "", label)


class PromptJudge:
    """Qwen3Guard: a causal language model that answers a prompt with its safety and categories."""

    name = "prompt judge"

    def __init__(self, folder: Path, device: torch.device) -> None:
        transformers = need_transformers("guardrails", "guardrails")
        bars = transformers.utils.logging
        had_bars = bars.is_progress_bar_enabled()
        bars.disable_progress_bar()  # this package has its own, and --quiet
        try:
            self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
            self._model, info = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.bfloat16, local_files_only=True, output_loading_info=True
            )
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"guardrails: {folder} must hold a causal language model and its tokenizer, got: {error}"
            ) from None
        finally:
            if had_bars:
                bars.enable_progress_bar()
        if info["missing_keys"] or info.get("mismatched_keys"):
            missing = sorted(map(str, info["missing_keys"] or info["mismatched_keys"]))
            raise CheckpointError(f"guardrails: {folder} must hold every weight, got no {missing[0]}.")
        if not getattr(self._tokenizer, "chat_template", None):
            raise CheckpointError(f"guardrails: {folder} must hold a chat template, got a tokenizer without.")
        self._model = self._model.eval().requires_grad_(False).to(device)
        self._device = device

    @torch.inference_mode()
    def answer(self, prompt: str) -> str:
        """What the model says, with the generation settings it was published with.

        Those may draw at random, so the draw is seeded: one prompt, one answer. The caller's generators are left
        as they were.
        """
        chat = [{"role": "user", "content": prompt}]
        text = self._tokenizer.apply_chat_template(chat, tokenize=False)
        given = self._tokenizer([text], return_tensors="pt").to(self._device)
        devices = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(0)
            made = self._model.generate(**given, max_new_tokens=MAX_NEW_TOKENS)
        return str(self._tokenizer.decode(made[0][given["input_ids"].shape[1] :], skip_special_tokens=True))

    def judge(self, prompt: str) -> Verdict:
        return parse(self.answer(prompt))
