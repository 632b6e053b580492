"""The report of a distillation of a language model: verdict first; then pairs, measures, continuations and configuration."""

from __future__ import annotations

from whichkl.distillation import HeldOutLoss, LanguageDistillation, SequenceKL
from whichkl.distillation.language.objective import SOURCES, minimised
from whichkl.distillation.language.result import described
from whichkl.plots.curves import language_curves, logged_losses
from whichkl.printable import as_sentence, one_line, shorten
from whichkl.reporting.page import Block, Page, Section, configuration_section, markdown

_MAX_SHOWN = 600
"""Largest number of characters of a continuation that is shown."""
_KLS = {
    "forward_kl": ("forward KL", "KL(teacher‖student): what the teacher holds possible and the student misses"),
    "reverse_kl": ("reverse KL", "KL(student‖teacher): what the student holds possible and the teacher doesn't"),
}
_HOW = (
    "Continuations are drawn from each model's whole softmax, untempered. Each KL is the mean over draws of the sum of the next "
    "token's KLs, with a cross-fitted control variate; ± is one standard error, clustered by prompt."
)
_FRONT_MATTER = "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- distillation\n- whichkl\n---\n\n"


def language_page(result: LanguageDistillation, *, has_pictures: bool = True, has_text: bool = True) -> Page:
    """Return the report; without continuations if it hasn't `has_text`."""
    fields = {k: v for k, v in result.to_dict().items() if k in ("settings", "steps", "flops", "cpu_seconds")}
    models = f"Student: {result.settings['student']}. Teacher: {result.settings['teacher']}."
    what = f"{models} The loss is {described(result.settings)}."
    sections = [language_verdict(result, has_pictures=has_pictures), _pairs(result), *_measures(result)]
    sections += [_continuations(result)] if has_text and result.examples else []
    sections += [_training(result, has_pictures=has_pictures), configuration_section(fields)]
    return Page("Distillation of a language model", what, sections, "Written by whichkl. Divergences are in nats.")


def model_card(result: LanguageDistillation) -> str:
    """Return the report without pictures and continuations as a model card, Markdown with a header of YAML."""
    return _FRONT_MATTER + markdown(*language_page(result, has_pictures=False, has_text=False))


def language_verdict(result: LanguageDistillation, *, has_pictures: bool = True) -> Section:
    """State what training changed and what speaks against it; then both KLs, and, if it `has_pictures`, their curves."""
    outcome, sentence, doubts = result.verdict
    make = Block.finding if outcome.startswith("The student came closer") else Block.warning
    blocks = [make(sentence, outcome)]
    blocks += [Block.warning(doubt, "Doubt") for doubt in doubts]
    blocks += [Block.warning(as_sentence(note), "Note") for note in result.notes]
    blocks.append(_kl_table(result))
    figures = language_curves(result) if has_pictures else []
    if figures:
        caption = "Over training: forward KL in blue, reverse KL in orange, with standard errors; the teacher's as dotted lines."
        blocks.append(Block.charts(figures, caption))
    lead = f"On {result.after.prompts:,} held-out prompts"
    if isinstance(result.after, SequenceKL):
        lead += f", continued to {result.after.max_new_tokens} tokens at most"
    return Section("What came of it", f"{lead}.", tuple(blocks))


def _kl_table(result: LanguageDistillation) -> Block:
    """Show both KLs before and after training."""
    both, rows = (result.before, result.after), []
    if not isinstance(result.after, SequenceKL):
        for name, word in (("forward_kl", "forward KL"), ("reverse_kl", "reverse KL"), ("nll", "−log q of the data's tokens")):
            known = [getattr(one, name) for one in both]
            if None not in known:
                word = "cross-entropy, forward KL + H(p)" if known[1].up_to else word
                rows.append((word, *(one.number for one in known)))
        return Block.table(("nats a token", "before", "after"), rows, "± one standard error, clustered by prompt.")
    for name, (word, meaning) in _KLS.items():
        numbers = [getattr(found, f"{name}{per}").number for per in ("", "_per_token") for found in both]
        rows.append((word, *numbers, meaning))
    return Block.table(("", "a sequence, before", "after", "a token, before", "after", "meaning"), rows, _HOW)


def _measures_table(found: SequenceKL, before: SequenceKL | None = None) -> Block:
    """Compare the measures of two models, and, if given, those of the student `before`."""
    heads = ["measure", "teacher", *(["student before", "student after"] if before else ["student"]), "student − teacher"]
    rows = []
    for name, one in found.measures.items():
        was = [] if before is None else [before.measures[name].student.number if name in before.measures else "–"]
        difference = "–" if one.difference is None else one.difference.number
        rows.append((name.replace("_", " "), one.teacher.number, *was, one.student.number, difference))
    students = [one for one in (before, found) if one is not None]
    rows.append(("cut at the limit", f"{found.cut['teacher']:.1%}", *(f"{one.cut['student']:.1%}" for one in students), "–"))
    rows.append(("same likeliest token", "–", *(one.agreement.number for one in students), "–"))
    caption = (
        "Entropy: nats a sequence along each model's own draws. Length: tokens. Distinct 2: share of distinct pairs of "
        "neighbouring tokens. Nll, ece and the likeliest token: on the teacher's draws, per token. Data nll: "
        "on the data's completions."
    )
    return Block.table(heads, rows, caption)


def sequence_section(found: SequenceKL) -> Section:
    """Show both KLs of two models, and their measures."""
    rows = [
        (word, getattr(found, name).number, getattr(found, f"{name}_per_token").number, meaning)
        for name, (word, meaning) in _KLS.items()
    ]
    notes = dict.fromkeys((*found.forward_kl.notes, *found.reverse_kl.notes))
    table = Block.table(("", "nats a sequence", "nats a token", "meaning"), rows, _HOW)
    lead = f"{found.prompts:,} prompts × {found.samples}, at most {found.max_new_tokens} new tokens."
    return Section("", lead, (table, _measures_table(found), *(Block.warning(as_sentence(one), "note") for one in notes)))


def held_out_section(found: HeldOutLoss) -> Section:
    """Show what could be measured of a student."""
    known = {"forward KL": found.forward_kl, "reverse KL": found.reverse_kl, "−log q of the data's tokens": found.nll}
    rows = [(word + one.constant, one.number, "; ".join(one.notes) or "–") for word, one in known.items() if one is not None]
    table = Block.table(("", f"nats a {found.per}", "note"), rows, "± one standard error, clustered by prompt.")
    return Section("", f"{found.prompts:,} held-out prompts, {found.tokens:,} tokens; of the teacher: {found.access}.", (table,))


def _pairs(result: LanguageDistillation) -> Section:
    """Show what each pair minimises, and which shares this run took."""
    settings, rows = result.settings, []
    objective, credit = settings["objective"].split(":")[0], settings["credit"]
    others = [name for name in ("forward_kl", "reverse_kl") if name != objective]
    for source in SOURCES:
        share = settings["prefixes"].get(source, 0.0)
        mine = minimised(objective, [source], credit)
        rows.append((source, f"{share:.0%}", mine, *(minimised(name, [source]) for name in others)))
    heads = ("tokens before, of the", "share", f"{settings['objective']}, this run", *(name for name in others))
    lead = "The direction of the next token's divergence and the source of the tokens before it are two choices."
    return Section("What was minimised", lead, (Block.table(heads, rows, "The share of sequences with such prefixes."),))


def _measures(result: LanguageDistillation) -> list[Section]:
    if not (isinstance(result.after, SequenceKL) and isinstance(result.before, SequenceKL)):
        return []
    lead = "Continuations of the same prompts; the difference is that of the trained student."
    return [Section("How its continuations are", lead, (_measures_table(result.after, result.before),))]


def _continuations(result: LanguageDistillation) -> Section:
    rows = [
        tuple(shorten(one_line("–" if text is None else text), _MAX_SHOWN) for text in vars(one).values())
        for one in result.examples
    ]
    heads = ("prompt", "the data", "the teacher", "the student before", "the student after")
    lead = "Held-out prompts, what follows in the data, and one draw of each model; special tokens are shown."
    return Section("Continuations side by side", lead, (Block.table(heads, rows),))


def _training(result: LanguageDistillation, *, has_pictures: bool) -> Section:
    lead = f"{result.spent}."
    figure = logged_losses(result.history) if has_pictures and len(result.history) > 1 else None
    rule = "FLOPs: (6 × the student's parameters + 2 × the teacher's) a trained token, 2 × a model's parameters a generated one."
    blocks = [Block.paragraph(rule)]
    blocks += [] if figure is None else [Block.chart(figure, "The logged losses, means over the tokens of a step.")]
    return Section("Training", lead, tuple(blocks))
