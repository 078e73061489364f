"""LM: a decoder and its tokenizer, which read, score, generate, and hold the stack of applied patches."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reknow.checks.arguments import typed
from reknow.model.chat import Chat, as_chat, asked_without_template
from reknow.model.decoder import Decoder
from reknow.model.exclusive import typed_exclusively
from reknow.model.experts import restored_on_error
from reknow.model.fingerprint import Fingerprint
from reknow.model.generation import Listener, check_sampling, continue_texts
from reknow.model.loading import check_tokenizer, open_model
from reknow.model.scoring import Score, likeliest_tokens, perplexity, score_texts
from reknow.model.tokens import Text, as_list, pair_texts
from reknow.model.verify import verify
from reknow.patching.active_memories import ActiveMemories
from reknow.patching.applied import Applied
from reknow.patching.memory import HookMemory
from reknow.patching.patches import Patch
from reknow.patching.stack import note_force, read_stack, with_patch, without_patch
from reknow.patching.weights import Weights
from reknow.progress import progress
from reknow.registry import make


class LM(Decoder):
    """A wrapped decoder; threads take turns on it.

    Args:
        source: name or path of a Hugging Face model, `demo:gpt2` or `demo:llama` for a bundled one, `demo:smollm2`
            for a real one from a package, a stack folder, one on the hub (`hub:owner/name@revision`), or a pair
            (model, tokenizer). A model given as a pair is used in place: it must be unedited, and `apply` changes its
            weights until `revert`.
        tokenizer: one, or the name or folder of one, instead of the model's own.
        dtype: of the weights; None keeps the checkpoint's, but float16 becomes float32 on a CPU.
        device: where the model goes; None: where it is, or the CPU.
        device_map: passed to transformers for models that span devices.
        chat: put prompts into the tokenizer's chat template; a `Chat` says with which system message and arguments.
        trust_remote_code: run code from the model's repository; off unless you ask.

    Attributes:
        computes_statistics: whether a method may read general text for statistics that are not kept yet; where it is
            False, it is refused.

    Raises:
        ModelError: the model cannot be loaded, or is of a kind that is not handled.
        InputError: the source is none of these.
    """

    def __init__(
        self,
        source: str | Path | tuple[Any, Any],
        *,
        tokenizer: Any = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | int | None = None,
        device_map: Any = None,
        chat: bool | Chat | None = False,
        trust_remote_code: bool = False,
    ):
        named, patches = isinstance(source, (str, Path)), list[Patch]()
        with progress.stage(f"opening {source if named else 'a model'}"):
            if isinstance(source, (str, Path)):
                source, patches = read_stack(source)
            model, tokenizer = open_model(source, tokenizer, dtype, device, device_map, trust_remote_code)
            name = str(source) if named else model.config._name_or_path or type(model).__name__
            check_tokenizer(tokenizer, name)
            with restored_on_error(model):
                super().__init__(model, tokenizer, name, as_chat(chat, tokenizer, name))
                self.computes_statistics = True
                self._weights = Weights(self.model)
                self._memories = ActiveMemories(self)
                self._applied = Applied(self._weights, self._memories)
                self.parts = verify(self)
            for patch in progress.each("applying patches", patches):
                self.apply(patch)

    @classmethod
    def demo(cls, name: str = "gpt2", **options) -> LM:
        """A small bundled model that knows real facts, `gpt2` or `llama`; or a real one from a package, `smollm2`
        (SmolLM2-135M-Instruct) or `gemma3` (Gemma 3 270M), which is converted once into the cache.

        Raises:
            InputError: there is none of that name.
            ModelError: the package is not installed; the message has the command.
        """
        return cls(f"demo:{name}", **options)

    # --- structure ---------------------------------------------------------------------------------------

    @typed_exclusively
    def weight(self, name: str) -> Tensor:
        """The current weight of the matrix `name`, seen as (out, in).

        Writing to the view writes to the model, unless the matrix is quantised or offloaded: then it is a copy.
        """
        return self._weights.current(name)

    @property
    def unmerged(self) -> tuple[str, ...]:
        """Matrices whose weight is as it was, with the change of the applied patches computed beside them."""
        return self._weights.unmerged

    @typed_exclusively
    def base_weight(self, name: str) -> Tensor:
        """The weight of the matrix `name` with no patch applied, (out, in). Read only."""
        return self._weights.base(name)

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """What identifies the base model, whatever is applied."""
        with self.unpatched():
            return Fingerprint.of(self.model, self.tokenizer)

    # --- running -----------------------------------------------------------------------------------------

    @property
    def hooked(self) -> bool:
        """Whether a memory is applied that changes what modules compute, beyond what the weights say."""
        return self._memories.hooked

    @property
    def patched_now(self) -> bool:
        return bool(self.patches)

    @typed_exclusively
    @torch.no_grad()
    def score(
        self, prompts: Sequence[str], targets: Sequence[str], separators: Sequence[str | None] | None = None
    ) -> list[Score]:
        """How the model reads each target behind its prompt, teacher-forced. Order is kept. `separators` say what
        stands between them; None: what a writer sets there.

        Raises:
            InputError: a target is empty, or nothing stands before it; or there are more of one than of the other.
        """
        asked = pair_texts(prompts, targets, separators)

        def answer(who, which: list[int], texts: list[str]) -> list[Score]:
            parts = [replace(asked[i], prompt=text) for i, text in zip(which, texts, strict=True)]
            if who is None:
                return score_texts(self, parts)
            return who.score(texts, [part.target for part in parts], [part.separator for part in parts])

        return self._memories.answer_each(prompts, answer)

    @typed_exclusively
    @torch.no_grad()
    def generate(
        self,
        prompts: str | Sequence[str],
        max_new_tokens: int = 20,
        *,
        top_k: int | None = None,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int = 0,
        listener: Listener | None = None,
    ) -> str | list[str]:
        """Continuations of the prompts, without the prompts: greedy, or sampled from the `top_k` most likely tokens.

        They end at the tokenizer's end token, or at one that the model's generation configuration names; its other
        settings (penalties, beams, temperature) are not used. Sampling depends on `seed` alone and leaves torch's own
        random state as it was.

        Args:
            top_p: of those the fewest whose chances reach that share (nucleus sampling).
            listener: called as (number of the prompt, next piece of its text) for each token while the texts are
                written; where it gives True, that text ends there, and what it raises ends all of them.

        Raises:
            InputError: a prompt and `max_new_tokens` together are longer than what the model has positions for; or
                there is nothing to draw from.
        """
        if isinstance(prompts, str):
            sampling = {"top_k": top_k, "temperature": temperature, "top_p": top_p, "seed": seed}
            return self.generate([prompts], max_new_tokens, **sampling, listener=listener)[0]
        check_sampling(top_k, temperature, top_p)
        self._hint_at_template(prompts)

        def answer(who, which: list[int], texts: list[str]) -> list[str]:
            options = {"top_k": top_k, "temperature": temperature, "top_p": top_p, "seed": seed}
            if listener is not None:
                options["listener"] = lambda number, piece, hear=listener: hear(which[number], piece)
            if who is not None:
                return who.generate(texts, max_new_tokens, **options)
            rows = self.encode([Text(text) for text in texts])
            self.check_length(rows, max_new_tokens - 1)
            return continue_texts(self, rows, max_new_tokens, **options)

        return self._memories.answer_each(prompts, answer)

    @typed_exclusively
    @torch.no_grad()
    def likeliest(self, prompts: Sequence[str], count: int = 5) -> list[list[tuple[str, float]]]:
        """For each prompt the tokens that most likely follow it, as text, with their probabilities, the likeliest
        first; none where patches have wrecked the model so that its logits are no numbers."""

        def answer(who, which: list[int], texts: list[str]) -> list[list[tuple[str, float]]]:
            if who is not None:
                return who.likeliest(texts, count)
            rows = self.encode([Text(text) for text in texts])
            self.check_length(rows)
            return likeliest_tokens(self, rows, count)

        return self._memories.answer_each(prompts, answer)

    def _hint_at_template(self, prompts: Sequence[str]) -> None:
        """Warns once where a chat model is asked a question outside its chat template."""
        question = asked_without_template(self.tokenizer, self.chat, prompts)
        if question is not None and ("hinted",) not in self.memo:
            self.memo[("hinted",)] = True
            warnings.warn(
                f"{self.name} is a chat model and is asked “{question.strip()[-60:]}” outside its chat template, so "
                "it continues the text: chat=True (--chat) puts questions into the template",
                stacklevel=5,
            )

    @typed_exclusively
    def perplexity(self, texts: Sequence[str], max_tokens: int = 256) -> float:
        """exp of the mean token NLL over the texts, each cut at `max_tokens`; a text's first token is not scored.

        Raises:
            InputError: no text has two tokens.
        """
        return perplexity(self, as_list(texts, "texts"), max_tokens)

    # --- the stack of patches ----------------------------------------------------------------------------

    @property
    def patches(self) -> tuple[Patch, ...]:
        """The applied patches, the newest last."""
        return self._applied.patches

    @typed_exclusively
    def apply(self, patch: Patch, *, force: bool = False) -> None:
        """Puts the patch on top of the stack.

        Raises:
            PatchError: made on another base model (`force` overrides, and the patch notes it), already applied, or a
                version of a memory that does not continue the newest one applied.
        """
        self._applied.set(with_patch(self.patches, patch, self.fingerprint, force=force))
        if force:
            note_force(patch, self.fingerprint)

    @typed_exclusively
    def revert(self, patch: Patch | str) -> None:
        """Takes the patch (or the one of this id) off; any order. With no patch left the weights are the base's bits.

        Raises:
            PatchError: it is not applied, or a version of a memory that is not the newest.
        """
        self._applied.set(without_patch(self.patches, patch if isinstance(patch, str) else patch.id))

    @typed_exclusively
    def rebuild(self, *, without: Patch | str) -> None:
        """Takes any version of a memory off: the later edits of its method are made again without it.

        Raises:
            PatchError: it is not applied.
            InputError, EditFailed: an edit cannot be made again; the stack is as before.
        """
        wanted = without if isinstance(without, str) else without.id
        removed = next((patch for patch in self.patches if patch.id == wanted), None)
        if removed is None or removed.kind == "weights":
            return self._applied.set(without_patch(self.patches, wanted))
        before, later = self.patches[: (place := self.patches.index(removed))], self.patches[place + 1 :]
        with self.stacked(before):
            for patch in later:
                again = patch.kind != "weights" and patch.method == removed.method
                self.apply(make(patch.method, patch.settings).edit(self, patch.edits) if again else patch)
            rebuilt = self.patches
        self._applied.set(rebuilt)

    @contextmanager
    def patched(self, *patches: Patch):
        """While open, the patches are on top of the stack; afterwards the stack is as before.

        Other threads that use the model wait until it closes.
        """
        with self.restored_afterwards():
            for patch in patches:
                self.apply(patch)
            yield self

    @contextmanager
    def restored_afterwards(self):
        """While open, patches may be put on and taken off; afterwards the stack is as before. See `patched`."""
        with self.exclusive(), self._applied.kept():
            yield self

    def temporary_memory(self, method: str, memory: HookMemory):
        """While open, this is the memory of the method in place of the applied one: for training it."""
        return self._memories.temporary(method, memory)

    @contextmanager
    def unpatched(self):
        """While open, the model is its base; see `patched`."""
        with self.stacked(()):
            yield self

    @typed
    @contextmanager
    def stacked(self, patches: Iterable[Patch]):
        """While open, exactly these patches are applied, so that several users' stacks can share one base.

        Raises:
            PatchError: a patch of another base model, or one that is there twice.
        """
        with self.exclusive(), self._applied.kept():
            self.restack(patches)
            yield self

    @typed_exclusively
    def restack(self, patches: Iterable[Patch]) -> None:
        """Applies exactly these patches, in their order.

        Raises:
            PatchError: a patch of another base model, one that is there twice, or a version of a memory without the
                one before; the stack is as it was.
        """
        wanted = ()
        for patch in patches:
            wanted = with_patch(wanted, patch, self.fingerprint)
        self._applied.set(wanted)
