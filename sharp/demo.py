"""The demo: eight conversations of very different lengths through one engine, side by side, and what it cost.

Knows the public LLM and its statistics, and how to draw on a terminal. Every number it prints is counted by
the engine or read off a clock; it invents none.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sharp.demo_prompts import demo_conversations

if TYPE_CHECKING:
    from rich.console import Console

    from sharp.llm import LLM
    from sharp.request import RequestOutput

__all__ = ["DEMO_MODEL", "PROMPT_CHUNK", "demo_conversations", "run_demo"]

DEMO_MODEL = "smollm2-135m-instruct"
# Tokens of the long prompt in a step: the short answers then stream while it is still being read.
PROMPT_CHUNK = 128
LINE_CHARACTERS = 72  # of an answer, before a plain output prints what it has


@dataclass
class Chat:
    """One of the conversations on its way."""

    question: str
    num_prompt_tokens: int
    answer: str = ""
    num_tokens: int = 0
    finish_reason: str | None = None


@dataclass
class Clock:
    """Seconds since the command began: to the first visible text, to the first finished answer."""

    started: float
    first_text: float | None = None
    first_answer: float | None = None

    def note(self, chat: Chat) -> None:
        now = time.monotonic() - self.started
        if self.first_text is None and chat.answer:
            self.first_text = now
        if self.first_answer is None and chat.finish_reason:
            self.first_answer = now


@dataclass
class Side:
    """All conversations, updated by the engine's outputs as they come."""

    chats: list[Chat]
    max_tokens: int
    clock: Clock

    def follow(self, outputs: Iterator[RequestOutput]) -> Iterator[int]:
        """Yield the index of each conversation that grew."""
        from sharp.llm import prompt_index

        for output in outputs:
            index, answer = prompt_index(output), output.outputs[0]
            chat = self.chats[index]
            chat.answer, chat.num_tokens = answer.text, len(answer.token_ids)
            chat.finish_reason = answer.finish_reason
            self.clock.note(chat)
            yield index

    @property
    def num_tokens(self) -> int:
        return sum(chat.num_tokens for chat in self.chats)


def draw_live(side: Side, outputs: Iterator[RequestOutput], console: Console) -> None:
    """A grid of panels that grow together, and a bar of the tokens generated."""
    from rich.console import Group
    from rich.live import Live
    from rich.panel import Panel
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table
    from rich.text import Text

    num_columns = 2 if console.width >= 70 else 1
    num_rows = -(-len(side.chats) // num_columns)
    height = max(3, min(9, (console.height - 2) // num_rows))
    width = console.width // num_columns - 4
    bar = Progress(
        TextColumn("generating"), BarColumn(), MofNCompleteColumn(), TextColumn("tokens"), TimeElapsedColumn()
    )
    task = bar.add_task("generating", total=len(side.chats) * side.max_tokens)

    def panel(chat: Chat) -> Panel:
        lines = Text(chat.answer).wrap(console, width)
        tail = Text("\n").join(lines[-(height - 2) :])
        colour = "green" if chat.finish_reason else "cyan"
        title = Text(f"{chat.question.split(chr(10))[0]:.{max(8, width - 16)}} · {chat.num_prompt_tokens}")
        return Panel(tail, title=title, title_align="left", height=height, border_style=colour)

    def picture() -> Group:
        grid = Table.grid(expand=True)
        for _ in range(num_columns):
            grid.add_column(ratio=1)
        panels = [panel(chat) for chat in side.chats]
        for start in range(0, len(panels), num_columns):
            grid.add_row(*panels[start : start + num_columns])
        return Group(grid, bar)

    with Live(get_renderable=picture, console=console, refresh_per_second=8):
        for _ in side.follow(outputs):
            bar.update(task, completed=side.num_tokens)
        # Answers that ended by themselves leave tokens unasked for; the bar shows what was generated.
        bar.update(task, completed=side.num_tokens, total=side.num_tokens)


def draw_lines(side: Side, outputs: Iterator[RequestOutput], console: Console) -> None:
    """The same for a file or a pipe: whole lines, each with the number of its conversation."""
    printed = [0] * len(side.chats)

    def show(index: int, text: str) -> None:
        for line in text.split("\n"):
            if line.strip():
                console.print(f"[{index + 1}] {line}", markup=False, highlight=False, soft_wrap=True)

    for index in side.follow(outputs):
        chat = side.chats[index]
        fresh = chat.answer[printed[index] :]
        if chat.finish_reason:
            show(index, fresh)
            ended = "max_tokens" if chat.finish_reason == "length" else chat.finish_reason
            show(index, f"({chat.num_tokens} tokens, ended by {ended})")
        elif len(fresh) >= LINE_CHARACTERS or "\n" in fresh:
            cut = fresh.rfind("\n") if "\n" in fresh else fresh.rfind(" ")
            if cut < 0:
                continue
            show(index, fresh[:cut])
            printed[index] += cut + 1


def summary(side: Side, stats: Any, seconds: float, block_size: int) -> list[tuple[str, str]]:
    """What the run cost: rows of (what, value). `stats` is the engine's RunStats over this run alone."""
    prompt_tokens = sum(chat.num_prompt_tokens for chat in side.chats)
    padding = stats.padding_saved
    share = padding / stats.padded_tokens if stats.padded_tokens else 0.0
    return [
        ("prompt tokens", f"{prompt_tokens:,} in {len(side.chats)} conversations"),
        ("generated tokens", f"{side.num_tokens:,}"),
        ("steps", f"{stats.steps:,}"),
        ("generated tokens/s", f"{side.num_tokens / seconds:.1f}"),
        ("all tokens/s", f"{stats.tokens / seconds:.1f}"),
        ("computed tokens", f"{stats.tokens:,}"),
        ("padding of rectangles", f"{padding:,} tokens more, {share:.0%} of the rectangles"),
        ("KV pages, peak / total", f"{stats.peak_blocks:,} / {stats.blocks_total:,} of {block_size} tokens"),
    ]


def run_demo(llm: LLM, started: float, max_tokens: int, console: Console) -> None:
    """Stream the conversations through `llm`, then print the table.

    started: time.monotonic() when the command began. A prompt that leaves no room for max_tokens in the
    model's context is cut at its beginning, and its shown token count is that of what was left.
    """
    from rich.table import Table

    from sharp.request import SamplingParams

    talks = demo_conversations()
    render = llm.tokenizer.apply_chat_template
    room = llm.engine.max_model_len - max_tokens
    if room < 1:
        raise ValueError(f"max_tokens {max_tokens} leaves no room in a context of {llm.engine.max_model_len}")
    prompts = [llm.tokenizer.encode(render(talk), add_special_tokens=False)[-room:] for talk in talks]
    chats = [Chat(talk[-1]["content"], len(prompt)) for talk, prompt in zip(talks, prompts, strict=True)]
    side = Side(chats, max_tokens, Clock(started))

    llm.engine.stats.reset()
    begun = time.monotonic()
    outputs = llm.stream(prompts, SamplingParams(max_tokens=max_tokens, temperature=0.0))
    if console.is_terminal:
        draw_live(side, outputs, console)
    else:
        for index, chat in enumerate(chats):
            question = chat.question.replace("\n", " ")
            shown = question if len(question) < 100 else question[:96] + " ..."
            line = f"[{index + 1}] {chat.num_prompt_tokens} tokens: {shown}"
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        draw_lines(side, outputs, console)
    seconds = time.monotonic() - begun

    table = Table(show_header=False, title=f"on {llm.device_name}", title_justify="left")
    for name, value in summary(side, llm.engine.stats, seconds, llm.config.block_size):
        table.add_row(name, value)
    console.print(table)
    if side.clock.first_text is not None and side.clock.first_answer is not None:
        console.print(
            f"first words after {side.clock.first_text:.1f} s, first whole answer after "
            f"{side.clock.first_answer:.1f} s (since the command began, loading included)",
            highlight=False,
            soft_wrap=True,
        )
