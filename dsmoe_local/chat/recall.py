"""What is shown of a session that goes on: its last message and reply, shortened."""

from __future__ import annotations

from rich.text import Text

from dsmoe_local.base.text import safe_text
from dsmoe_local.chat import words
from dsmoe_local.chat.conversation import Conversation
from dsmoe_local.chat.frames import without_files
from dsmoe_local.chat.markdown.stream import render_markdown
from dsmoe_local.chat.terminal.screen import Screen
from dsmoe_local.chat.turns import Role

_MOST_LINES = 12
_LONGEST_LINE = 400  # characters: a line may be a whole book


def recall(screen: Screen, conversation: Conversation, name: str) -> None:
    """Show where the session called `name` is, and how its last reply ended if not by itself."""
    turns = conversation.turns
    questions = [index for index, turn in enumerate(turns) if turn.role is Role.USER]
    # With a reply, where there is one.
    first = questions[-2:][0] if conversation.unanswered else (questions or [0])[-1]
    earlier = f", {words.count(first, 'turn')} before these" if first else ""
    screen.notice(f"{name}{earlier}")
    for turn in turns[first:]:
        if turn.role is Role.USER:
            text = _shortened(without_files(turn.content))
            screen.show(Text(safe_text(f"> {text}"), style="dim"))
        elif screen.plain:
            screen.show(Text(safe_text(_shortened(turn.content))))
        else:
            screen.show(render_markdown(_shortened(turn.content), screen.width, colour=screen.colour))
    if conversation.unanswered:
        screen.notice("[not answered: /continue answers it]")
    elif turns and turns[-1].ending in words.ENDINGS:
        screen.notice(f"[{words.ENDINGS[turns[-1].ending]}]")


def _shortened(text: str) -> str:
    lines = text.strip().split("\n")
    shown = [line if len(line) <= _LONGEST_LINE else f"{line[: _LONGEST_LINE - 1]}…" for line in lines]
    return "\n".join([*shown[:_MOST_LINES], *(["…"] if len(shown) > _MOST_LINES else [])])
