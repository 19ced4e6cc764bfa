"""``audit``: what is in the training data, as tables, and records as they are trained on."""

import sys
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from jsonargparse.typing import NonNegativeInt
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from rosa_lightning.cli.commands import CommandContext
from rosa_lightning.data.audit import Audit, audit_records, token_lengths
from rosa_lightning.data.encoding import Example
from rosa_lightning.data.records import load_records
from rosa_lightning.utils.errors import ConfigurationError
from rosa_lightning.utils.strict_json import write_json
from rosa_lightning.utils.tables import note, text_table


def audit(
    context: CommandContext,
    *,
    ckpt_path: str | None = None,
    output: str | None = None,
    show: NonNegativeInt = 0,
) -> None:
    """Look at the training data: lengths, duplicates, contradictions, contamination.

    Args:
        context: The sources to train on and to test on, and the tokenizer, its own or the base's.
        ckpt_path: Checkpoint whose settings are the defaults of ``model``.
        output: JSON file for the figures, with the numbers of the records concerned.
        show: Records of each source to print as they are trained on: text, tokens, and which of
            them carry loss.
    """
    if output is not None and (Path(output).suffix != ".json" or Path(output).is_dir()):
        raise ValueError(f"output={output} is not the name of a JSON file, such as audit.json.")
    data = context.data
    if data.tokenizer is None and context.module.base:
        data.tokenizer = context.module.tokenizer
    lengths, console, choice = None, Console(), data.loading.choice_seed(data.seed)
    sources = {s.label: load_records(s, "audit", data.tasks, choice) for s in data.sources}
    if data.tokenizer is not None:
        encoder = data.encoder()
        lengths = partial(token_lengths, encoder=encoder)
        for records in sources.values():
            for example in encoder(records[:show])[:show]:
                console.print(shown_example(example, data.text_tokenizer))
    elif show:
        raise ConfigurationError("show needs a tokenizer. Set model.base or data.tokenizer.")
    found = audit_records(
        sources,
        {s.label: load_records(s, "audit", data.tasks, choice) for s in data.test_sources},
        lengths,
        max_length=data.max_length,
        decontaminate=data.loading.decontaminate,
    )
    console.print(audit_tables(found))
    if output is not None:
        write_json(Path(output), found.to_dict())
        sys.stdout.write(f"\n{output}\n")


def shown_example(example: Example, tokenizer: Any) -> Group:
    """A record as it is trained on, for `rich` to print: its text, tokens, and where loss is."""
    table = Table.grid(padding=(0, 2))
    table.add_column(justify="right", no_wrap=True)
    table.add_column(overflow="fold")
    labels = [label >= 0 for label in example.labels(-1)]
    pairs = zip(labels, [*example.prompt, *example.response], strict=True)
    for carries, some in groupby(pairs, key=itemgetter(0)):
        ids = [number for _, number in some]
        style = "green" if carries else "dim"
        table.add_row(Text("loss" if carries else "no loss", style), Text(tokenizer.decode(ids)))
        tokens = "|".join(_shown_token(tokenizer, number) for number in ids)
        table.add_row(Text(f"{len(ids)} tokens", style), Text(tokens, style))
    record = example.record
    title = f"{record.source}, record {record.index}: {sum(labels)} of {len(labels)} tokens"
    cut = ", cut to data.max_length" if example.too_long else ""
    return Group(Text(f"{title} carry loss{cut}", "bold"), table, Text())


def _shown_token(tokenizer: Any, number: int) -> str:
    """A token as text, with its space before it, which some tokenizers do not decode."""
    text: str = tokenizer.decode([number]).replace("\n", "⏎")
    return f" {text}" if tokenizer.convert_ids_to_tokens(number)[:1] == "▁" else text


def audit_tables(audit: Audit) -> Group:
    """The audit for `rich` to print: lengths, contents, contamination."""
    limit = [f"over {audit.max_length:,}"] if audit.unit == "tokens" else []
    names = ("Records", "median", "90 %", "99 %", "longest", *limit)
    lengths = text_table(f"Lengths in {audit.unit}", "Source", *names)
    names = ("Records", "duplicates", "in others", "conflicting", "empty")
    contents = text_table("Contents", "Source", *names)
    for source in audit.sources:
        numbers = [source.num_records, *source.quantiles()[1:]]
        numbers += [] if source.too_long is None else [source.too_long]
        lengths.add_row(source.name, *(f"{number:,}" for number in numbers))
        groups = (source.duplicates, source.elsewhere, source.conflicting, source.empty)
        numbers = [source.num_records, *map(len, groups)]
        contents.add_row(source.name, *(f"{number:,}" for number in numbers))
    parts: list[RenderableType] = [lengths]
    if audit.unit == "words":
        text = "There is no tokenizer, so lengths are in words: set model.base or data.tokenizer."
        parts.append(note(text))
    parts.append(contents)
    if not audit.benchmarks:
        text = "No contamination was looked for: data.test_sources names no benchmark."
        return Group(*parts, note(text))
    title = "Test questions in the training data"
    leaks = text_table(title, "Benchmark", "Questions", "exact", "near")
    leaks.add_column("in", style="dim", overflow="fold")
    for benchmark in audit.benchmarks:
        exact, near = benchmark.num_exact, benchmark.num_near
        leaks.add_row(
            benchmark.name,
            f"{benchmark.questions:,}",
            Text(f"{exact:,}", style="bold red" if exact else ""),
            Text(f"{near:,}", style="yellow" if near else ""),
            ", ".join(benchmark.sources()),
        )
    parts += [leaks, note("near: not exact, but much the same words, and the same numbers")]
    held = [
        f"{len(source.contaminated):,} of {source.num_records:,} records of {source.name}"
        for source in audit.sources
        if source.contaminated
    ]
    if held:
        does = "true leaves out" if audit.decontaminate else "false trains on"
        parts.append(note(f"data.loading.decontaminate: {does} (exact) {', '.join(held)}"))
    return Group(*parts)
