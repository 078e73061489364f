"""What the library says to who uses it by Python and the command line, said to who sits before the page."""

from __future__ import annotations

PHRASES = {
    "--base as a GGUF file;": "the GGUF file of the base model;",
    "cut it to that with `--truncate`": "cut it to that by the box below the formats",
    "with `--to hf`": "in the format hf",
    "(`--to hf`)": "(the format hf)",
    "llama.cpp wants --to gguf-lora": "llama.cpp wants the format gguf-lora",
    "`reknow export --to gguf --base FILE`": "an export in the format gguf",
    "--dtype float32 keeps": "a page started with `reknow ui --dtype float32` keeps",
    "(`--dtype float32`)": "(`reknow ui --dtype float32`)",
    "float32 (--dtype)": "float32 (`reknow ui --dtype`)",
    "take a smaller --dtype,": "start the page with a smaller dtype (`reknow ui --dtype`), take",
    "with tokenizer= (--tokenizer NAME)": "(`reknow ui --tokenizer NAME`)",
    "with trust_remote_code=True (--trust-remote-code)": "(`reknow ui --trust-remote-code`)",
    "chat=True (--chat) puts questions into the template": "the screen “Ask” puts questions into the template",
    "with force=True (reknow apply --force)": "with `reknow apply --force`",
    "put patches on with --patch, or `reknow pull` it": "`reknow pull` it, and add its file on the screen “Stack”",
    "on the command line --rebuild": "on the command line `reknow revert --rebuild`",
    "give --debug to see where, and report it": "report it",
    "; --debug shows it too": "",
}
"""Options of commands and what the page has in their place, or the whole command where it has nothing."""


def on_page(text: str) -> str:
    """A sentence of the library, for the page."""
    for phrase, said in PHRASES.items():
        text = text.replace(phrase, said)
    return text
