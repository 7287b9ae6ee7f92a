"""One chat: handle inputs, and connect a conversation with its screen, session and commands."""

from __future__ import annotations

import threading
from collections.abc import Callable, Set
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from dsmoe_local.base.config_file import ConfigFile
from dsmoe_local.base.errors import DsmoeError, InterruptedRunError, UsageError
from dsmoe_local.base.paths import absolute, data_folder
from dsmoe_local.base.text import safe_line
from dsmoe_local.chat import attachments, multiline, notices
from dsmoe_local.chat.commands import table
from dsmoe_local.chat.context import MadeRoom
from dsmoe_local.chat.conversation import Asked, Conversation, Reply
from dsmoe_local.chat.experts_view import ExpertsView
from dsmoe_local.chat.reasoning_view import ReasoningView
from dsmoe_local.chat.saving import CacheKeeper, CacheStoring, Drafts
from dsmoe_local.chat.session_settings import SessionSettings, differences
from dsmoe_local.chat.settings import OnFull, Think
from dsmoe_local.chat.store.sessions import Session, SessionStore
from dsmoe_local.chat.terminal.screen import ReplyView, Screen, Status
from dsmoe_local.chat.turns import Transcript
from dsmoe_local.engine.errors import EngineCrashError, PromptError
from dsmoe_local.engine.types import FinishReason, ModelInfo, ModelOptions, TokenEvent

_NEARLY_FULL = 0.85  # share of the context from which the user is warned


class Chat:
    """A chat. Commands use it through the protocol commands.declare.Chat.

    `take` runs in one thread; `cancel`, `kill` and `status` may be called from any.
    """

    def __init__(
        self,
        conversation: Conversation,
        screen: Screen,
        config: ConfigFile,
        *,
        sessions: SessionStore | None = None,
        caches: CacheKeeper | None = None,
        drafts: Drafts | None = None,
        fixed: Set[str] = frozenset(),
        stats: bool = False,
        models_folder: Path | None = None,
        options: ModelOptions | None = None,
    ) -> None:
        """`fixed` names the settings given on the command line, which override those of a session.

        `options` are those with which the user started; /model loads other models with them.
        """
        self.conversation = conversation
        self.models_folder = models_folder or data_folder() / "models"
        self.options = options or conversation.engine.options
        self.screen = screen
        self.config = config
        self.sessions = sessions
        self.session: Session | None = None
        self.experts = ExpertsView(conversation.engine)
        self.finished = False
        self._storing = CacheStoring(caches, conversation, lambda: self.session, screen)
        self._settings = SessionSettings(conversation.settings, fixed)
        self._drafts = Drafts() if drafts is None else drafts
        self._stats = stats
        self._warned = False  # that the context is nearly full
        self._tokens_per_second = 0.0  # of the last reply of this engine process
        self._cancelled = threading.Event()

    def begin(
        self,
        session: Session | None = None,
        *,
        name: str = "",
        system: str = "",
        own_model: bool = False,
        experts: bool = False,
    ) -> None:
        """Greet the user, and open `session`, or a new one called `name`. Must be called before `take`.

        `system` replaces the session's system text. `own_model`: the session determined the model.
        """
        notices.greet(self.screen, self.conversation)
        if session is not None:
            self.adopt(session, system, own_model=own_model)
            self.recall()
        else:
            self.conversation.set_system(system)
            if name and self.sessions is not None:
                self.sessions.rename(self.current_session(self.sessions), name)
                self.screen.notice(f"{safe_line(name, 60)} is a new session")
        self.advise()
        if experts:
            self.experts.switch(True)

    def advise(self) -> None:
        """Show a note if the model was not trained with a system text, and there is one."""
        if self.conversation.system and notices.advises_against_system(self.conversation.engine.info):
            self.screen.notice(
                "note: DeepSeekMoE was trained without a system text; its authors advise against one"
            )

    def take(self, text: str) -> bool:
        """Handle one input, a command or a message, and show errors. Return False if the chat ends."""
        self._cancelled.clear()
        with self._storing.held_off():
            try:
                self._take(text)
            except InterruptedRunError:
                self.screen.notice("[stopped]")
            except EngineCrashError as error:
                self.screen.error(error)
                self.screen.notice("the conversation is saved; the next message loads the model again")
            except DsmoeError as error:
                self.screen.error(error)
                if isinstance(error, PromptError) and (advice := notices.how_to_make_room(self.conversation)):
                    self.screen.notice(advice)
        if not self.finished:
            self._storing.begin_idle()
        return not self.finished

    def close(self, *, keep: bool = True) -> None:
        """End the chat, and store its KV cache unless the user presses Ctrl-C. No reply may be running.

        `keep` is False if a signal ends the chat: the cache is not stored.
        """
        self._storing.end(keep=keep)

    def cancel(self) -> None:
        """Stop the running or starting reply. May be called from any thread."""
        self._cancelled.set()
        self._storing.interrupt()
        self.conversation.cancel()

    def kill(self) -> None:
        """Kill the engine, which did not react to `cancel`. May be called from any thread."""
        self.conversation.engine.kill()

    def send(self, text: str) -> None:
        """Send a message, with the files that it mentions as @file, and show the reply."""
        expanded = attachments.expand(text)
        for file in expanded.files:
            self.screen.notice(attachments.describe(file))
        for name in expanded.missing:
            self.screen.notice(f"note: {safe_line(name, 80)} does not exist and is sent as text")
        if self.conversation.unanswered:
            gone = attachments.preview(self.conversation.turns[-1].content, 50)
            self.screen.notice(f"note: this replaces your last message, which has no reply: {gone}")
        self.show_reply(lambda conversation: conversation.send(expanded.text))

    def show_reply(self, action: Callable[[Conversation], Reply], after: str = "") -> None:
        """Show and save the reply whose events `action` returns. `after` is the text that it continues."""
        conversation = self.conversation
        if not conversation.engine.alive:
            self.screen.notice("loading the model again")
            self._tokens_per_second = 0.0
        events = action(conversation)
        if self._cancelled.is_set():
            # `cancel` was called before the reply existed.
            conversation.cancel()
        try:
            self.experts.reply_begins()
            # `closing` adds an interrupted reply to the turns before they are saved.
            with closing(events), self.screen.reply(after) as view:
                self._show(events, view, goes_on=bool(after))
        finally:
            try:
                self.experts.reply_ends(self.screen)
            finally:
                self._save_or_show_error()
        self._tokens_per_second = 0.0 if conversation.usage is None else conversation.usage.tokens_per_second
        self._show_remarks()

    def save(self) -> None:
        """Save the conversation if it has changed."""
        if self.sessions is None or (self.session is None and not self.conversation.turns):
            return
        session = self.current_session(self.sessions)
        session.settings = self._settings.to_store(self.conversation.settings)
        if note := session.save(self.conversation.transcript):
            self.screen.notice(note)

    def current_session(self, sessions: SessionStore) -> Session:
        """Return the session of this chat; create it if there is none yet."""
        if self.session is None:
            info = self.conversation.engine.info
            self.session = sessions.create(info.name, info.vocabulary, self.conversation.system)
            self.session.model_path = _place_of(info)
        return self.session

    def adopt(self, session: Session | None, system: str = "", *, own_model: bool = False) -> None:
        """Save the current session and open `session` (None: a new one), its turns, settings and KV cache.

        See `begin` for `system` and `own_model`.
        """
        self.save()
        before = self.conversation.turns
        info = self.conversation.engine.info
        transcript = Transcript(system=self.conversation.system)
        if session is not None:
            transcript = session.load(info.vocabulary)
            transcript = replace(transcript, system=system or transcript.system)
        if transcript.turns[: len(before)] != before:
            self._storing.store()
        self.session = session
        self._settings.forget_session()
        restored = [f"model {safe_line(info.path.name, 60)}"] if own_model else []
        if session is not None and session.settings is not None:
            settings = self._settings.restored(session.settings)
            restored += differences(self.conversation.settings, settings)
            self.conversation.settings = settings
        self._continue_with(transcript)
        if restored:
            self.screen.notice(f"restored from this session: {', '.join(restored)}")

    def switch_model(self, load: Callable[[], None]) -> None:
        """Continue the conversation with another model, which `load` loads. If it fails, keep the old one."""
        self.save()
        self._storing.store()
        before = self.conversation.engine.info
        try:
            load()
        except DsmoeError as error:
            if isinstance(error, InterruptedRunError):
                self.screen.notice("[stopped]")
            else:
                self.screen.error(error)
            again = "" if before.server else "; the next message loads it again"
            self.screen.notice(f"{before.name} stays in use{again}")
            return
        self._tokens_per_second = 0.0
        notices.greet(self.screen, self.conversation)
        transcript = self.conversation.transcript
        if self.conversation.engine.info.vocabulary != before.vocabulary:
            transcript = transcript.without_token_ids()
        if self.session is not None:
            transcript = self._with_stored_ids(transcript, self.session)
        elif transcript.turns:
            notices.other_model(self.screen, self.conversation, before.name)
        self._continue_with(transcript)
        self.experts.model_changed(self.screen)
        self.advise()

    def _with_stored_ids(self, transcript: Transcript, session: Session) -> Transcript:
        """Return `transcript` with the ids of replies that the current model wrote, if they are stored."""
        try:
            stored = session.load(self.conversation.engine.info.vocabulary)
        except DsmoeError as error:
            self.screen.error(error)
            return transcript
        same = [turn.content for turn in stored.turns] == [turn.content for turn in transcript.turns]
        return replace(stored, n_shifted=transcript.n_shifted) if same else transcript

    def _continue_with(self, transcript: Transcript) -> None:
        """Continue with a transcript, after its session was opened or another model was loaded."""
        self._warned = False
        self.experts.forget()
        self.conversation.restore(transcript)
        session, info = self.session, self.conversation.engine.info
        if session is None:
            return
        if session.model != info.name:
            notices.other_model(self.screen, self.conversation, session.model)
        session.model, session.model_path = info.name, _place_of(info)
        self._storing.restore(session)

    def recall(self) -> None:
        """Show the last message and reply of the session."""
        if self.session is not None:
            notices.recall(self.screen, self.conversation, self.session.name)

    def status(self) -> Status:
        """Return the content of the status line. May be called from any thread."""
        conversation, session = self.conversation, self.session
        info = conversation.engine.info
        return Status(
            model=info.name,
            session=session.name if session is not None else "",
            n_used=conversation.n_used,
            n_context=info.n_context,
            tokens_per_second=self._tokens_per_second,
            note="storing the cache" if self._storing.is_shown else "",
        )

    def _take(self, text: str) -> None:
        message = multiline.content(text)
        if message is not None:
            if message.strip():
                self.send(message)
            return
        parsed = table.parse(text)
        if isinstance(parsed, table.Unknown):
            self.screen.notice(
                f"/{safe_line(parsed.word, 40)} is not a command; did you mean /{parsed.nearest}?"
            )
        elif parsed is not None:
            command, argument = parsed
            if argument and not command.arguments:
                raise UsageError(
                    f"{text.split()[0]} takes no argument",
                    remedy=f"to send this as a message, put it between lines with {multiline.MARK}",
                )
            if command.local and self.conversation.engine.info.server:
                raise UsageError(f"{text.split()[0]} needs the model on this computer, not on a server")
            command.run(self, argument)
        elif text.strip():
            self.send(text)
        elif self.conversation.completes and self.conversation.turns:
            after = self.conversation.turns[-1].content
            self.show_reply(lambda conversation: conversation.continue_reply(), after)

    def _show(self, events: Reply, view: ReplyView, *, goes_on: bool) -> None:
        begun = self.conversation.completes
        thought = ReasoningView(view, shows=self.conversation.settings.think is Think.SHOW)
        end: TokenEvent | None = None
        for event in events:
            if isinstance(event, Asked):
                # The message is saved before the reply can fail.
                self.save()
                self._drafts.begin()
                continue
            if isinstance(event, MadeRoom):
                view.note(f"[{notices.made_room(event)}]")
                continue
            if event.progress is not None:
                view.progress(event.progress.done, event.progress.total)
            end = event if event.finish_reason is not None else end
            thought.take(event)
            # Spaces at the beginning of a reply belong to the template.
            text = event.text if begun or goes_on else event.text.lstrip()
            if text:
                begun = True
                view.text(text)
            self.experts.reply_goes_on(self.screen, reading=event.progress is not None)
            self._save_partial(view)
        reason = None if end is None else end.finish_reason
        if note := notices.ending(reason, self.conversation, has_text=begun):
            view.note(f"[{note}]")

    def _save_partial(self, view: ReplyView) -> None:
        """Save the reply so far, if the last time was long enough ago. An error does not end the reply."""
        if self.session is None:
            return
        session = self.session

        def save(transcript: Transcript) -> None:
            if note := session.save(transcript, partial=True):
                view.note(f"[{note}]")

        try:
            self._drafts.keep(lambda: self.conversation.partial_transcript, save)
        except DsmoeError as error:
            view.note(f"[not saved yet: {error.what}]")

    def _save_or_show_error(self) -> None:
        """Save after a reply. Errors are shown, not raised: they must not hide an error of the reply."""
        try:
            self.save()
        except DsmoeError as error:
            self.screen.error(error)

    def _show_remarks(self) -> None:
        """Show statistics and warnings after a reply."""
        conversation = self.conversation
        if self._stats and conversation.usage is not None:
            self.screen.notice(notices.usage(conversation.usage))
        n_context = conversation.engine.info.n_context  # 0: not known
        share = conversation.n_used / n_context if n_context else 0.0
        nearly = share >= _NEARLY_FULL and conversation.settings.on_full is OnFull.STOP
        if nearly and not self._warned and conversation.finish_reason is not FinishReason.CONTEXT_FULL:
            self.screen.notice(notices.nearly_full(share))
        self._warned = nearly


def _place_of(info: ModelInfo) -> str:
    """Return where a model is: its file, or its server."""
    return info.server or str(absolute(info.path))
